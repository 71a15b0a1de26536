"""Failures: the taps that arithmetic does not explain, of decode and of controls that are no innocents, in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from driftprobe.cells import by_place, floor_of, place_of
from driftprobe.compare import Pair, PayloadSource
from driftprobe.floor import Controls, Floor, Floors, innocent, is_extension, is_turned
from driftprobe.judgement import Cell, Failure, Status
from driftprobe.local import LOCAL_LIMIT, Bench, Local, bench, own_rounding
from driftprobe.matched import Match, match_filters
from driftprobe.taps import CACHE_TAPS, ExecutionOrder, execution_order
from driftprobe.trace import Trace


@dataclass(frozen=True, slots=True)
class Guilt:
    """A pair of a control under its floor that rounding does not explain: by the local test, or a matched filter."""

    pair: Pair
    local: Local | None
    match: Match | None


def guilty(trace: Trace, controls: Controls, payloads: PayloadSource) -> dict[str, list[Guilt]]:
    """Return the controls in which an op differs by more than its own rounding, or all one way, and where."""
    found: dict[str, list[Guilt]] = {}
    for arm, pairs in controls.items():
        if _is_held(arm):
            on = bench(trace, pairs, payloads)
            matches = by_place(match_filters(pairs, on))
            tested = [_guilt(item, on, matches.get(place_of(item))) for item in pairs]
            found[arm] = [guilt for guilt in tested if guilt is not None]
    return {arm: guilts for arm, guilts in found.items() if guilts}


def _guilt(item: Pair, on: Bench, match: Match | None) -> Guilt | None:
    told = own_rounding(item, on)
    local = None if told is None or told.excess <= LOCAL_LIMIT else told
    return None if local is None and match is None else Guilt(item, local, None if local is not None else match)


def _is_held(arm: str) -> bool:
    """Whether a control that rounding does not explain is a finding: a longer prefill, or a knob of the engine."""
    return is_extension(arm) or is_turned(arm)


def failures_of(
    cells: Sequence[Cell], controls: Controls, floors: Floors, alone: dict[str, list[Guilt]], *, ties: bool
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
        replace(_failure(it.pair, floor_of(it.pair, floors), it.pair.candidate.phase), local=it.local, match=it.match)
        for found in alone.values()
        for it in found
        if (it.pair.candidate.arm, *place_of(it.pair)) not in known
    ]
    return tuple(sorted((*decode, *guilty), key=step_order))


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


def step_order(failure: Failure) -> tuple[int, ExecutionOrder, bool]:
    """Return the sort key of a failure: step, tap in order of execution, decode before its controls."""
    return (failure.step, execution_order(failure.layer, failure.tensor, failure.order), failure.of_control)


def _failure(pair: Pair, floor: Floor, phase: str) -> Failure:
    record, drift = pair.candidate, pair.drift
    value = drift.at_least if drift.at_least is not None else math.nan
    return Failure(
        record.prompt, record.step, record.layer, record.tensor, value, floor.value, value / floor.value, phase,
        arm=record.arm, position=record.logical_tok_idx, order=record.order,
    )  # fmt: skip
