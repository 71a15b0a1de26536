"""A trace as Parquet: the same lines, their records in columns beside. Specified in docs/trace-format.md, section 10.

Every line of the JSON Lines can be had back to the byte: it is encoded from its columns where that gives the same
bytes, and kept whole (`raw`) where it does not. polars reads and writes the file, and is imported when one is met.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from driftprobe.columns import FLOATS, INTEGERS, NONE, WORDS, Array, Columns, Rows, breaks_a_must
from driftprobe.errors import TraceError, UsageError
from driftprobe.fingerprint import SKETCH_BLOCK
from driftprobe.relined import joined_lines, split
from driftprobe.scan import MAX_ODD, GivenUpError, Parts, columns_of
from driftprobe.seal import OPEN, is_sealed, seal
from driftprobe.trace import Event, Footer, Header, Record
from driftprobe.trace_file import Checks, Problem

Table = Any
"""A DataFrame of polars, which may not be installed where types are checked."""
Column = Any
"""A Series of polars."""
ENDING = ".parquet"
MADE_BY = "driftprobe/packed/1"
GROUP = 1 << 16
"""Rows of a row group: what a reader can skip at once."""
MAX_ROWS_A_BYTE = 8
"""Rows in a byte of the file, at most: a file that holds more was made to fill a memory."""


@dataclass(frozen=True)
class Packed:
    """One packed file, read: a row of `columns.rows` for each line, sorted by key."""

    columns: Columns
    """`taken` is 0 for a line that has no columns."""
    order: Array
    """The row of each line."""
    raw: dict[int, bytes]
    """Row -> the line, where the columns do not give it back."""
    sha256: str
    """Of every byte before the last line."""

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield each line with its number, as `trace.lines` does."""
        order = self.order.tolist()
        for start in range(0, len(order), AT_A_TIME):
            block = order[start : start + AT_A_TIME]
            made = iter(split(joined_lines(self.columns, [index for index in block if index not in self.raw])))
            for number, index in enumerate(block, start + 1):
                yield number, self.raw[index] if index in self.raw else next(made)


AT_A_TIME = 4096
"""Records that are made into lines together."""


def pack(columns: Columns, raw: dict[int, bytes], sha256: str, path: Path) -> None:
    """Write the lines of a trace, a row for each, sorted by key. Raises OSError."""
    table, size = _table(columns, raw), columns.sums.shape[1]
    digest = _digest(_columns(table, table["sketch"].slice, size, path.name))
    facts = {"made_by": MADE_BY, "sketch_size": size, "digest": digest, "sha256": sha256, "seal": OPEN}
    table.write_parquet(
        path, compression="zstd", statistics=True, row_group_size=GROUP, metadata={"driftprobe": json.dumps(facts)}
    )
    seal(path)


def _table(columns: Columns, raw: dict[int, bytes]) -> Table:
    pl, rows = _polars(), columns.rows
    taken = rows["taken"] == 1
    body: dict[str, Any] = {"line": np.arange(1, len(rows) + 1, dtype=np.uint32)}
    for name in WORDS:
        names = pl.Series(columns.words, dtype=pl.String)
        codes = pl.Series(np.where(taken, rows[name], -1))
        body[name] = names.gather(codes.set(codes < 0, None)).cast(pl.Enum(names))
    body["layer"] = _with_nulls(rows["layer"], taken & (rows["layer"] >= 0))
    body["hash"] = _with_nulls(rows["hash"], taken)
    for name in INTEGERS:
        body[name] = _with_nulls(rows[name], taken & (rows[name] != NONE))
    for name in FLOATS:
        body[name] = _with_nulls(rows[name], taken & ~np.isnan(rows[name]))
    sums, hashes = columns.sums, columns.hashes
    body["sketch"] = pl.Series(
        [None if at < 0 else sums[at].tobytes() for at in np.where(taken, rows["sums"], -1).tolist()], dtype=pl.Binary
    )
    counts = np.where(taken, rows["rows"], -1).tolist()
    starts = rows["rows_at"].tolist()
    body["rows"] = pl.Series(
        [None if n < 0 else hashes[at : at + n].tobytes() for at, n in zip(starts, counts, strict=True)],
        dtype=pl.Binary,
    )
    body["raw"] = pl.Series([raw.get(index) for index in range(len(rows))], dtype=pl.Binary)
    keys = ["arm", "step", "layer", "tensor", "logical_tok_idx", "line"]
    return pl.DataFrame(body).sort([pl.col(key).to_physical() if key in WORDS else pl.col(key) for key in keys])


def _with_nulls(values: Array, known: Array) -> Column:
    series = _polars().Series(np.ascontiguousarray(values))
    return series.set(_polars().Series(~known), None)


def read_packed(path: Path) -> Packed:
    """Return a packed file. Raises TraceError for one that is damaged or was not made by `pack`, and OSError."""
    pl = _polars()
    try:
        if not is_sealed(path):  # before polars sees it: damage may end the process there
            raise _UnfitError("other bytes than its seal is of, or no description by driftprobe in its metadata")
        with path.open("rb") as file:
            facts = _facts(pl.read_parquet_metadata(file).get("driftprobe"))
        counted = int(pl.scan_parquet(path, glob=False).select(pl.len()).collect().item())
        if counted > MAX_ROWS_A_BYTE * path.stat().st_size:
            raise _UnfitError(f"{counted} rows in {path.stat().st_size} bytes")
        _check_schema(pl.scan_parquet(path, glob=False).collect_schema())
        return _unpacked(path, facts)
    except _UnfitError as error:
        raise _not_packed(path, str(error)) from error
    except OSError:
        raise
    except BaseException as error:  # a panic inside polars is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise _not_packed(path, f"{type(error).__name__}: {error}") from error


class _UnfitError(Exception):
    """The file is Parquet, and not one of ours."""


def _facts(text: str | None) -> dict[str, Any]:
    try:
        facts = json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise _UnfitError("no description by driftprobe in its metadata") from error
    if not isinstance(facts, dict) or facts.get("made_by") != MADE_BY:
        raise _UnfitError(f"made by {facts.get('made_by') if isinstance(facts, dict) else facts!r}")
    size = facts.get("sketch_size")
    if not isinstance(size, int) or not 1 <= size <= SKETCH_BLOCK:
        raise _UnfitError(f"sketch size {size!r}")
    return facts


def _unpacked(path: Path, facts: dict[str, Any]) -> Packed:
    whole = _polars().scan_parquet(path, glob=False)
    table = whole.drop("sketch").collect()
    order = np.argsort(table["line"].fill_null(0).to_numpy(), kind="stable")
    if (table["line"].fill_null(0).to_numpy()[order] != np.arange(1, len(table) + 1)).any():
        raise _UnfitError("lines are missing, or there twice")

    def sketches(start: int, count: int) -> Column:
        return whole.select("sketch").slice(start, count).collect()["sketch"]

    columns = _columns(table, sketches, int(facts["sketch_size"]), path.name)
    if _digest(columns) != facts.get("digest"):
        raise _UnfitError("its digest is not that of its columns")
    known = table["raw"].is_not_null().to_numpy()
    if not (known | (columns.rows["taken"] == 1)).all():
        raise _UnfitError("a line that is neither there nor in the columns")
    raw = zip(np.flatnonzero(known).tolist(), table["raw"].drop_nulls().to_list(), strict=True)
    return Packed(columns, order, dict(raw), str(facts.get("sha256")))


def _columns(table: Table, sketches: Callable[[int, int], Column], size: int, name: str) -> Columns:
    """Return a table's records as columns; raises _UnfitError. Sketches, most of a file, come a group at a time."""
    words: dict[str, int] = {}
    known_hash = table["hash"].is_not_null().to_numpy()
    if any((table[name].is_null().to_numpy() & known_hash).any() for name in _KEYS):
        raise _UnfitError("a record without its key")
    rows: dict[str, Array] = {"taken": known_hash.astype(np.int32), "hash": table["hash"].fill_null(0).to_numpy()}
    rows["layer"] = table["layer"].fill_null(-1).to_numpy()
    rows |= {name: _codes(table[name], words) for name in WORDS}
    rows |= {name: table[name].fill_null(NONE).to_numpy() for name in INTEGERS}
    rows |= {name: table[name].fill_null(np.nan).to_numpy() for name in FLOATS}
    rows["sums"], sums = _sketches(sketches, len(table), size)
    hashes = _blobs(table["rows"], 0)
    lengths = (table["rows"].bin.size("b").fill_null(0).to_numpy() // 8).astype(np.int64)
    rows["rows"] = np.where(table["rows"].is_null().to_numpy(), -1, lengths).astype(np.int32)
    rows["rows_at"] = np.cumsum(lengths) - lengths
    rows["at"], rows["length"] = np.zeros(len(table), np.int64), np.zeros(len(table), np.int32)
    header, own = Header(prompt="", sketch_size=size), np.frombuffer(hashes, "<u8")
    return Columns(header, Rows.of_columns(rows), sums, own, list(words), (), name)


def _sketches(sketches: Callable[[int, int], Column], count: int, size: int) -> tuple[Array, Array]:
    """Return the number of each row's sketch, -1 where it has none, and the sketches, read a group at a time."""
    numbers, sums = np.full(count, -1, dtype=np.int32), np.empty((0, size))
    for start in range(0, count, GROUP):
        column = sketches(start, GROUP)
        known = column.is_not_null().to_numpy()
        if not known.any():
            continue
        more = np.frombuffer(_blobs(column, 8 * size), "<f8").reshape(-1, size)
        numbers[start : start + GROUP] = np.where(known, len(sums) + np.cumsum(known) - 1, -1)
        sums.resize((len(sums) + len(more), size), refcheck=False)
        sums[len(sums) - len(more) :] = more
    return numbers, sums


_KEYS = ("prompt", "phase", "arm", "tensor", "step")


def _check_schema(schema: Any) -> None:
    pl = _polars()
    wanted = {"line": pl.UInt32, **dict.fromkeys(WORDS, pl.Enum), "layer": pl.Int32, "hash": pl.UInt64,
              **dict.fromkeys(INTEGERS, pl.Int64), **dict.fromkeys(FLOATS, pl.Float64), "sketch": pl.Binary,
              "rows": pl.Binary, "raw": pl.Binary}  # fmt: skip
    found = dict(schema)
    odd = [name for name, kind in wanted.items() if name not in found or found[name].base_type() is not kind]
    if odd or found.keys() != wanted.keys():
        raise _UnfitError(
            f"columns {', '.join(odd or sorted(found.keys() - wanted.keys()))[:100]} are not those of the format"
        )


def _codes(series: Column, words: dict[str, int]) -> Array:
    """Return the number of each word, -1 where there is none; words that are new get one."""
    names = series.dtype.categories.to_list()
    table = np.array([*(words.setdefault(name, len(words)) for name in names), -1], dtype=np.int32)
    codes: Array = series.to_physical().cast(_polars().Int64).fill_null(len(names)).to_numpy()
    return np.asarray(table[codes])


def _blobs(series: Column, size: int) -> bytes:
    """Return all bytes of a column; raises _UnfitError where one is not of `size`, or of whole numbers."""
    lengths = series.bin.size("b").drop_nulls().to_numpy()
    if (lengths % 8).any() or (size and (lengths != size).any()):
        raise _UnfitError(f"{series.name} of the wrong size")
    return b"".join(series.drop_nulls().to_list())


def _digest(columns: Columns) -> str:
    """Return XXH3-128 of the columns as they are read: what a flipped bit changes."""
    digest, rows = xxhash.xxh3_128(), columns.rows
    taken = rows["taken"] == 1
    for name in ("taken", "hash", "layer", *INTEGERS, *FLOATS):
        digest.update(np.ascontiguousarray(rows[name][taken]).data)
    for name in WORDS:
        codes = rows[name][taken] + 1
        present = np.flatnonzero(np.bincount(codes, minlength=1))
        by_name = sorted(present.tolist(), key=lambda code: columns.words[code - 1] if code else "")
        ranks = np.zeros(len(columns.words) + 1, "<i4")
        ranks[by_name] = np.arange(len(by_name))
        digest.update(json.dumps([columns.words[code - 1] if code else None for code in by_name]).encode())
        digest.update(np.ascontiguousarray(ranks[codes]).data)
    digest.update(np.ascontiguousarray(columns.sums).data)
    digest.update(np.ascontiguousarray(columns.hashes).data)
    return digest.hexdigest()


def packed_columns(path: Path) -> Columns | None:
    """Return a complete trace as columns, as `scan.read_columns` does; None where it is to be read line by line.

    Raises TraceError and OSError as `read_packed` does.
    """
    try:
        columns = _Reading(path, read_packed(path)).columns()
    except GivenUpError:
        return None
    return None if breaks_a_must(columns) else columns


class _Reading:
    """The lines of a packed file that are no plain records, read by trace_file.py."""

    def __init__(self, path: Path, packed: Packed) -> None:
        self.packed, self.name = packed, path.with_suffix(".jsonl").name
        self.checks = Checks(self.name)
        self.events: list[Event] = []
        self.odd: dict[int, Record] = {}

    def columns(self) -> Columns:
        """Return the trace; raises GivenUpError."""
        found = self.packed.columns
        order = self.packed.order
        alone = np.flatnonzero(found.rows["taken"][order] == 0).tolist()
        if len(alone) > MAX_ODD or not alone or alone[0] != 0 or alone[-1] != len(order) - 1:
            raise GivenUpError
        for line in alone[:-1]:
            self._line(line + 1, int(order[line]))
        self._end(int(order[-1]), len(order) - 2 - len(self.events))
        header = self.checks.header
        if header is None or header.sketch_size != found.sums.shape[1]:
            raise GivenUpError
        sums = np.concatenate([found.sums, np.zeros((len(self.odd), header.sketch_size))]) if self.odd else found.sums
        parts = Parts(found.rows, sums, found.hashes, found.words)
        return columns_of(header, parts, self.odd, tuple(self.events), self.name)

    def _line(self, number: int, index: int) -> None:
        raw = self.packed.raw[index]
        item = self.checks.parse(number, raw)
        if isinstance(item, Problem | Footer) or self.checks.item(number, raw, item, self.checks.own_faults(item)):
            raise GivenUpError
        if isinstance(item, Event):
            self.events.append(item)
        elif isinstance(item, Record):
            self.odd[index] = item

    def _end(self, index: int, records: int) -> None:
        """Hold the last line to what `pack` has counted and digested."""
        raw = self.packed.raw[index]
        item = self.checks.parse(len(self.packed.order), raw)
        expected = Footer(records=records, events=len(self.events), sha256=self.packed.sha256)
        if item != expected or not raw.endswith(b"\n"):
            raise GivenUpError


def _not_packed(path: Path, measured: str) -> TraceError:
    return TraceError(
        "the packed trace cannot be read", where=path.name, measured=ascii(measured.partition("\n")[0])[:200],
        allowed="a whole file that `driftprobe pack` wrote",
        next_step="copy it again, or pack the traces that it was made from",
    )  # fmt: skip


def _polars() -> Any:
    try:
        import polars
    except ImportError as error:
        raise UsageError(
            "packed traces need polars", where="*.parquet", measured=str(error), allowed="polars installed",
            next_step="pip install -e '.[scale]', or unpack them where it is installed",
        ) from error  # fmt: skip
    return polars
