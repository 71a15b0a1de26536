"""Cells: every tap of every step, decode against prefill, by its floor and by what sees below it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from driftprobe.compare import Drift, Pair, PayloadSource
from driftprobe.floor import Floor, Floors
from driftprobe.judgement import Cell, Status
from driftprobe.local import LOCAL_LIMIT, Bench, Place, bench, own_rounding
from driftprobe.matched import Match, match_filters
from driftprobe.products import replayed, unlike
from driftprobe.taps import CANDIDATE
from driftprobe.trace import Trace


def cells_of(
    pairs: Sequence[Pair], floors: Floors, trace: Trace, payloads: PayloadSource, *, asks: bool = True
) -> tuple[Cell, ...]:
    """Return the cells of pairs, in their order; an op is tested with the inputs of its own position.

    With `asks` they say whose matrices would tell more.
    """
    found: dict[int, Cell] = {}
    for here in _by_position(pairs):
        on = bench(trace, here, payloads)
        matches = by_place(match_filters(here, on))
        found.update({id(item): _cell(item, floors, on, matches.get(place_of(item)), asks) for item in here})
    return tuple(found[id(item)] for item in pairs)


def _by_position(pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
    """Return pairs as they stand, or, in mode `paths`, where one step holds many positions, those of each."""
    groups: dict[int | None, list[Pair]] = {}
    for item in pairs:
        many = item.candidate.phase == CANDIDATE
        groups.setdefault(item.reference.logical_tok_idx if many else None, []).append(item)
    return list(groups.values())


def _cell(item: Pair, floors: Floors, on: Bench, match: Match | None, asks: bool) -> Cell:
    record, floor = item.reference, floor_of(item, floors)
    local = own_rounding(item, on) or replayed(item, on)
    beyond = match is not None or (local is not None and local.excess > LOCAL_LIMIT)
    status = Status.FAIL if beyond else _status(item.drift, floor)
    return Cell(
        record.prompt, record.step, record.layer, record.tensor, item.drift, floor, status, record, item.candidate,
        local, match, unlike(item, on) if asks and local is None else None,
    )  # fmt: skip


def floor_of(item: Pair, floors: Floors) -> Floor:
    """Return the floor of a pair's tap."""
    return floors.by_place[(item.reference.layer, item.reference.tensor)]


def _status(drift: Drift, floor: Floor) -> Status:
    """A lower bound can fail a tap, if it is proven for the norm of the floor; it can never pass one."""
    if drift.at_least is None:
        return Status.UNKNOWN
    if drift.at_least > floor.limit:
        return Status.FAIL
    return Status.UNKNOWN if drift.lower_bound else Status.PASS


def by_place(matches: Iterable[Match]) -> dict[Place, Match]:
    """Return matches by the step, layer and tensor where each acts first."""
    return {(match.step, match.layer, match.tensor): match for match in matches}


def place_of(item: Pair) -> Place:
    """Return the step, layer and tensor of a pair."""
    return (item.reference.step, item.reference.layer, item.reference.tensor)
