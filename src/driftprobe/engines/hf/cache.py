"""The cache objects of transformers, 4.40 to 5.x: making one, its own rows, listening to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from driftprobe.engines.hf.spy import Spy


def new_cache(model: Any) -> Any:
    """Return an empty cache of the kind that the model makes for itself."""
    from transformers import DynamicCache

    if "config" in inspect.signature(DynamicCache.__init__).parameters:
        return DynamicCache(config=model.config)
    return DynamicCache()


def stored_rows(cache: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a cache layer's own keys and values, `[B, G, S, D]`, not copies."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]


def layer_count(cache: Any) -> int:
    """Return how many layers hold rows."""
    return len(cache.layers if hasattr(cache, "layers") else cache.key_cache)


@contextmanager
def updates_heard(cache: Any, spy: Spy) -> Iterator[None]:
    """Listen to one cache object's `update` while the context lasts."""
    update: Callable[..., Any] = cache.update

    def listening(key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        output = update(key_states, value_states, layer_idx, *args, **kw)
        spy.cache_update(layer_idx, key_states, output[0], output[1])
        return output

    cache.update = listening
    try:
        yield
    finally:
        del cache.update
