"""Tie flips: a choice of experts that rounding alone turns, and what is then compared in its stead.

Where two experts' logits are closer than rounding can move them, prefill and decode may honestly choose differently,
and everything behind is honestly different. It is compared with routing aligned: arm T is decode with prefill's choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from driftprobe.compare import Pair, PayloadSource
from driftprobe.fingerprint import Float64, l2_norm, sketch_signs, to_float64
from driftprobe.floor import Controls, Floor, is_extension, is_turned
from driftprobe.impact import rounding_of_difference
from driftprobe.judgement import TieFlip
from driftprobe.rows import rows_as_numbers, rows_by_position
from driftprobe.taps import CACHE_TAPS, ExecutionOrder, execution_order
from driftprobe.trace import Record

Place = tuple[int | None, str]
_Order = tuple[int, ExecutionOrder]
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
    own, before_it = _first_flip(pairs, floors, payloads), None
    if earlier:
        before_it = _earlier_flip(pairs, forced, floors, payloads)
    starts = [((own.step, execution_order(own.layer, IDS)), own)] if own is not None else []
    starts += [before_it] if before_it is not None else []
    if not starts:
        return Settled(tuple(pairs))
    at, first = min(starts, key=lambda start: start[0])
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
    pairs: Sequence[Pair], forced: Sequence[Pair], floors: dict[Place, Floor], payloads: PayloadSource
) -> tuple[_Order, TieFlip] | None:
    """Return the flip of an earlier token that cache rows show up to the first failure of its step, and where.

    None where rows changed that such a flip does not explain: arm T has them too, or they belong to a token whose
    choice is recorded and was no near tie.
    """
    first = min((pair for pair in pairs if _fails(pair, floors)), key=_order, default=None)
    if first is None:
        return None
    upto = (p for p in pairs if p.reference.step == first.reference.step and _order(p) <= _order(first))
    for item in sorted((p for p in upto if p.reference.tensor in CACHE_TAPS), key=_order):
        changed = _changed_rows(item, floors, payloads)
        if changed.positions:
            with_choice = next((pair for pair in forced if _order(pair) == _order(item)), None)
            if with_choice is None or with_choice.drift.at_least is None or _fails(with_choice, floors):
                return None
            still = _changed_rows(with_choice, floors, payloads)
            if still.sized and still.positions & changed.positions:
                return None
            flip = _told_by(item, changed, pairs, floors, payloads)
            return None if flip is None else (_order(item), flip)
    return None


@dataclass(frozen=True, slots=True)
class _Changed:
    """Absolute positions of cache rows that are not prefill's."""

    positions: frozenset[int]
    sized: bool
    """Whether each is known to be beyond the limit; else they differ in some bit, and some of them are beyond it."""


def _changed_rows(pair: Pair, floors: dict[Place, Floor], payloads: PayloadSource) -> _Changed:
    p, d = (rows_as_numbers(record, payloads) for record in (pair.reference, pair.candidate))
    if p is None or d is None:
        ours, theirs = rows_by_position(pair.reference), rows_by_position(pair.candidate)
        differ = (at for at in ours.keys() & theirs.keys() if ours[at] != theirs[at])
        return _Changed(frozenset(differ if _fails(pair, floors) else ()), sized=False)
    limit = floors[(pair.reference.layer, pair.reference.tensor)].limit
    beyond = (at for at in p.keys() & d.keys() if l2_norm(d[at] - p[at]) > limit * l2_norm(p[at]))
    return _Changed(frozenset(beyond), sized=True)


def _told_by(
    rows: Pair, changed: _Changed, pairs: Sequence[Pair], floors: dict[Place, Floor], payloads: PayloadSource
) -> TieFlip | None:
    """Return the flip that changed rows of a cache tap, if each may be a flip's; some, where not all are known beyond.

    A decoded token has to have been a near tie at a layer before, with its router's logits within their limit. Of a
    prompt's token nobody recorded the choice: where a row needs one, the flip has no position and is not told.
    That of the step itself is no earlier one.
    """
    step, layer = rows.reference.step, rows.reference.layer
    by_place = {(p.reference.step, p.reference.layer, p.reference.tensor): p for p in pairs}
    choices = [p for p in pairs if p.reference.tensor == IDS and _before(p.reference.layer, layer)]
    if not choices:
        return None
    recorded = {p.reference.logical_tok_idx for p in choices}
    ties: dict[int | None, tuple[float, float]] = {}
    for choice in (p for p in choices if p.reference.step < step):
        tie = _near_tie(choice, by_place.get((choice.reference.step, choice.reference.layer, LOGITS)), floors, payloads)
        ties |= {choice.reference.logical_tok_idx: tie} if tie is not None else {}
    explained = [at for at in sorted(changed.positions) if at in ties or at not in recorded]
    if not explained or (changed.sized and len(explained) < len(changed.positions)):
        return None
    known = [at for at in explained if at in ties]
    position = known[0] if known and not (changed.sized and len(known) < len(explained)) else None
    margin, allowed = (0.0, 0.0) if position is None else ties[position]
    return TieFlip(step, layer, (), (), margin, allowed, earlier=True, position=position)


def _before(layer: int | None, other: int | None) -> bool:
    return layer is not None and other is not None and layer < other


def _near_tie(
    choice: Pair, router: Pair | None, floors: dict[Place, Floor], payloads: PayloadSource
) -> tuple[float, float] | None:
    """Return the margin of prefill's choice and what rounding may move it by, if that is enough to turn it.

    A choice that prefill's own logits turn down by more is no tie: it is wrong, or the logits alone do not make it.
    """
    known = _agreeing_logits(router, floors, payloads)
    chosen = _numbers(choice.reference, payloads)
    if known is None or chosen is None:
        return None
    logits, allowed = known
    ids = sorted({round(value) for value in chosen})
    others = np.delete(logits, ids) if ids and ids[0] >= 0 and ids[-1] < logits.size else logits[:0]
    margin = float(logits[ids].min() - others.max()) if others.size else np.inf
    return (margin, allowed) if abs(margin) <= allowed else None


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
    """Return the flip of one choice, if the router's logits agree and rounding can turn what was turned.

    Rounding turns either side's choice: an expert that either took against its own logits, by more, is no tie.
    """
    known = _agreeing_logits(router, floors, payloads)
    chosen, other = _numbers(pair.reference, payloads), _numbers(pair.candidate, payloads)
    if known is None or chosen is None or other is None:
        return None
    logits, allowed = known
    p, d = ({round(value) for value in ids} for ids in (chosen, other))
    left, came = tuple(sorted(p - d)), tuple(sorted(d - p))
    if not left or not came or max(p | d) >= logits.size or min(p | d) < 0:
        return None
    margins = logits[list(left)][:, None] - logits[list(came)]
    if np.abs(margins).max() > allowed:
        return None
    return TieFlip(pair.reference.step, pair.reference.layer, left, came, float(margins.max()), allowed)


def _agreeing_logits(
    router: Pair | None, floors: dict[Place, Floor], payloads: PayloadSource
) -> tuple[Float64, float] | None:
    """Return prefill's router logits and how far rounding moves a difference of two, if decode's are within limits."""
    floor = None if router is None else floors.get((router.reference.layer, LOGITS))
    if router is None or floor is None or router.drift.value is None or router.drift.value > floor.limit:
        return None
    logits, allowed = _numbers(router.reference, payloads), rounding_of_difference(router.reference, floor)
    return None if logits is None or allowed is None or not np.isfinite(logits).all() else (logits, allowed)


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


def _order(pair: Pair) -> _Order:
    return (pair.reference.step, execution_order(pair.reference.layer, pair.reference.tensor))
