"""`--payload failing`: after a judgement, keep whole tensors only where something failed, and of the logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from driftprobe.fingerprint import Array
from driftprobe.judgement import Cell, Failure, Status, TraceJudgement
from driftprobe.local import Ground
from driftprobe.payload import Payloads, write_payloads
from driftprobe.taps import BY_NAME, CACHE_TAPS, linear_taps
from driftprobe.trace import CONSTANTS, Record, Trace, encode_line
from driftprobe.trace_file import Line, TraceWriter, lines

_Where = tuple[int, int | None, str]


def prune_payloads(trace: Trace, judged: TraceJudgement, folder: Path) -> Trace:
    """Rewrite one trace and its payload files in place, without the payloads that no finding needs.

    Returns the trace as it is read from then on; the very one where it has nothing to lose, and nothing is written. An
    incomplete trace is left as it is too: writing it again would give it a footer.
    """
    if trace.damage:
        return trace
    wanted = _wanted(judged)
    payloads = Payloads(folder)
    keep: dict[str, dict[str, Array]] = {}
    files: set[str] = set()
    records: list[Record] = []
    for record in trace.records:
        if record.payload is None:
            records.append(record)
            continue
        file, _, name = record.payload.partition("#")
        files.add(file)
        array = payloads.get(record) if _needed(record, wanted) or _explains(record, judged) else None
        if array is None:
            records.append(replace(record, payload=None))
        else:
            keep.setdefault(file, {})[name] = array
            records.append(record)
    if all(new is old for new, old in zip(records, trace.records, strict=True)):
        return trace
    for file in sorted(files):
        write_payloads(folder / file, keep[file]) if file in keep else (folder / file).unlink()
    partial = folder / f".{trace.path}.part"
    with TraceWriter(partial, trace.header) as writer:
        writer.group(_kept_lines(folder / trace.path, trace.records, records))
        for event in trace.events:
            writer.event(event)
    partial.replace(folder / trace.path)
    return replace(trace, records=tuple(records))


def _kept_lines(path: Path, old: Sequence[Record], new: Sequence[Record]) -> Iterator[Line]:
    """Yield the lines of a trace's records as they stand in its file, less the payloads that go; they were read there.

    Where a line does not end in its payload's reference, as our writers put it, it is written anew.
    """
    raws = (raw for _, raw in lines(path) if raw is not None and raw.startswith(b'{"type":"record"'))
    for raw, before, after in zip(raws, old, new, strict=True):
        if after.payload == before.payload:
            yield Line(raw, after.prompt, after.key, [])
            continue
        reference = b',"payload":' + msgspec.json.encode(before.payload) + b"}\n"
        short = raw.removesuffix(reference) + b"}\n" if raw.endswith(reference) else encode_line("record", after)
        yield Line(short, after.prompt, after.key, [])


_BESIDE = {Ground.PRODUCT, Ground.ROTATION, Ground.VALUES}
"""Grounds of local tests that look at other tensors' values, not only at whether they are equal."""
KEPT_FROM = 0.5
"""Share of its limit from which a drift keeps its whole tensors: a sketch in their place may err across the limit."""


def _wanted(judged: TraceJudgement) -> set[_Where]:
    """Return the places whose whole tensors are needed to judge again as before.

    They are the failures and near ones, what a matched filter pooled, the inputs of both where their difference counts,
    where a cache tap fails K and V rows of all layers, and the rows that show an earlier token's tie flip. `_explains`
    adds what a diagnosis reads.
    """
    cells = (*judged.cells, *judged.aligned_cells)
    failing: set[_Where] = {(c.step, c.layer, c.tensor) for c in cells if c.status is Status.FAIL or _close(c)}
    failing |= {(f.step, f.layer, f.tensor) for f in judged.failures if f.local is not None}
    judging: tuple[Cell | Failure, ...] = (*cells, *judged.failures)
    tested = {(c.step, c.layer, c.tensor) for c in judging
              if c.local is not None and c.local.ground in _BESIDE}  # fmt: skip
    matches = (*judged.matches, *(failure.match for failure in judged.failures))
    pooled = {where for match in matches if match is not None for where in match.places}
    failing |= pooled | {given for where in pooled | (failing & tested) for given in _given(where, judged)}
    failing |= {(flip.step, flip.layer, tap) for flip in judged.flips if flip.earlier for tap in CACHE_TAPS}
    caches = {step for step, _, tensor in failing if tensor in CACHE_TAPS}
    return failing | {(c.step, c.layer, c.tensor) for c in cells if c.tensor in CACHE_TAPS and c.step in caches}


def _given(where: _Where, judged: TraceJudgement) -> Iterator[_Where]:
    """Yield where the inputs of an op may stand: what a filter or a local test takes off where they differ."""
    step, layer, tensor = where
    known = BY_NAME[tensor].inputs if tensor in BY_NAME else ()
    for name in dict.fromkeys((*linear_taps(tensor), *known)):
        last = judged.engine.layers - 1 if name == "x_out" else None
        yield (step, last if layer is None else layer, name)


def _close(cell: Cell) -> bool:
    return cell.drift.value is not None and cell.drift.value > KEPT_FROM * cell.floor.limit


def _needed(record: Record, wanted: set[_Where]) -> bool:
    """Logits tell the impact; a router's logits and choice, of few numbers, whether a near tie was flipped."""
    return (
        record.tensor in {"logits", "router_logits", "expert_ids"}
        or (record.step, record.layer, record.tensor) in wanted
    )


def _explains(record: Record, judged: TraceJudgement) -> bool:
    """Whether a diagnosis may read this tensor: the model's constants, the layer that fails first, what goes into it.

    A diagnosis made from the pruned trace must be the one that was made from the whole.
    """
    first = judged.first_failure
    if first is None:
        return False
    if record.arm == CONSTANTS:
        return True
    if record.arm not in {"P", "D", "A", first.arm}:
        return False
    if first.layer is None:
        return record.layer is None or record.layer == judged.engine.layers - 1
    return record.layer == first.layer or record.tensor == "embed"
