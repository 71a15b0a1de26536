"""judge(): from traces to verdicts. Gates first, then the floor, the first failure and the 2×2 reading."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from driftprobe.climb import climb, in_words
from driftprobe.compare import SCORES, Drift, Pair, Pairing, PayloadSource, pair
from driftprobe.floor import (
    LIMIT,
    Controls,
    Floor,
    Floors,
    innocent,
    is_control,
    is_extension,
    is_turned,
    measure_floors,
    repeated,
)
from driftprobe.gates import Evidence, measure_determinism, pass_gates
from driftprobe.impact import measure_impact, worst_impact
from driftprobe.judgement import (
    Attention,
    AttentionSums,
    Cell,
    Failure,
    Gate,
    Judgement,
    LeftOut,
    Limits,
    ModeJudgement,
    Range,
    Reading,
    Status,
    Sums,
    TraceJudgement,
    Verdict,
)
from driftprobe.local import LOCAL_LIMIT, Bench, Local, bench, own_rounding
from driftprobe.local import Place as StepPlace
from driftprobe.matched import Match, match_filters
from driftprobe.products import replayed, unlike
from driftprobe.rows import check_rows, keys_beside_values, kv_indicators
from driftprobe.scores import pass_shifts, without_shifts
from driftprobe.taps import CACHE_TAPS, CANDIDATE, ExecutionOrder, execution_order, place
from driftprobe.ties import Settled, settle, without_flips
from driftprobe.trace import CONSTANTS, COST, Record, Trace

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
    modes = {name: _judge_mode(name, [j for j in judged if j.mode == name]) for name in names}
    verdict = _worst(mode.verdict for mode in modes.values())
    deciding = next((m for m in reversed(modes.values()) if m.verdict is verdict), None)
    return Judgement(
        verdict=verdict,
        reason=deciding.reason if deciding else "no trace to judge",
        modes=modes,
        limits=_pool_limits(mode.limits for mode in modes.values()),
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
    controls = _controls(trace, payloads)
    forced = pair(trace, "P", "T", payloads).matched if any(r.arm == "T" for r in trace.records) else ()
    return _judged(_weigh(Pairs(trace, pair(trace, "P", "D", payloads), _aligned(trace, payloads), controls, forced),
                          payloads), payloads)  # fmt: skip


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
    alone: dict[str, list[_Guilt]]


def _weigh(pairs: Pairs, payloads: PayloadSource) -> _Weighed:
    header, controls = pairs.trace.header, pairs.controls
    both = (*pairs.decode.matched, *pairs.aligned.matched)
    alone = _guilty(pairs.trace, controls, payloads)
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
    cells, aligned_cells = (pass_shifts(_cells(found.pairs, floors, trace, payloads)) for found in (settled, behind))
    cells = keys_beside_values(cells, payloads)
    strangers = tuple(r for r in trace.records if r.arm not in (*_COMPARED, CONSTANTS) and not is_control(r.arm))
    evidence = Evidence(trace, pairs.decode, pairs.aligned, strangers, controls, floors, cells, left_out)
    gates = pass_gates(evidence)
    failures = _failures(cells, controls, floors, weighed.alone, ties=rounds)
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
        attention=_attention_sums(trace) if left_out is None else left_out.attention,
        left_out=left_out,
    )


def _aligned(trace: Trace, payloads: PayloadSource) -> Pairing:
    """Return A against P, or an empty pairing where A was not run."""
    if any(record.arm == "A" for record in trace.records):
        return pair(trace, "P", "A", payloads)
    return Pairing((), (), ())


def _controls(trace: Trace, payloads: PayloadSource) -> Controls:
    """Return every control's pairs, with the arm that it repeats."""
    arms = sorted(arm for arm in {record.arm for record in trace.records} if is_control(arm))
    return {arm: pair(trace, repeated(arm), arm, payloads).matched for arm in arms}


@dataclass(frozen=True, slots=True)
class _Guilt:
    """A pair of a control under its floor that rounding does not explain: by the local test, or a matched filter."""

    pair: Pair
    local: Local | None
    match: Match | None


def _guilty(trace: Trace, controls: Controls, payloads: PayloadSource) -> dict[str, list[_Guilt]]:
    """Return the controls in which an op differs by more than its own rounding, or all one way, and where."""
    found: dict[str, list[_Guilt]] = {}
    for arm, pairs in controls.items():
        if _is_held(arm):
            on = bench(trace, pairs, payloads)
            matches = _by_place(match_filters(pairs, on))
            tested = [_guilt(item, on, matches.get(_place_of(item))) for item in pairs]
            found[arm] = [guilt for guilt in tested if guilt is not None]
    return {arm: guilts for arm, guilts in found.items() if guilts}


def _guilt(item: Pair, on: Bench, match: Match | None) -> _Guilt | None:
    told = own_rounding(item, on)
    local = None if told is None or told.excess <= LOCAL_LIMIT else told
    return None if local is None and match is None else _Guilt(item, local, None if local is not None else match)


def _by_place(matches: Iterable[Match]) -> dict[StepPlace, Match]:
    return {(match.step, match.layer, match.tensor): match for match in matches}


def _place_of(item: Pair) -> StepPlace:
    return (item.reference.step, item.reference.layer, item.reference.tensor)


def _is_held(arm: str) -> bool:
    """Whether a control that rounding does not explain is a finding: a longer prefill, or a knob of the engine."""
    return is_extension(arm) or is_turned(arm)


def _cells(pairs: Sequence[Pair], floors: Floors, trace: Trace, payloads: PayloadSource) -> tuple[Cell, ...]:
    """Return the cells of pairs, in their order; an op is tested with the inputs of its own position."""
    found: dict[int, Cell] = {}
    for here in _by_position(pairs):
        on = bench(trace, here, payloads)
        matches = _by_place(match_filters(here, on))
        found.update({id(item): _cell(item, floors, on, matches.get(_place_of(item))) for item in here})
    return tuple(found[id(item)] for item in pairs)


def _by_position(pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
    """Return pairs as they stand, or, in mode `paths`, where one step holds many positions, those of each."""
    groups: dict[int | None, list[Pair]] = {}
    for item in pairs:
        many = item.candidate.phase == CANDIDATE
        groups.setdefault(item.reference.logical_tok_idx if many else None, []).append(item)
    return list(groups.values())


def _cell(item: Pair, floors: Floors, on: Bench, match: Match | None) -> Cell:
    record, floor = item.reference, _floor_of(item, floors)
    local = own_rounding(item, on) or replayed(item, on)
    beyond = match is not None or (local is not None and local.excess > LOCAL_LIMIT)
    status = Status.FAIL if beyond else _status(item.drift, floor)
    return Cell(
        record.prompt, record.step, record.layer, record.tensor, item.drift, floor, status, record, item.candidate,
        local, match, unlike(item, on) if local is None else None,
    )  # fmt: skip


def _floor_of(item: Pair, floors: Floors) -> Floor:
    return floors.by_place[(item.reference.layer, item.reference.tensor)]


def _status(drift: Drift, floor: Floor) -> Status:
    """A lower bound can fail a tap, if it is proven for the norm of the floor; it can never pass one."""
    if drift.at_least is None:
        return Status.UNKNOWN
    if drift.at_least > floor.limit:
        return Status.FAIL
    return Status.UNKNOWN if drift.lower_bound else Status.PASS


def _failures(
    cells: Sequence[Cell], controls: Controls, floors: Floors, alone: dict[str, list[_Guilt]], *, ties: bool
) -> tuple[Failure, ...]:
    """Return the failures of decode and of guilty controls: earliest step first, each step in execution order.

    At the same tap decode comes before its controls.
    """
    decode = [_of_cell(cell) for cell in cells if cell.status is Status.FAIL]
    guilty = [
        _failure(item, floors.bounds[(item.reference.layer, item.reference.tensor)], item.candidate.phase)
        for arm, pairs in controls.items()
        if _is_held(arm)
        for item in _beyond(pairs, floors, ties)
    ]
    known = {(f.arm, f.step, f.layer, f.tensor) for f in guilty}
    guilty += [
        replace(_failure(it.pair, _floor_of(it.pair, floors), it.pair.candidate.phase), local=it.local, match=it.match)
        for found in alone.values()
        for it in found
        if (it.pair.candidate.arm, *_place_of(it.pair)) not in known
    ]
    return tuple(sorted((*decode, *guilty), key=_order))


def _beyond(pairs: Sequence[Pair], floors: Floors, ties: bool) -> list[Pair]:
    """Return a control's pairs that rounding does not explain.

    None where rounding is large enough for near `ties`, and they begin with cache rows behind a choice of experts: an
    earlier token's tie, which nobody recorded, may have flipped there, and its rows are honestly others.
    """
    found = [item for item in pairs if not innocent(item, floors)]
    first = min(found, key=_pair_order, default=None)
    routed = min((_pair_order(item) for item in pairs if item.reference.tensor == "expert_ids"), default=None)
    flipped = ties and first is not None and first.reference.tensor in CACHE_TAPS and routed is not None
    return [] if flipped and first is not None and routed is not None and routed < _pair_order(first) else found


def _pair_order(pair: Pair) -> tuple[int, ExecutionOrder]:
    record = pair.reference
    return (record.step, execution_order(record.layer, record.tensor, record.order))


def _of_cell(cell: Cell) -> Failure:
    """Return a failing cell's failure, with the local test or the matched filter where the floor did not tell it."""
    failure = _failure(Pair(cell.reference, cell.candidate, cell.drift), cell.floor, cell.candidate.phase)
    if cell.beyond_floor:
        return failure
    if cell.local is not None and cell.local.excess > LOCAL_LIMIT:
        return replace(failure, local=cell.local)
    return replace(failure, match=cell.match)


def _order(failure: Failure) -> tuple[int, ExecutionOrder, bool]:
    return (failure.step, execution_order(failure.layer, failure.tensor, failure.order), failure.of_control)


def _failure(pair: Pair, floor: Floor, phase: str) -> Failure:
    record, drift = pair.candidate, pair.drift
    value = drift.at_least if drift.at_least is not None else math.nan
    return Failure(
        record.prompt, record.step, record.layer, record.tensor, value, floor.value, value / floor.value, phase,
        arm=record.arm, position=record.logical_tok_idx, order=record.order,
    )  # fmt: skip


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


def _pool_limits(found: Iterable[Limits | None]) -> Limits | None:
    known = [limits for limits in found if limits is not None]
    if not known:
        return None
    low, high = min(known, key=lambda x: x.smallest), max(known, key=lambda x: x.largest)
    return Limits(low.smallest, low.smallest_at, high.largest, high.largest_at)


def _largest(controls: Controls) -> dict[str, float]:
    """Return each control's largest drift; an arm that differs by amounts that cannot be told is left out."""
    found = {arm: [p.drift.value for p in pairs if p.drift.value is not None] for arm, pairs in controls.items()}
    return {arm: max(drifts) for arm, drifts in found.items() if drifts}


def _judge_mode(name: str, judged: Sequence[TraceJudgement]) -> ModeJudgement:
    verdict = _worst(item.verdict for item in judged)
    deciding = [item for item in judged if item.verdict is verdict]
    first = _first_of(judged)
    shown = max(deciding, key=_largest_excess, default=None)
    reason = in_words(first) if first is not None else f"{shown.prompt}: {shown.reason}" if shown is not None else ""
    cells = [cell for item in judged for cell in item.cells]
    return ModeJudgement(
        mode=name,
        verdict=verdict,
        reason=reason,
        prompts=tuple(judged),
        kv=kv_indicators([row for item in judged for row in item.rows], cells, _more_rows(judged)),
        attention=_attention(judged),
        impact=worst_impact(item.impact for item in judged),
        limits=_pool_limits(item.limits for item in judged),
        first_failure=first,
    )


def _more_rows(judged: Iterable[TraceJudgement]) -> list[tuple[str, int, int]]:
    known = (item.left_out.cache_rows for item in judged if item.left_out is not None)
    return [(tensor, *counts) for found in known for tensor, counts in found.items()]


def _first_of(judged: Sequence[TraceJudgement]) -> Failure | None:
    """Return a mode's first failure: earliest step, then tap; where prompts share it the longest's, with most rows."""
    found = [(item, item.first_failure) for item in judged]
    failing = [(item, failure) for item, failure in found if failure is not None]
    first = min(
        failing,
        key=lambda pair: (_order(pair[1]), -pair[0].prompt_len),
        default=None,
    )
    return None if first is None else first[1]


def _largest_excess(item: TraceJudgement) -> float:
    return max((cell.excess for cell in item.cells if cell.excess is not None), default=0.0)


_SEVERITY = (Verdict.NO_DRIFT, Verdict.STRUCTURAL_DRIFT, Verdict.NOT_AVAILABLE, Verdict.MISMATCH)


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=_SEVERITY.index, default=Verdict.NOT_AVAILABLE)


def _attention(judged: Sequence[TraceJudgement]) -> Attention:
    def pooled(tensor: str, arm: str) -> Range | None:
        return _range(item.attention.sums.get((tensor, arm), Sums()) for item in judged)

    return Attention(
        pre_softmax_prefill=pooled(SCORES, "P"),
        pre_softmax_decode=pooled(SCORES, "D"),
        post_softmax_prefill=pooled("attn_probs", "P"),
        post_softmax_decode=pooled("attn_probs", "D"),
        recomputed=any(item.attention.recomputed for item in judged),
    )


def _attention_sums(trace: Trace) -> AttentionSums:
    records = [record for record in trace.records if record.arm in {"P", "D"}]
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.tensor in {SCORES, "attn_probs"}:
            found.setdefault((record.tensor, record.arm), []).append(record)
    return AttentionSums(
        {key: _sums(mine) for key, mine in found.items()},
        recomputed=any(r.source == "recomputed" for r in records if r.tensor == SCORES),
    )


def _sums(records: Iterable[Record]) -> Sums:
    """Return extremes and sum of all finite elements; the sum is exact, so that no order of records changes it."""
    low, high, totals, count = math.inf, -math.inf, [], 0
    for r in records:
        if r.min is None or r.max is None or r.mean is None or not r.shape:
            continue
        finite = math.prod(r.shape) - (r.nan_count or 0) - (r.inf_count or 0)
        if finite:
            low, high = min(low, r.min), max(high, r.max)
            totals.append(r.mean * finite)
            count += finite
    return Sums(low, high, math.fsum(totals), count)


def _range(found: Iterable[Sums]) -> Range | None:
    """Return extremes and mean over all finite elements of several traces."""
    some = [sums for sums in found if sums.count]
    if not some:
        return None
    total, count = math.fsum(sums.total for sums in some), sum(sums.count for sums in some)
    return Range(min(sums.low for sums in some), max(sums.high for sums in some), total / count)
