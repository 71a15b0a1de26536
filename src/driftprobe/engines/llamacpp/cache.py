"""Cache rows as bytes: read from a context's own tensors and written there, whatever their type.

A row is all of one position's keys, or values, of one layer, head by head, in the cache's own type. Without flash
attention llama.cpp keeps values channel by channel; they are turned into rows here, and back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from driftprobe.engines.llamacpp.ggml import Tensor
from driftprobe.engines.llamacpp.nodes import CacheTensors

Rows = npt.NDArray[np.uint8]
"""[S, bytes]: one row a cache slot."""


@dataclass(frozen=True, slots=True)
class Layer:
    """All slots of one layer's cache, copied."""

    keys: Rows
    values: Rows

    def first(self, count: int) -> Layer:
        """Return its first slots."""
        return Layer(self.keys[:count].copy(), self.values[:count].copy())

    @property
    def both(self) -> tuple[Rows, Rows]:
        """Keys and values."""
        return self.keys, self.values


Cache = dict[int, Layer]


def read(places: dict[int, CacheTensors], count: int | None = None) -> Cache:
    """Return every layer's rows, or the first `count` of them."""
    found = {layer: Layer(_rows(at.keys, False), _rows(at.values, at.transposed)) for layer, at in places.items()}
    return found if count is None else {layer: rows.first(count) for layer, rows in found.items()}


def write(places: dict[int, CacheTensors], cache: Cache) -> None:
    """Put whole layers back: as many slots as `read` without a count returned."""
    for layer, rows in cache.items():
        at = places[layer]
        at.keys.write(rows.keys.tobytes())
        at.values.write(_turned_back(at.values, rows.values) if at.transposed else rows.values.tobytes())


def _rows(tensor: Tensor, transposed: bool) -> Rows:
    held = np.frombuffer(tensor.content(), dtype=np.uint8)
    slots, channels = tensor.shape[-2], tensor.shape[-1]
    if not transposed:
        return held.reshape(slots, -1).copy()
    return held.reshape(channels, slots, -1).swapaxes(0, 1).reshape(slots, -1).copy()


def _turned_back(tensor: Tensor, rows: Rows) -> bytes:
    slots, channels = tensor.shape[-2], tensor.shape[-1]
    return bytes(rows.reshape(slots, channels, -1).swapaxes(0, 1).tobytes())
