"""`--payload failing`: after a judgement, keep whole tensors only where something failed, and of the logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from driftprobe.fingerprint import Array
from driftprobe.judgement import Cell, Status, TraceJudgement
from driftprobe.payload import Payloads, write_payloads
from driftprobe.taps import CACHE_TAPS
from driftprobe.trace import CONSTANTS, Record, Trace, TraceWriter

_Where = tuple[int, int | None, str]


def prune_payloads(trace: Trace, judged: TraceJudgement, folder: Path) -> None:
    """Rewrite one trace and its payload files in place, without the payloads that no finding needs.

    An incomplete trace is left as it is: writing it again would give it a footer.
    """
    if trace.damage:
        return
    wanted = _wanted(judged)
    payloads = Payloads(folder)
    keep: dict[str, dict[str, Array]] = {}
    files: set[str] = set()
    records = []
    for record in trace.records:
        if record.payload is None:
            records.append(record)
            continue
        file, _, name = record.payload.partition("#")
        files.add(file)
        array = payloads.get(record) if _needed(record, wanted) else None
        if array is None:
            records.append(replace(record, payload=None))
        else:
            keep.setdefault(file, {})[name] = array
            records.append(record)
    for file in sorted(files):
        write_payloads(folder / file, keep[file]) if file in keep else (folder / file).unlink()
    partial = folder / f".{trace.path}.part"
    with TraceWriter(partial, trace.header) as writer:
        for record in records:
            writer.record(record)
        for event in trace.events:
            writer.event(event)
    partial.replace(folder / trace.path)


KEPT_FROM = 0.5
"""Share of its limit from which a drift keeps its whole tensors: a sketch in their place may err across the limit."""


def _wanted(judged: TraceJudgement) -> set[_Where]:
    """Return the places whose whole tensors are needed, to judge again as before and to diagnose the first failure.

    They are the failures and near ones; every tap of the layer that fails first, which holds the inputs of the failing
    op and what it is compared with; where a cache tap fails, K and V rows of all layers; and of a failure behind the
    layers what leads to it.
    """
    cells = (*judged.cells, *judged.aligned_cells)
    failing: set[_Where] = {(c.step, c.layer, c.tensor) for c in cells if c.status is Status.FAIL or _close(c)}
    caches = {step for step, _, tensor in failing if tensor in CACHE_TAPS}
    rows: set[_Where] = {(c.step, c.layer, c.tensor) for c in cells if c.tensor in CACHE_TAPS and c.step in caches}
    first = judged.failures[0] if judged.failures else None
    if first is None:
        return failing | rows
    last = max((c.layer for c in cells if c.layer is not None), default=None)
    near: set[_Where] = {(c.step, c.layer, c.tensor) for c in cells if c.step == first.step and c.layer == first.layer}
    return failing | rows | near | ({(first.step, last, "x_out")} if first.layer is None else set())


def _close(cell: Cell) -> bool:
    return cell.drift.value is not None and cell.drift.value > KEPT_FROM * cell.floor.limit


def _needed(record: Record, wanted: set[_Where]) -> bool:
    return record.arm == CONSTANTS or record.tensor == "logits" or (record.step, record.layer, record.tensor) in wanted
