"""All traces of a folder, ours and strangers': the one way from files to `Trace`.

A stranger's trace is JSON Lines without a header: records of prompt, phase, layer, tensor and hash, and
little else (docs/trace-format.md, section "Strangers' traces"). Its files become one Trace for each prompt.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from driftprobe.errors import TraceError
from driftprobe.packed import ENDING, read_packed
from driftprobe.scan import read_columns
from driftprobe.taps import BY_NAME, Scope
from driftprobe.trace import EngineFacts, Header, Record, Trace
from driftprobe.trace_checks import json_object, name_fault, statistic_faults
from driftprobe.trace_file import Lines, Problem, lines, read_header, scan, too_long

DEFAULT_MODE = "as_designed"
ALIGNED_MODE = "kv_aligned"


@dataclass(frozen=True, slots=True)
class Loaded:
    """One trace, and where each of its records stands."""

    trace: Trace
    places: tuple[tuple[str, int], ...]
    """File and line of each of `trace.records`."""


@dataclass(frozen=True, slots=True)
class Survey:
    """All that a folder holds: the traces as far as they were understood, and everything wrong with them."""

    folder: Path
    """Where the traces lie: the folder that was asked for, or its `traces`."""
    loaded: tuple[Loaded, ...]
    problems: tuple[Problem, ...]
    files: tuple[str, ...]


Settle = Callable[[Path], "Trace | None"]
"""Returns a trace of ours by a shorter way than line by line; None where it is to be read so."""
ENDINGS = (".jsonl", ENDING)
"""How a trace's file ends: lines as they are, or packed."""


def read_at_once(path: Path) -> Trace | None:
    """Return a whole trace of ours that breaks no MUST, sooner than its lines are read one by one.

    None where it has to be read so; a packed one always has, which alone holds all of it to its digest. Raises OSError.
    """
    columns = None if path.suffix == ENDING else read_columns(path)
    return None if columns is None else columns.trace()


def load_traces(folder: Path, mode: str | None = None, settle: Settle | None = None) -> tuple[Trace, ...]:
    """Return all traces of a folder (or of its `traces`), sorted by mode and prompt.

    `mode` is the mode of strangers' traces, which do not say theirs; by default the folder's or file's name
    says `kv_aligned`, or it is `as_designed`. Raises TraceError for the first thing that breaks the format.
    """
    found = survey(folder, mode, settle or read_at_once)
    for problem in found.problems:
        raise problem.as_error()
    return tuple(entry.trace for entry in found.loaded)


def survey(folder: Path, mode: str | None = None, settle: Settle | None = None) -> Survey:
    """Read every trace of a folder and collect what is wrong; raises TraceError where nothing can be read."""
    where = traces_folder(folder)
    loaded: list[Loaded] = []
    loose: list[_Loose] = []
    problems: list[Problem] = []
    names = []
    for path in trace_files(where):
        names.append(path.name)
        found = _read(path, folder, mode or _mode_of(path), settle)
        problems += found.problems
        loaded += found.loaded
        loose += found.loose
    strangers, more = _assemble(loose)
    loaded = sorted(loaded + strangers, key=_by_mode_and_prompt)
    return Survey(where, tuple(loaded), (*problems, *more, *_twins(loaded)), tuple(names))


def _by_mode_and_prompt(entry: Loaded) -> tuple[str, str, str]:
    return (entry.trace.header.mode, entry.trace.header.prompt, entry.trace.path)


def traces_folder(folder: Path) -> Path:
    """Return where the traces of a folder lie: in its `traces` if that holds any, else in the folder itself.

    Raises TraceError where the folder is missing, cannot be listed, or holds no trace.
    """
    if not folder.is_dir():
        raise _no_traces("no such folder", folder, "a file" if folder.exists() else "nothing there")
    for place in (folder / "traces", folder):
        if place.is_dir() and trace_files(place):
            return place
    entries = len(list(folder.iterdir()))
    raise _no_traces("no trace in the folder", folder, f"{entries} entries, no *.jsonl or *{ENDING} file")


def trace_files(folder: Path) -> list[Path]:
    """Return the files of a folder that are traces by their names, sorted. Raises TraceError where it is not listed."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in ENDINGS)
    except OSError as error:
        raise _no_traces("the folder cannot be listed", folder, error.strerror or str(error)) from error


def _no_traces(what: str, folder: Path, measured: str) -> TraceError:
    return TraceError(
        what, where=str(folder), measured=measured,
        allowed=f"a folder of *.jsonl or *{ENDING} traces, or one with such a `traces`",
        next_step="check the path; `driftprobe run --out DIR` writes traces",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Loose:
    """A stranger's record, before the records of its prompt are brought together."""

    file: str
    line: int
    mode: str
    record: Record
    """Arm P or D; phase and step are not final."""
    said_step: int | None
    """K where the record itself says `decodeK`."""


@dataclass(frozen=True, slots=True)
class _File:
    problems: tuple[Problem, ...] = ()
    loaded: tuple[Loaded, ...] = ()
    loose: tuple[_Loose, ...] = ()


def _read(path: Path, root: Path, mode: str, settle: Settle | None) -> _File:
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            return _File((_whole(path, "the file leads out of the folder", "a link to another place",
                                 "files inside the folder", "copy the file into the folder"),))  # fmt: skip
        if not path.is_file():
            return _File((_whole(path, "not a file", "a folder or device", "a file", "move it elsewhere"),))
        settled = settle(path) if settle is not None else None
        if settled is not None:
            return _File(loaded=(Loaded(settled, ()),))
        return _read_lines(path, mode)
    except TraceError as error:
        return _File((_whole(path, error.what, error.measured, error.allowed, error.next_step),))
    except (OSError, RuntimeError) as error:  # RuntimeError: resolve() on a loop of links, before Python 3.13
        return _File((_whole(path, "the file cannot be read", str(error), "a readable file",
                             "check its permissions"),))  # fmt: skip


def _read_lines(path: Path, mode: str) -> _File:
    content = lines_of(path)
    foreign = _is_foreign(content())
    if foreign is None:
        return _File((_nothing(path),))
    return _read_foreign(path, content(), mode) if foreign else _read_ours(path, content())


def lines_of(path: Path) -> Callable[[], Lines]:
    """Return what gives the lines of a trace's file, as often as it is asked. Raises TraceError for a damaged pack."""
    if path.suffix != ENDING:
        return lambda: lines(path)
    return read_packed(path).lines


def header_of(path: Path) -> Header | None:
    """Return the header of a trace's file, or None where it has none. Raises TraceError for a damaged pack."""
    if path.suffix != ENDING:
        return read_header(path)
    return scan(path, itertools.islice(lines_of(path)(), 1)).header


def read_whole(folder: Path, trace: Trace) -> Trace:
    """Return a trace of a folder with all its records. Raises TraceError for anything that breaks the format."""
    path = next(path for path in trace_files(folder) if path.with_suffix(".jsonl").name == trace.path)
    whole = read_at_once(path)
    if whole is not None:
        return whole
    found = _read_lines(path, trace.header.mode)
    for problem in found.problems:
        raise problem.as_error()
    return found.loaded[0].trace


def _whole(path: Path, what: str, measured: str, allowed: str, mend: str) -> Problem:
    return Problem(path.name, 0, what, measured, allowed, mend)


def _nothing(path: Path) -> Problem:
    return _whole(path, "nothing in the file is a record", f"{path.stat().st_size} bytes, no record",
                  "one record or more", "remove the file, or run again")  # fmt: skip


def _is_foreign(content: Lines) -> bool | None:
    """Tell a stranger's trace by its first JSON object: it has no `type`. None where the file is blank."""
    seen = None
    for _, raw in content:
        if raw is None:
            return False
        if not raw.strip():
            continue
        seen = False
        try:
            return "type" not in json_object(raw)
        except ValueError:
            continue
    return seen


def _read_ours(path: Path, content: Lines) -> _File:
    found = scan(path, content)
    trace = found.trace(path.with_suffix(".jsonl").name)  # a packed trace keeps its name: reports are the same
    if trace is None:
        return _File(tuple(found.problems))
    if not trace.records and not trace.damage and not found.problems:
        return _File((_nothing(path),))
    places = tuple((path.name, number) for number, item in found.items if isinstance(item, Record))
    return _File(tuple(found.problems), (Loaded(trace, places),))


def _read_foreign(path: Path, content: Lines, mode: str) -> _File:
    problems: list[Problem] = []
    loose: list[_Loose] = []
    for number, raw in content:
        if raw is None:
            problems.append(too_long(path.name, number))
            break
        if not raw.strip():
            continue
        try:
            body = json_object(raw)
        except ValueError as error:
            what = "invalid JSON" if raw.endswith(b"\n") else "invalid JSON, the last line is cut"
            problems.append(Problem(path.name, number, what, str(error)[:200],
                                    "one JSON object a line (RFC 8259)",
                                    "mend or remove the line"))  # fmt: skip
            continue
        faults, found = _loose(path, body)
        problems += (Problem(path.name, number, *fault) for fault in faults)
        if found is not None and not faults:
            loose.append(_Loose(path.name, number, mode, *found))
    return _File(tuple(problems), (), tuple(loose))


_Faults = list[tuple[str, str, str, str]]
_KEPT = ("tensor", "hash", "token_id", "logical_tok_idx", "pos_id", "nz_count", "abs_sum")
"""Fields of a stranger's record that mean what ours mean; others are left unread."""
_PHASE = re.compile("prefill|prefill_last|decode([0-9]{1,9})?")
_LAYER = re.compile("-?[0-9]{1,9}")


def _loose(path: Path, body: dict[str, Any]) -> tuple[_Faults, tuple[Record, int | None] | None]:
    """Return a stranger's record, or what is wrong with it."""
    phase, prompt = body.get("phase"), body.get("prompt")
    phase = _phase_of(path) if phase is None else phase
    match = _PHASE.fullmatch(phase) if isinstance(phase, str) else None
    if match is None:
        measured = "no phase, and the file name gives none" if phase is None else ascii(phase)
        return [("unknown phase", measured[:200], "prefill, prefill_last, decode, decode0, decode1…",
                 "write `phase`, or call the file X_trace.jsonl or X_decode_trace.jsonl")], None  # fmt: skip
    said_step = int(match[1]) if match[1] else None
    arm = "D" if match[0].startswith("decode") else "P"
    fields = {name: body[name] for name in _KEPT if name in body}
    fields |= {"prompt": _prompt_of(path) if prompt is None else prompt, "phase": match[0], "arm": arm}
    try:
        record = msgspec.convert(fields | {"layer": _layer(body)}, Record)
    except (ValueError, msgspec.ValidationError) as error:
        return [("record does not fit the schema", str(error)[:200],
                 "the fields and types of docs/trace-format.md",
                 "correct the field named")], None  # fmt: skip
    faults = [fault for fault in [name_fault("prompt", record.prompt)] if fault] + statistic_faults(record)
    if not record.tensor or not record.hash:
        faults.append(("empty name", "tensor or hash", "one character or more", "name it"))
    return faults, (record, said_step)


def _layer(body: dict[str, Any]) -> int | None:
    """Return the layer, None outside the layers; raises ValueError for what is no layer."""
    layer, tensor = body.get("layer"), body.get("tensor")
    tap = BY_NAME.get(tensor) if isinstance(tensor, str) else None
    if isinstance(layer, str) and _LAYER.fullmatch(layer):
        layer = int(layer)
    if layer is None or layer == -1:
        return None
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"layer {layer!a}: expected a number from 0, -1 or null")
    return layer if tap is None or tap.scope is Scope.LAYER else None


_DECODE_FILE, _PREFILL_FILE = "_decode_trace", "_trace"


def _phase_of(path: Path) -> str | None:
    """Return the phase that a file's name gives; the decode ending is asked first: it ends in the other."""
    if path.stem.endswith(_DECODE_FILE):
        return "decode"
    return "prefill" if path.stem.endswith(_PREFILL_FILE) else None


def _prompt_of(path: Path) -> str:
    name = path.stem
    for ending in (_DECODE_FILE, _PREFILL_FILE, f"_{ALIGNED_MODE}", f"_{DEFAULT_MODE}"):
        name = name.removesuffix(ending) or name
    return name


def _mode_of(path: Path) -> str:
    """Return the mode that a name gives: the file's own first, then its folder's or the folder's above."""
    for mode in (ALIGNED_MODE, DEFAULT_MODE):
        if mode in path.stem:
            return mode
    folder = path.parent.resolve()
    return ALIGNED_MODE if ALIGNED_MODE in (folder.name, folder.parent.name) else DEFAULT_MODE


def _assemble(loose: Iterable[_Loose]) -> tuple[list[Loaded], list[Problem]]:
    """Bring the strangers' records together, one trace for each mode and prompt."""
    groups: dict[tuple[str, str], list[_Loose]] = {}
    for item in loose:
        groups.setdefault((item.mode, item.record.prompt), []).append(item)
    loaded, problems = [], []
    for (mode, prompt), items in groups.items():
        records = _placed(items)
        places = tuple((item.file, item.line) for item in items)
        steps = 1 + max(record.step for record in records)
        header = Header(prompt=prompt, mode=mode, steps=steps, engine=EngineFacts(name="unknown"))
        path = ", ".join(sorted({item.file for item in items}))
        loaded.append(Loaded(Trace(header, records, path=path, foreign=True), places))
        problems += _duplicates(records, places)
    return loaded, problems


def _placed(items: list[_Loose]) -> tuple[Record, ...]:
    """Give every record its final phase and step: prefill rows go with the decode step of their position."""
    steps = _steps([item for item in items if item.record.arm == "D"])
    positions = [item.record.logical_tok_idx for item in items if item.record.arm == "P"]
    # Where decode gives no position, the last prefill row is the one that a decode can be compared with.
    known = steps or {max((p for p in positions if p is not None), default=0): 0}
    placed = []
    for item in items:
        position = item.record.logical_tok_idx
        if item.record.arm == "D":
            step = (item.said_step or 0) if position is None else steps[position]
            placed.append(replace(item.record, phase=f"decode{step}", step=step))
        elif position is None or position in known:
            step = 0 if position is None else known[position]
            placed.append(replace(item.record, phase="prefill_last", step=step))
        else:
            placed.append(replace(item.record, phase="prefill_row", step=0))
    return tuple(placed)


def _steps(decodes: list[_Loose]) -> dict[int, int]:
    """Return the step of each decode position: what the records say if that is one to one, else the rank."""
    placed = [(item.record.logical_tok_idx, item.said_step) for item in decodes]
    ranks = {p: rank for rank, p in enumerate(sorted({p for p, _ in placed if p is not None}))}
    said = {(p, step) for p, step in placed if p is not None and step is not None}
    told = len({p for p, _ in said}) == len({step for _, step in said}) == len(said) == len(ranks)
    return dict(said) if told and all(step is not None for p, step in placed if p is not None) else ranks


def _duplicates(records: tuple[Record, ...], places: tuple[tuple[str, int], ...]) -> list[Problem]:
    seen: dict[object, tuple[str, int]] = {}
    found = []
    for record, (file, line) in zip(records, places, strict=True):
        first = seen.setdefault(record.key, (file, line))
        if first != (file, line):
            measured = f"{record.key}, first in {first[0]} on line {first[1]}"
            found.append(Problem(file, line, "duplicated key", measured,
                                 "one record for phase, layer, tensor and position",
                                 "remove one of the two, or write logical_tok_idx or decodeK"))  # fmt: skip
    return found


def _twins(loaded: list[Loaded]) -> list[Problem]:
    seen: dict[tuple[str, str, str], str] = {}
    found = []
    for trace in (entry.trace for entry in loaded):
        key = (trace.header.mode, trace.header.prompt, trace.header.rung)
        if key in seen:
            found.append(Problem(trace.path, 0, "two traces of the same prompt and mode",
                                 f"{key[1]}, {key[0]}: also in {seen[key]}",
                                 "one trace for each prompt and mode",
                                 "move one of the two into another folder"))  # fmt: skip
        seen.setdefault(key, trace.path)
    return found
