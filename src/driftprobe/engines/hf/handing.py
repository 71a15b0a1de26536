"""Hands out what one call let us hear: in order of execution, and what is begun ahead while the call still runs."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import lru_cache
from itertools import groupby

import torch

from driftprobe.background import Begun
from driftprobe.engines.base import Ahead, Tapped
from driftprobe.engines.hf.heard import Heard, Place
from driftprobe.engines.hf.host import Transfer, to_array
from driftprobe.errors import EngineError
from driftprobe.plan import Read
from driftprobe.taps import BY_NAME, execution_order
from driftprobe.taps import place as place_in_words


class HandOut:
    """The tensors of one call on their way out.

    On a CPU a layer's tensors are given `ahead` as soon as the layer is done. On an accelerator nothing may wait for
    the device inside the call: they are copied to pinned memory behind it, and waited for once.
    """

    def __init__(
        self, heard: Heard, reads: Sequence[Read], ahead: Ahead | None, transfer: Transfer, promised: Container[Place]
    ) -> None:
        self.heard, self.reads, self.transfer, self.promised = heard, reads, transfer, promised
        self.ahead = ahead if transfer.immediate else None
        self._begun: dict[tuple[_Part, int], tuple[list[tuple[Place, torch.Tensor]], Begun[object]]] = {}
        """Part of the model and read -> what was begun of it, in order of execution."""

    def layer(self, layer: int) -> None:
        """Begin the work of what was heard of a layer that is done."""
        self._begin(layer, _places(layer))

    def ends(self) -> None:
        """Begin the work of what was heard before the first layer and behind the last, once the call is over."""
        for part in (_BEFORE, _BEHIND):
            self._begin(part, tuple(place for place in _places(None) if _part(place) == part))

    def _begin(self, part: _Part, places: Sequence[Place]) -> None:
        if self.ahead is None:
            return
        taps = self.heard.taps
        here = [place for place in places if place in taps and place in self.promised]
        for which in range(len(self.reads) if here else 0):
            tensors = [(place, taps[place][which]) for place in here]
            items = [self._tapped(which, place, tensor) for place, tensor in tensors]
            self._begun[(part, which)] = tensors, self.ahead(items, sum(tensor.nbytes for _, tensor in tensors))

    def items(self) -> Iterator[Tapped | Begun[object]]:
        """Yield everything, read by read; of what was begun ahead, only what no later firing has replaced."""
        self._check_rows()
        places = sorted(
            (p for p in self.heard.taps if p[1] in BY_NAME and p in self.promised), key=lambda p: _order(*p)
        )
        parts = [(part, list(group)) for part, group in groupby(places, key=_part)]
        told = [[self._told(part, group, which) for part, group in parts] for which in range(len(self.reads))]
        self.transfer.wait()
        for which, of_parts in enumerate(told):
            for (_, group), items in zip(parts, of_parts, strict=True):
                for place, item in zip(group, items, strict=False):
                    if isinstance(item, Begun):
                        yield item
                    else:
                        yield self._tapped(which, place, item)

    def _told(self, part: _Part, places: list[Place], which: int) -> list[Begun[object] | torch.Tensor]:
        """Return for one part what was begun, or tensors on their way to the host; one entry where all was begun."""
        taps = self.heard.taps
        tensors, begun = self._begun.get((part, which), ([], None))
        if begun is not None and len(tensors) == len(places) and all(
            place == mine and taps[place][which] is tensor
            for mine, (place, tensor) in zip(places, tensors, strict=True)
        ):  # fmt: skip
            return [begun]
        at = {place: (index, tensor) for index, (place, tensor) in enumerate(tensors)}
        return [
            begun.one(at[place][0])
            if begun is not None and place in at and at[place][1] is taps[place][which]
            else self.transfer.send(taps[place][which])
            for place in places
        ]

    def _tapped(self, which: int, place: Place, host: torch.Tensor) -> Tapped:
        """Return a tensor that is on the host as what is handed out; one that was lent stands behind a batch axis."""
        read, array, heard = self.reads[which], to_array(host), self.heard
        lent, starts = heard.lent.get(place), heard.row_start.get(place)
        if lent is not None:
            array = array[0].reshape(1, lent[1], -1) if lent[1] else array[0]
        start = 0 if starts is None else starts[which]
        return Tapped(read, place[0], place[1], array, read.position, start, _SOURCES[place in heard.recomputed])

    def _check_rows(self) -> None:
        """Refuse rows that were read in place and have been written to since."""
        changed = sorted(layer for layer, rows in self.heard.cache.items() if not rows.as_heard())
        if changed:
            raise EngineError(
                "cache rows changed while they were read", where=f"layer {changed[0]}",
                measured=f"written to in place, in {len(changed)} layers", allowed="a cache that appends by copying",
                next_step="if a hook of yours writes into the cache, let it put new tensors there instead",
            )  # fmt: skip
        lent = self.heard.lent
        spent = [place for place, (version, _) in lent.items() if self.heard.taps[place][0]._version != version]
        if spent:
            layer, tensor = min(spent, key=lambda each: _order(*each))
            raise EngineError(
                "a tensor changed while it was read", where=place_in_words(layer, tensor),
                measured=f"written to in place, {len(spent)} taps", allowed="tensors that stay as they were made",
                next_step="if a hook of yours writes into them, put it in before the engine is made: a trial sees it",
            )  # fmt: skip


_BEFORE, _BEHIND = "before", "behind"
_Part = int | str
"""A layer; or what stands before the first of them, or behind the last."""


def _part(place: Place) -> _Part:
    if place[0] is not None:
        return place[0]
    return _BEFORE if _order(*place) < _order(0, "x_in") else _BEHIND


@lru_cache(maxsize=1 << 12)
def _places(layer: int | None) -> tuple[Place, ...]:
    """Return a layer's places in order of execution."""
    return tuple(sorted(((layer, name) for name in BY_NAME), key=lambda place: execution_order(*place)))


_SOURCES = ("captured", "recomputed")

_order = lru_cache(maxsize=1 << 14)(execution_order)
