"""Cuts what two engines keep of different positions down to the positions of both, for driftprobe compare.

One engine pads its cache, another drops what has left its window: rows of `k_cache` and `v_cache`, and keys of
`attn_scores` and `attn_probs`, are then of other positions on the two sides. They are paired by position. What one side
has beyond that is told, and may be left over only where it has no weight: a masked score, a probability of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from driftprobe.compare import PayloadSource, other_extent, rows_axis, same_shape
from driftprobe.fingerprint import Array, fields_and_rows, to_float64
from driftprobe.taps import CACHE_TAPS, execution_order, place
from driftprobe.trace import LEFT_OUT, Event, Record

Place = tuple[int | None, str, int | None]
"""Layer, tensor, position of the token."""
Rows = Mapping[Place, Record]
_HIDDEN = {"attn_scores": -np.inf, "attn_probs": 0.0}
"""What a key holds that nobody sees."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Absolute positions from `first` up to `last`, which is not among them."""

    first: int
    last: int

    @property
    def size(self) -> int:
        """How many positions it holds."""
        return self.last - self.first

    def within(self, whole: Extent) -> slice:
        """Return where these positions stand in a tensor that holds those of `whole`."""
        return slice(self.first - whole.first, self.last - whole.first)


def extent(record: Record) -> Extent | None:
    """Return the positions that a record has a row or a key for; None for a tap without any, or without a shape."""
    axis = rows_axis(record.tensor)
    if axis is None or not record.shape:
        return None
    return Extent(record.row_start, record.row_start + record.shape[axis])


def alike(one: Record, other: Record) -> bool:
    """Whether two records hold the same positions in the same shape."""
    return same_shape(one, other) and (one.shape is None or other.shape is None or extent(one) == extent(other))


@dataclass
class Cuts:
    """What is to be cut at each place, and what is left over or cannot be cut."""

    to: dict[Place, Extent] = field(default_factory=dict)
    seen: set[Place] = field(default_factory=set)
    """Places where one side gives weight to keys that the other has not: compared whole, which fails."""
    over: dict[tuple[str, str], dict[Place, int]] = field(default_factory=dict)
    """(side, what) -> rows or keys that this side alone has, by place."""
    untold: dict[str, list[Place]] = field(default_factory=dict)
    """Why it cannot be cut -> places."""

    def events(self) -> Iterator[Event]:
        """Yield what is left over, and what could not be compared."""
        for (side, what), counts in self.over.items():
            yield _event(f"{LEFT_OUT}{what} that the {side} alone has", counts)
        for reason, places in self.untold.items():
            yield _event(f"{LEFT_OUT}{reason}", dict.fromkeys(places, 1))


def _event(words: str, counts: Mapping[Place, int]) -> Event:
    """Return an event that counts by layer and tap, in execution order."""
    measured: dict[str, int] = {}
    for layer, tensor, at in sorted(counts, key=lambda where: execution_order(where[0], where[1])):
        name = place(layer, tensor)
        measured[name] = measured.get(name, 0) + counts[(layer, tensor, at)]
    return Event(event=words, arm="D", measured=measured)


NOT_KEPT = "the two sides keep other rows, and whole tensors (--payload all) of both are needed to cut them"
BY_HASH = "the two sides keep other rows; those of both are equal by their hashes"
APART = "the two sides keep rows of no common position"
NO_CONTROL = "controls of other rows, whose whole tensors were not kept"


def find_cuts(mine: Rows, theirs: Rows, payloads: tuple[PayloadSource, PayloadSource]) -> Cuts:
    """Return how the two sides' records of other positions become comparable, the reference's first."""
    cuts = Cuts()
    for where in sorted(mine.keys() & theirs.keys(), key=lambda w: (*execution_order(w[0], w[1]), w[2] or 0)):
        both = mine[where], theirs[where]
        if not alike(*both) and (same_shape(*both) or other_extent(*both)):
            _find_cut(where, both, payloads, cuts)
    return cuts


def _find_cut(where: Place, both: tuple[Record, Record], payloads: tuple[PayloadSource, PayloadSource],
              cuts: Cuts) -> None:  # fmt: skip
    extents = tuple(whole for record in both if (whole := extent(record)) is not None)
    common = Extent(max(e.first for e in extents), min(e.last for e in extents))
    if common.size <= 0:
        cuts.untold.setdefault(APART, []).append(where)
        return
    arrays = tuple(a for r, p in zip(both, payloads, strict=True) if (a := p.get(r)) is not None)
    if len(arrays) < len(both):
        cuts.untold.setdefault(BY_HASH if _equal_rows(both, common) else NOT_KEPT, []).append(where)
        return
    if not all(_unseen(r, a, common) for r, a in zip(both, arrays, strict=True)):
        cuts.seen.add(where)
        return
    cuts.to[where] = common
    for side, held in zip(("reference", "candidate"), extents, strict=True):
        if held.size > common.size:
            what = "rows" if where[1] in CACHE_TAPS else "keys without weight"
            cuts.over.setdefault((side, what), {})[where] = held.size - common.size


def _equal_rows(both: tuple[Record, Record], common: Extent) -> bool:
    hashes = [r.rows[common.within(Extent(r.row_start, r.row_start + len(r.rows)))] for r in both if r.rows]
    return len(hashes) == len(both) and hashes[0] == hashes[1] and both[0].dtype == both[1].dtype


def _unseen(record: Record, array: Array, common: Extent) -> bool:
    """Whether what stands outside the common positions has no weight; of cache rows their scores tell."""
    held = extent(record)
    if record.tensor not in _HIDDEN or held is None:
        return True
    outside = np.ones(held.size, dtype=bool)
    outside[common.within(held)] = False
    return bool((to_float64(array)[..., outside] == _HIDDEN[record.tensor]).all())


class OneTensor:
    """A payload source that has one tensor, whatever it is asked for."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def get(self, record: Record) -> Array:
        """Return the tensor."""
        return self.array


def can_cut(record: Record, to: Extent) -> bool:
    """Whether a record holds all of these positions."""
    held = extent(record)
    return held is not None and held.first <= to.first and to.last <= held.last


def cut(record: Record, array: Array, to: Extent, sketch_size: int) -> tuple[Record, Array]:
    """Return a record and its whole tensor with the rows or keys of these positions alone, fingerprinted anew."""
    held, axis = extent(record), rows_axis(record.tensor)
    assert held is not None
    assert axis is not None
    kept = np.ascontiguousarray(array[to.within(held)] if axis == 0 else array[..., to.within(held)])
    found, rows = fields_and_rows(kept, sketch_size, rows=record.tensor in CACHE_TAPS)
    return replace(record, **found, rows=rows, row_start=to.first), kept
