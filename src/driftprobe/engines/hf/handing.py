"""Hands out what one call let us hear: in order of execution, and what is begun ahead while the call still runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from driftprobe.background import Begun
from driftprobe.engines.base import Ahead, Tapped
from driftprobe.engines.hf.heard import Heard, Place
from driftprobe.engines.hf.host import Transfer, to_array
from driftprobe.errors import EngineError
from driftprobe.plan import Read
from driftprobe.taps import BY_NAME, execution_order


class HandOut:
    """The tensors of one call on their way out.

    On a CPU a layer's tensors are given `ahead` as soon as the layer is done. On an accelerator nothing may wait for
    the device inside the call: they are copied to pinned memory behind it, and waited for once.
    """

    def __init__(self, heard: Heard, reads: Sequence[Read], ahead: Ahead | None, transfer: Transfer) -> None:
        self.heard, self.reads, self.transfer = heard, reads, transfer
        self.ahead = ahead if transfer.immediate else None
        self._begun: dict[tuple[Place, int], tuple[torch.Tensor, Begun[Tapped, object]]] = {}

    def layer(self, layer: int | None) -> None:
        """Begin the work of what was heard of a layer that is done."""
        if self.ahead is None:
            return
        asked = [((layer, tensor), which) for tensor in _names() for which in range(len(self.reads))]
        asked = [(place, which) for place, which in asked if place in self.heard.taps]
        begun = self.ahead([self._tapped(place, which, self.heard.taps[place][which]) for place, which in asked])
        for (place, which), one in zip(asked, begun, strict=True):
            self._begun[(place, which)] = self.heard.taps[place][which], one

    def items(self) -> Iterator[Tapped | Begun[Tapped, object]]:
        """Yield everything, read by read; of what was begun ahead, only what no later firing has replaced."""
        self._check_rows()
        places = sorted((p for p in self.heard.taps if p[1] in BY_NAME), key=lambda p: _order(*p))
        hosts = {
            (place, which): self.transfer.send(self.heard.taps[place][which])
            for which in range(len(self.reads))
            for place in places
            if not self._is_begun(place, which)
        }
        self.transfer.wait()
        for which in range(len(self.reads)):
            for place in places:
                host = hosts.get((place, which))
                yield self._begun[(place, which)][1] if host is None else self._tapped(place, which, host)

    def _is_begun(self, place: Place, which: int) -> bool:
        begun = self._begun.get((place, which))
        return begun is not None and begun[0] is self.heard.taps[place][which]

    def _tapped(self, place: Place, which: int, host: torch.Tensor) -> Tapped:
        starts, read = self.heard.row_start.get(place), self.reads[which]
        source = "recomputed" if place in self.heard.recomputed else "captured"
        start = 0 if starts is None else starts[which]
        return Tapped(read, *place, to_array(host), read.position, start, source)

    def _check_rows(self) -> None:
        """Refuse rows that were read in place and have been written to since."""
        changed = sorted(layer for layer, rows in self.heard.cache.items() if not rows.as_heard())
        if changed:
            raise EngineError(
                "cache rows changed while they were read", where=f"layer {changed[0]}",
                measured=f"written to in place, in {len(changed)} layers", allowed="a cache that appends by copying",
                next_step="if a hook of yours writes into the cache, let it put new tensors there instead",
            )  # fmt: skip


@lru_cache(maxsize=1)
def _names() -> tuple[str, ...]:
    return tuple(BY_NAME)


_order = lru_cache(maxsize=1 << 14)(execution_order)
