"""The gates, in order. One that fails gives `N/A` with the reason, never a pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from driftprobe.compare import Pair, Pairing
from driftprobe.floor import Floors, innocent
from driftprobe.judgement import Cell, Determinism, Gate, Status
from driftprobe.taps import CACHE_TAPS, execution_order, place
from driftprobe.trace import Record, Trace

SHOWN = 3
"""How many culprits a gate names before it counts the rest."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the gates look at."""

    trace: Trace
    decode: Pairing
    """D against P."""
    controls: dict[str, tuple[Pair, ...]]
    floors: Floors
    cells: tuple[Cell, ...]


def pass_gates(evidence: Evidence) -> tuple[Gate, ...]:
    """Return every gate's outcome, in the order in which they count."""
    return (
        _complete(evidence.trace),
        _compared(evidence.decode),
        _paired(evidence.decode),
        _same_token(evidence.decode),
        _embed(evidence.trace),
        _deterministic(evidence),
        _fired(evidence.trace),
        _read_back(evidence.trace),
        _finite(evidence.cells),
        _plausible(evidence.cells),
    )


def measure_determinism(controls: dict[str, tuple[Pair, ...]]) -> Determinism:
    """Return what the repeated arms P' and D' say."""
    again = [pair for arm in ("P'", "D'") for pair in controls.get(arm, ())]
    drifts = [pair.drift.value for pair in again if pair.drift.value is not None]
    return Determinism(bool(again), all(pair.drift.equal for pair in again), max(drifts, default=0.0))


def _complete(trace: Trace) -> Gate:
    whole = "a trace without header or footer: whether it is whole is not known" if trace.foreign else "its footer fits"
    return Gate("complete", not trace.damage, trace.damage or whole)


def _compared(decode: Pairing) -> Gate:
    count = len(decode.matched)
    return Gate("compared", count > 0, f"{count} pairs of prefill and decode" if count else "nothing was compared")


def _paired(decode: Pairing) -> Gate:
    left = decode.unpaired
    detail = "every record has its partner" if not left else f"{len(left)} records without a partner: {_names(left)}"
    return Gate("paired", not left, detail)


def _same_token(decode: Pairing) -> Gate:
    different = [
        f"{place(p.reference.layer, p.reference.tensor)} step {p.reference.step}: token {_token(p.reference)} and "
        f"{_token(p.candidate)}"
        for p in decode.matched
        if _token(p.reference) != _token(p.candidate)
    ]
    return Gate("same token", not different, _listed(different) or "same token at the same position on both sides")


def _token(record: Record) -> tuple[int | None, int | None, int | None]:
    return (record.token_id, record.logical_tok_idx, record.pos_id)


def _embed(trace: Trace) -> Gate:
    by_step: dict[int, dict[str, str]] = {}
    for record in trace.records:
        if record.tensor == "embed" and record.phase != "prefill_row":
            by_step.setdefault(record.step, {})[f"{record.arm} {record.phase}"] = record.hash
    if not by_step:
        return Gate("aligned", True, "no embed tap: token and position only are known to agree")
    odd = []
    for step, hashes in by_step.items():
        expected = next((h for arm, h in hashes.items() if arm.startswith("P ")), next(iter(hashes.values())))
        odd += [f"embed of {arm} at step {step} is not prefill's" for arm, h in hashes.items() if h != expected]
    return Gate("aligned", not odd, _listed(odd) or "embed is bit-identical in all arms")


def _deterministic(evidence: Evidence) -> Gate:
    measured = measure_determinism(evidence.controls)
    if not measured.checked:
        return Gate("deterministic", True, "not checked: no arm was run twice")
    if measured.equal:
        return Gate("deterministic", True, "P = P' and D = D' bit for bit")
    again = [pair for arm in ("P'", "D'") for pair in evidence.controls.get(arm, ())]
    wild = [pair for pair in again if not innocent(pair, evidence.floors)]
    detail = f"run-to-run drift up to {measured.largest:.2e}"
    if not wild:
        return Gate("deterministic", True, f"{detail}, within rounding; it joins the floor")
    return Gate("deterministic", False, f"{detail}, more than rounding explains, first at {_pair_name(wild[0])}")


def _fired(trace: Trace) -> Gate:
    header = trace.header
    if not header.reads or not header.taps:
        return Gate("fired", True, "the trace names no plan to hold it to")
    seen = {(r.arm, r.phase, r.step, r.layer, r.tensor) for r in trace.records}
    missing = [
        f"{place(layer, tensor)} in arm {read.arm} step {read.step}"
        for read in header.reads
        for tensor, layers in header.taps.items()
        for layer in (layers or (None,))
        if (read.arm, read.phase, read.step, layer, tensor) not in seen
    ]
    return Gate("fired", not missing, _listed(missing) or "every planned tap was seen in every arm")


def _read_back(trace: Trace) -> Gate:
    checks = [event for event in trace.events if event.event == "cache_readback"]
    bad = [
        f"arm {e.arm} step {e.step}: {e.measured['different']} of {e.measured['rows']} rows differ"
        for e in checks
        if e.measured.get("different", 0)
    ]
    aligned = {(read.arm, read.step) for read in trace.header.reads if read.arm == "A"}
    unchecked = [f"arm {arm} step {step} was not read back" for arm, step in sorted(aligned)
                 if (arm, step) not in {(e.arm, e.step) for e in checks}]  # fmt: skip
    rows = sum(event.measured.get("rows", 0) for event in checks)
    good = f"{rows} aligned cache rows read back, all equal" if checks else "no aligned cache in this plan"
    return Gate("read back", not bad + unchecked, _listed(bad + unchecked) or good)


def _finite(cells: Sequence[Cell]) -> Gate:
    """Both sides non-finite before any failure: nothing can be compared there."""
    first_failure = min((_order(cell) for cell in cells if cell.status is Status.FAIL), default=None)
    broken = [
        f"{place(cell.layer, cell.tensor)} of {cell.prompt}, step {cell.step}"
        for cell in cells
        if _not_finite(cell.reference) and _not_finite(cell.candidate)
        if first_failure is None or _order(cell) < first_failure
    ]
    detail = f"NaN or infinity in both phases: {_listed(broken)}" if broken else "finite before any failure"
    return Gate("finite", not broken, detail)


def _not_finite(record: Record) -> bool:
    masks = record.tensor == "attn_scores"
    return bool(record.nan_count) or (bool(record.inf_count) and not masks)


def _plausible(cells: Sequence[Cell]) -> Gate:
    """A failing tap all of whose successors are bit-equal was not on the path: the probe, not the engine."""
    odd = []
    for step in sorted({cell.step for cell in cells}):
        row = sorted((cell for cell in cells if cell.step == step), key=_order)
        last_different = max((i for i, cell in enumerate(row) if not cell.drift.equal), default=-1)
        if 0 <= last_different < len(row) - 1:
            cell = row[last_different]
            if cell.status is Status.FAIL and cell.tensor not in CACHE_TAPS and not _reordered(cell, row):
                size = "" if cell.drift.value is None or math.isinf(cell.drift.value) else f" of {cell.drift.value:.1e}"
                odd.append(f"drift{size} at {place(cell.layer, cell.tensor)} and everything after it bit-equal")
    return Gate("plausible", not odd, _listed(odd) or "no large drift stands upstream of bit-equal tensors")


def _reordered(cell: Cell, row: Sequence[Cell]) -> bool:
    """Scores over cache rows that are themselves in another order: attention does not depend on their order."""
    return cell.tensor in {"attn_scores", "attn_probs"} and any(
        other.tensor in CACHE_TAPS and other.layer == cell.layer and other.status is Status.FAIL for other in row
    )


def _order(cell: Cell) -> tuple[int, tuple[int, int, int, str]]:
    return (cell.step, execution_order(cell.layer, cell.tensor))


def _pair_name(pair: Pair) -> str:
    record = pair.candidate
    return f"{place(record.layer, record.tensor)} of arm {record.arm}, step {record.step}"


def _names(records: Sequence[Record]) -> str:
    return _listed([f"{place(r.layer, r.tensor)} ({r.arm or r.phase}, step {r.step})" for r in records])


def _listed(items: Sequence[str]) -> str:
    more = len(items) - SHOWN
    return "; ".join(items[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
