"""Tie flips: a choice of experts that rounding alone turns, and what is then compared in its stead.

Where two experts' logits are closer than rounding can move them, prefill and decode may honestly choose differently,
and everything behind is honestly different. It is compared with routing aligned: arm T is decode with prefill's choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from driftprobe.compare import Pair, PayloadSource
from driftprobe.fingerprint import Float64, sketch_signs, to_float64
from driftprobe.floor import Controls, Floor, is_extension, is_turned
from driftprobe.impact import rounding_of_difference
from driftprobe.judgement import TieFlip
from driftprobe.taps import CACHE_TAPS, ExecutionOrder, execution_order
from driftprobe.trace import Record

Place = tuple[int | None, str]
IDS, LOGITS = "expert_ids", "router_logits"


@dataclass(frozen=True, slots=True)
class Settled:
    """What is compared of one decode arm: its own pairs up to the first tie flip, arm T's from there on."""

    pairs: tuple[Pair, ...]
    flips: tuple[TieFlip, ...] = ()
    aligned: bool = True
    """Whether arm T stood in behind the first flip; without it nothing is compared there."""


def settle(
    pairs: Sequence[Pair],
    forced: Sequence[Pair],
    floors: dict[Place, Floor],
    payloads: PayloadSource,
    *,
    earlier: bool = False,
) -> Settled:
    """Return what is to be compared of a decode arm, with the flips in it that rounding explains.

    `forced` are arm T's pairs, or none. The first other choice that rounding does not explain ends the search: it is
    a failure where it stands. `earlier` allows for the choices of earlier tokens, which show in the cache alone: rows
    behind a router that fail in this arm and agree in arm T. It is not asked for where rounding is too small for ties.
    """
    first, at = _first_flip(pairs, floors, payloads), None
    if first is not None:
        at = (first.step, execution_order(first.layer, IDS))
    elif earlier:
        first, at = _earlier_flip(pairs, forced, floors)
    if first is None or at is None:
        return Settled(tuple(pairs))
    before = tuple(pair for pair in pairs if _order(pair) < at)
    if not forced:
        return Settled(before, (first,), aligned=False)
    found = [flip for flip in _flips(forced, floors, payloads) if isinstance(flip, TieFlip)]
    tied = {(flip.step, flip.layer) for flip in (first, *found)}
    behind = (pair for pair in forced if _order(pair) >= at)
    kept = tuple(
        pair for pair in behind
        if pair.reference.tensor != IDS or (pair.reference.step, pair.reference.layer) not in tied
    )  # fmt: skip
    return Settled(
        (*before, *kept), (first, *(flip for flip in found if (flip.step, flip.layer) > (first.step, first.layer)))
    )


def _earlier_flip(
    pairs: Sequence[Pair], forced: Sequence[Pair], floors: dict[Place, Floor]
) -> tuple[TieFlip, tuple[int, ExecutionOrder]] | tuple[None, None]:
    """Return the flip of an earlier token that the first failing cache rows show, and where; None where they do not."""
    first = min((pair for pair in pairs if _fails(pair, floors)), key=_order, default=None)
    if first is None or first.reference.tensor not in CACHE_TAPS:
        return None, None
    routed = any(pair.reference.tensor == IDS and _order(pair) < _order(first) for pair in pairs)
    with_choice = next((pair for pair in forced if _order(pair) == _order(first)), None)
    if not routed or with_choice is None or with_choice.drift.at_least is None or _fails(with_choice, floors):
        return None, None
    return TieFlip(first.reference.step, first.reference.layer, (), (), 0.0, 0.0, earlier=True), _order(first)


def _fails(pair: Pair, floors: dict[Place, Floor]) -> bool:
    floor, drift = floors.get((pair.reference.layer, pair.reference.tensor)), pair.drift.at_least
    return floor is not None and drift is not None and drift > floor.limit


def without_flips(controls: Controls, bounds: dict[Place, Floor], payloads: PayloadSource) -> Controls:
    """Return controls, each longer prefill and turned knob cut off at its first tie flip.

    Behind a flip nothing is expected to agree.
    """
    return {
        arm: settle(pairs, (), bounds, payloads).pairs if is_extension(arm) or is_turned(arm) else pairs
        for arm, pairs in controls.items()
    }


def _first_flip(pairs: Iterable[Pair], floors: dict[Place, Floor], payloads: PayloadSource) -> TieFlip | None:
    return next(iter(_flips(pairs, floors, payloads)), None)


def _flips(pairs: Iterable[Pair], floors: dict[Place, Floor], payloads: PayloadSource) -> Iterable[TieFlip | None]:
    """Yield each other choice of experts, in execution order: a flip, or None where rounding does not explain it."""
    by_place = {(p.reference.step, p.reference.layer, p.reference.tensor): p for p in pairs}
    for (step, layer, tensor), pair in sorted(by_place.items(), key=lambda item: _order(item[1])):
        if tensor == IDS and not pair.drift.equal:
            yield _flip(pair, by_place.get((step, layer, LOGITS)), floors, payloads)


def _flip(pair: Pair, router: Pair | None, floors: dict[Place, Floor], payloads: PayloadSource) -> TieFlip | None:
    """Return the flip of one choice, if the router's logits agree and rounding can turn what was turned."""
    layer = pair.reference.layer
    floor = floors.get((layer, LOGITS))
    if router is None or floor is None or router.drift.value is None or router.drift.value > floor.limit:
        return None
    logits = _numbers(router.reference, payloads)
    chosen, other = _numbers(pair.reference, payloads), _numbers(pair.candidate, payloads)
    if logits is None or chosen is None or other is None or not np.isfinite(logits).all():
        return None
    p, d = ({round(value) for value in ids} for ids in (chosen, other))
    left, came = tuple(sorted(p - d)), tuple(sorted(d - p))
    if not left or not came or max(p | d) >= logits.size or min(p | d) < 0:
        return None
    margin = float(max(logits[list(left)]) - min(logits[list(came)]))
    allowed = rounding_of_difference(router.reference, floor)
    if allowed is None or margin > allowed:
        return None
    return TieFlip(pair.reference.step, layer, left, came, margin, allowed)


def _numbers(record: Record, payloads: PayloadSource) -> Float64 | None:
    """Return a record's whole tensor, flat: its payload, or its sketch where that has a sum for each element."""
    array = payloads.get(record)
    if array is not None:
        return to_float64(array).reshape(-1)
    count = int(np.prod(record.shape)) if record.shape else 0
    if record.sketch is None or not 0 < count <= len(record.sketch):
        return None
    values: Float64 = np.asarray(record.sketch[:count]) * sketch_signs(0, count)
    return values


def _order(pair: Pair) -> tuple[int, ExecutionOrder]:
    return (pair.reference.step, execution_order(pair.reference.layer, pair.reference.tensor))
