"""pack and unpack: the traces of a folder from JSON Lines to Parquet and back, each file in one step, checked before.

A file is removed only when what takes its place has given every byte of it back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from driftprobe.artifacts import written
from driftprobe.columns import Columns
from driftprobe.errors import OutputError, TraceError, UsageError
from driftprobe.fingerprint import SKETCH_BLOCK, SKETCH_SIZE
from driftprobe.load import traces_folder
from driftprobe.packed import AT_A_TIME, ENDING, pack, read_packed
from driftprobe.relined import joined_lines, split
from driftprobe.scan import BUILT, GivenUpError, Scanning
from driftprobe.trace import Header
from driftprobe.trace_file import read_header, too_long

LINES = ".jsonl"


@dataclass(frozen=True, slots=True)
class Turned:
    """One file that was packed or unpacked."""

    name: str
    """What it is now."""
    lines: int
    before: int
    """Bytes."""
    after: int


def pack_folder(folder: Path, progress: Callable[[Turned], None] = lambda _turned: None) -> list[Turned]:
    """Pack every trace of a folder (or of its `traces`) and return what became of each. Payloads stay as they are.

    Raises TraceError where there is none or a line is too long, UsageError without the compiled scanner or polars,
    OutputError where a file cannot be written or one of its name is there.
    """
    if not BUILT:
        raise UsageError(
            "the scanner is not built", where="driftprobe._scan", measured="no compiled module",
            allowed="driftprobe installed with a C compiler", next_step="install a C compiler, then driftprobe again",
        )  # fmt: skip
    return _turn_all(folder, LINES, ENDING, _packed, progress)


def unpack_folder(folder: Path, progress: Callable[[Turned], None] = lambda _turned: None) -> list[Turned]:
    """Turn every packed trace of a folder (or of its `traces`) back into JSON Lines, and return what became of each.

    Raises TraceError where there is none or one is damaged, UsageError without polars, OutputError as `pack_folder`.
    """
    return _turn_all(folder, ENDING, LINES, _unpacked, progress)


def _turn_all(
    folder: Path, old: str, new: str, turn: Callable[[Path, Path], int], progress: Callable[[Turned], None]
) -> list[Turned]:
    where, found = traces_folder(folder), []
    paths = sorted(path for path in where.iterdir() if path.suffix == old)
    taken = next((path.with_suffix(new) for path in paths if path.with_suffix(new).exists()), None)
    if taken is not None:
        raise OutputError(
            "the file is there already", where=str(taken), measured=f"beside {taken.with_suffix(old).name}",
            allowed="one of the two", next_step="move one of them elsewhere",
        )  # fmt: skip
    for path in paths:
        target = path.with_suffix(new)
        part = target.with_name(f".{target.name}.part")
        with written(target):
            try:
                lines = turn(path, part)
                done = Turned(target.name, lines, path.stat().st_size, part.stat().st_size)
                part.replace(target)
                path.unlink()
            finally:
                part.unlink(missing_ok=True)
        found.append(done)
        progress(done)
    return found


def _packed(path: Path, part: Path) -> int:
    """Write a packed file, read it back, and return how many lines it has."""
    header = read_header(path)
    size = SKETCH_SIZE if header is None or not 1 <= header.sketch_size <= SKETCH_BLOCK else header.sketch_size
    scanning, digest, last = Scanning(size, path.stat().st_size), hashlib.sha256(), b""
    try:
        with path.open("rb") as file:
            for data, place, _ in scanning.chunks(file):
                start = scanning.last_line() - place if data[-1] == 10 else 0  # only the end of a file has no newline
                digest.update(last)
                digest.update(data[:start])
                last = bytes(data[start:])
    except GivenUpError as error:
        raise too_long(path.name, scanning.room.used[0] + 1).as_error() from error
    columns = _columns(scanning, path.stat().st_size, path.name)
    raw = _not_given_back(columns, path)
    pack(columns, raw, digest.hexdigest(), part)
    back = read_packed(part)
    again = {line: back.raw[index] for line, index in enumerate(back.order.tolist()) if index in back.raw}
    if again != raw or len(back.order) != len(columns.rows) or back.sha256 != digest.hexdigest():
        raise TraceError(
            "the packed trace is not the one that was written", where=part.name, measured="other lines when read back",
            allowed="the same bytes", next_step="keep the JSON Lines, and check the disk",
        )  # fmt: skip
    return len(columns.rows)


def _columns(scanning: Scanning, length: int, name: str) -> Columns:
    """Return a row for each line; a last one that is cut is left alone like any that is no plain record."""
    parts = scanning.parts()
    rows, end = parts.rows, 0
    if len(rows):
        end = int(rows["at"][-1] + rows["length"][-1])
    if end < length:
        rows = rows.with_another(at=end, length=length - end)
    header = Header(prompt="", sketch_size=scanning.size)
    return Columns(header, rows, parts.sums, parts.hashes, parts.words, (), name)


def _not_given_back(columns: Columns, path: Path) -> dict[int, bytes]:
    """Return the lines that their columns do not give back to the byte, by row."""
    raw: dict[int, bytes] = {}
    taken, lengths = columns.rows["taken"] == 1, columns.rows["length"]
    with path.open("rb") as file:
        for start in range(0, len(taken), AT_A_TIME):
            block = slice(start, start + AT_A_TIME)
            plain = start + np.flatnonzero(taken[block])
            given, ours = file.read(int(lengths[block].sum())), joined_lines(columns, plain)
            if given != ours:
                raw |= _unlike(
                    given, lengths[block].tolist(), start, dict(zip(plain.tolist(), split(ours), strict=True))
                )
    return raw


def _unlike(given: bytes, lengths: Sequence[int], first: int, ours: Mapping[int, bytes]) -> dict[int, bytes]:
    """Return those of the lines that were given, the first of which is row `first`, that ours are not."""
    raw, end = {}, 0
    for row, length in enumerate(lengths, first):
        line = given[end : end + length]
        end += length
        if line != ours.get(row):
            raw[row] = line
    return raw


def _unpacked(path: Path, part: Path) -> int:
    """Write a packed trace's lines and hold them to the digest that was taken when they were packed."""
    packed, digest, before = read_packed(path), hashlib.sha256(), b""
    with part.open("wb") as file:
        for _, line in packed.lines():
            digest.update(before)
            before = line or b""
            file.write(before)
    if digest.hexdigest() != packed.sha256:
        raise TraceError(
            "the packed trace does not give back what was packed", where=path.name, measured=digest.hexdigest(),
            allowed=packed.sha256, next_step="copy it again, or pack the traces that it was made from",
        )  # fmt: skip
    return len(packed.columns.rows)
