"""judge(): from traces to verdicts. Gates first, then the floor, the first failure and the 2×2 reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from driftprobe.cells import cells_of
from driftprobe.climb import climb, in_words
from driftprobe.compare import Pair, Pairing, PayloadSource, by_arm, pair_arms
from driftprobe.failures import Guilt, failures_of, guilty
from driftprobe.floor import (
    LIMIT,
    Controls,
    Floors,
    innocent,
    is_control,
    measure_floors,
    repeated,
)
from driftprobe.gates import Evidence, measure_determinism, pass_gates
from driftprobe.impact import measure_impact, worst_impact
from driftprobe.judgement import (
    Cell,
    Failure,
    Gate,
    Judgement,
    LeftOut,
    Limits,
    Reading,
    Status,
    TraceJudgement,
    Verdict,
)
from driftprobe.modes import attention_sums, judge_mode, pool_limits, worst_of
from driftprobe.rows import check_rows, keys_beside_values
from driftprobe.scores import pass_shifts, without_shifts
from driftprobe.taps import execution_order, place
from driftprobe.ties import Settled, settle, without_flips
from driftprobe.trace import CONSTANTS, COST, Trace

_COMPARED = ("P", "D", "A", "T")
"""The arms that a verdict is about; all others are controls, or the model's constants."""
MODES = ("as_designed", "kv_aligned")


Ready = Mapping[str, TraceJudgement]
"""Judgements of traces that were judged before (`judge_thinned`), by the name of their file."""


def judge(traces: Sequence[Trace], payloads: PayloadSource, ready: Ready | None = None) -> Judgement:
    """Return the judgement of all traces of a folder: MISMATCH before N/A before STRUCTURAL_DRIFT before NO_DRIFT."""
    judged = [_climbed(trace, traces, payloads, ready or {}) for trace in base_traces(traces)]
    names = [m for m in MODES if any(j.mode == m for j in judged)]
    names += sorted({j.mode for j in judged} - set(MODES))
    modes = {name: judge_mode(name, [j for j in judged if j.mode == name]) for name in names}
    verdict = worst_of(mode.verdict for mode in modes.values())
    deciding = next((m for m in reversed(modes.values()) if m.verdict is verdict), None)
    return Judgement(
        verdict=verdict,
        reason=deciding.reason if deciding else "no trace to judge",
        modes=modes,
        limits=pool_limits(mode.limits for mode in modes.values()),
        impact=worst_impact(mode.impact for mode in modes.values()),
    )


def base_traces(traces: Sequence[Trace]) -> tuple[Trace, ...]:
    """Return the runs themselves, without those of a ladder; a rung whose run is missing stands for itself."""
    own = {(t.header.mode, t.header.prompt) for t in traces if not t.header.rung}
    return tuple(t for t in traces if not t.header.rung or (t.header.mode, t.header.prompt) not in own)


def _climbed(trace: Trace, traces: Sequence[Trace], payloads: PayloadSource, ready: Ready) -> TraceJudgement:
    """Return the judgement of one prompt in one mode, with the rung of the ladder that belongs to it."""
    judged = ready.get(trace.path) or judge_trace(trace, payloads)
    mine = (trace.header.mode, trace.header.prompt)
    rung = next(
        (t for t in traces if t.header.rung and t is not trace and (t.header.mode, t.header.prompt) == mine), None
    )
    if rung is None:
        return judged
    took = next((e.measured.get("milliseconds") for e in rung.events if e.event == COST), None)
    above = ready.get(rung.path) or judge_trace(rung, payloads)
    return climb(judged, above, rung.header.rung, None if took is None else took / 1000)


def judge_trace(trace: Trace, payloads: PayloadSource) -> TraceJudgement:
    """Return the judgement of one prompt in one mode."""
    arms, names = by_arm(trace), {record.arm for record in trace.records}
    controls = {arm: pair_arms(arms, repeated(arm), arm, payloads).matched for arm in sorted(filter(is_control, names))}
    forced = pair_arms(arms, "P", "T", payloads).matched if "T" in names else ()
    decode = pair_arms(arms, "P", "D", payloads)
    aligned = pair_arms(arms, "P", "A", payloads) if "A" in names else Pairing((), (), ())
    return _judged(_weigh(Pairs(trace, decode, aligned, controls, forced), payloads), payloads)


def judge_thinned(pairs: Pairs, payloads: PayloadSource) -> TraceJudgement | None:
    """Return the judgement of a trace from the pairs that answer for it; None where all of it has to be looked at.

    That is where anything fails, a gate is shut, a tie flips, or a control is not fully explained: those rules look at
    other pairs than the one that drifts most.
    """
    weighed = _weigh(pairs, payloads)
    controls = [item for found in weighed.controls.values() for item in found]
    as_found = sum(map(len, pairs.controls.values()))
    if len(controls) != as_found or not all(innocent(item, weighed.floors) for item in controls):
        return None
    judged = _judged(weighed, payloads)
    cells = (*judged.cells, *judged.aligned_cells)
    quiet = all(gate.passed for gate in judged.gates) and not judged.failures and not judged.flips
    small = all(cell.drift.value is None or cell.drift.value <= cell.floor.limit for cell in cells)
    return judged if quiet and small and judged.reading is not Reading.HARNESS else None


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of every arm of a trace: all of them, or those that answer for the others."""

    trace: Trace
    decode: Pairing
    aligned: Pairing
    controls: Controls
    forced: tuple[Pair, ...] = ()
    left_out: LeftOut | None = None


@dataclass(frozen=True, slots=True)
class _Weighed:
    """Pairs with the floors that they set: `controls` without what a tie flip or a shift explains."""

    pairs: Pairs
    controls: Controls
    floors: Floors
    alone: dict[str, list[Guilt]]


def _weigh(pairs: Pairs, payloads: PayloadSource) -> _Weighed:
    header, controls = pairs.trace.header, pairs.controls
    both = (*pairs.decode.matched, *pairs.aligned.matched)
    alone = guilty(pairs.trace, controls, payloads)
    floors = measure_floors(header, both, controls, frozenset(alone))
    before, controls = controls, without_flips(controls, floors.bounds, payloads)
    floors = floors if _same(before, controls) else measure_floors(header, both, controls, frozenset(alone))
    before, controls = controls, without_shifts(controls, floors)
    floors = floors if _same(before, controls) else measure_floors(header, both, controls, frozenset(alone))
    return _Weighed(pairs, controls, floors, alone)


def _same(before: Controls, after: Controls) -> bool:
    """Whether no pair was taken out of any control."""
    return all(len(before[arm]) == len(pairs) for arm, pairs in after.items())


def _judged(weighed: _Weighed, payloads: PayloadSource) -> TraceJudgement:
    pairs, floors, controls = weighed.pairs, weighed.floors, weighed.controls
    trace, left_out = pairs.trace, pairs.left_out
    rounds = not trace.header.rung or bool(trace.header.engine.casts)  # at a rung without casts no near tie flips
    settled = settle(pairs.decode.matched, pairs.forced, floors.by_place, payloads, earlier=rounds)
    behind = settle(pairs.aligned.matched, (), floors.by_place, payloads)
    cells, aligned_cells = (
        pass_shifts(cells_of(found.pairs, floors, trace, payloads, asks=found is settled))
        for found in (settled, behind)
    )
    cells = keys_beside_values(cells, payloads)
    strangers = tuple(r for r in trace.records if r.arm not in (*_COMPARED, CONSTANTS) and not is_control(r.arm))
    evidence = Evidence(trace, pairs.decode, pairs.aligned, strangers, controls, floors, cells, left_out)
    gates = pass_gates(evidence)
    failures = failures_of(cells, controls, floors, weighed.alone, ties=rounds)
    shut = any(not gate.passed for gate in gates)
    reading = Reading.NONE if shut else _reading(cells, aligned_cells)
    verdict, reason = _decide(gates, cells, failures, reading, settled, left_out)
    return TraceJudgement(
        mode=trace.header.mode,
        prompt=trace.header.prompt,
        verdict=verdict,
        reason=reason,
        gates=gates,
        cells=cells,
        aligned_cells=aligned_cells,
        unpaired=evidence.unpaired,
        failures=failures,
        reading=reading,
        rows=check_rows(trace, cells, payloads),
        determinism=measure_determinism(controls),
        impact=measure_impact(cells, payloads),
        limits=_limits(cells),
        controls=_largest(controls),
        engine=trace.header.engine,
        token_ids=trace.header.token_ids,
        prompt_len=trace.header.prompt_len,
        foreign=trace.foreign,
        file=trace.path,
        flips=settled.flips,
        matches=tuple(cell.match for cell in cells if cell.match is not None),
        attention=attention_sums(trace) if left_out is None else left_out.attention,
        left_out=left_out,
    )


def _reading(cells: Sequence[Cell], aligned: Sequence[Cell]) -> Reading:
    """Return the 2×2 reading; none where a side neither fails nor is known to agree."""
    decode_fails, aligned_fails = _fails(cells), _fails(aligned)
    if decode_fails is None or aligned_fails is None:
        return Reading.NONE
    if decode_fails:
        return Reading.COMPUTATION if aligned_fails else Reading.CONTENTS
    return Reading.HARNESS if aligned_fails else Reading.H0


def _fails(cells: Sequence[Cell]) -> bool | None:
    statuses = {cell.status for cell in cells}
    if Status.FAIL in statuses:
        return True
    return False if statuses == {Status.PASS} else None


def _decide(
    gates: Sequence[Gate],
    cells: Sequence[Cell],
    failures: Sequence[Failure],
    reading: Reading,
    settled: Settled,
    left_out: LeftOut | None,
) -> tuple[Verdict, str]:
    shut = next((gate for gate in gates if not gate.passed), None)
    if shut is not None:
        return Verdict.NOT_AVAILABLE, f"gate '{shut.name}': {shut.detail}"
    if failures:
        return Verdict.MISMATCH, in_words(failures[0])
    if reading is Reading.HARNESS:
        return Verdict.NOT_AVAILABLE, reading.words
    unknown = [cell for cell in cells if cell.status is Status.UNKNOWN]
    count, untold = len(cells), len(unknown)
    if left_out is not None:
        count, untold = count + left_out.pairs, untold + left_out.unknown
    if unknown:
        return Verdict.NOT_AVAILABLE, (
            f"{untold} of {count} pairs differ by an amount that the trace cannot tell "
            f"(first {place(unknown[0].layer, unknown[0].tensor)}); hashes show that, sketches would show how much"
        )
    if settled.flips:
        words = settled.flips[0].words
        if not settled.aligned:
            return Verdict.NOT_AVAILABLE, f"{words}; nothing behind it can be compared without arm T"
        if not settled.flips[0].told:
            return Verdict.NOT_AVAILABLE, (
                f"{words}: a near tie or a wrong choice, which a run without rounding can tell (--ladder on)"
            )
        return Verdict.STRUCTURAL_DRIFT, f"{words}; with routing aligned every drift is within {LIMIT:g} × its floor"
    if all(cell.drift.equal for cell in cells):
        return Verdict.NO_DRIFT, f"all {count} pairs are bit for bit equal"
    largest = max(cells, key=lambda cell: cell.excess or 0.0)
    return Verdict.STRUCTURAL_DRIFT, (
        f"largest excess {largest.excess:.2g} × floor, at {place(largest.layer, largest.tensor)}; limit {LIMIT:g}"
    )


def _limits(cells: Sequence[Cell]) -> Limits | None:
    """Return the limits over the taps whose drift could have been sized; hashes and norms alone size none.

    Of equal floors the first tap in order of execution is named, whatever its step: a floor has none.
    """
    judged = [cell for cell in cells if cell.tensor != "embed" and cell.reference.sketch and cell.candidate.sketch]
    if not judged:
        return None
    judged.sort(key=lambda cell: execution_order(cell.layer, cell.tensor, cell.reference.order))
    low, high = (f(judged, key=lambda cell: cell.floor.value) for f in (min, max))
    return Limits(low.floor.limit, _at(low), high.floor.limit, _at(high))


def _at(cell: Cell) -> str:
    return f"{place(cell.layer, cell.tensor)} of {cell.prompt}"


def _largest(controls: Controls) -> dict[str, float]:
    """Return each control's largest drift; an arm that differs by amounts that cannot be told is left out."""
    found = {arm: [p.drift.value for p in pairs if p.drift.value is not None] for arm, pairs in controls.items()}
    return {arm: max(drifts) for arm, drifts in found.items() if drifts}
