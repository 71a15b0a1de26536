"""The caches of transformers, 4.40 to 5.x: making one, its own rows and states, listening to it.

Today's models are given a Cache object and write into it. Older ones hand back tuples of keys and values instead; a
`TupleCache` holds those, so that the rest of the engine need not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch

from driftprobe.engines.hf.heard import Heard, Rows
from driftprobe.engines.hf.spy import Spy
from driftprobe.engines.hf.states import stored_states
from driftprobe.errors import ModelError

Tensor = torch.Tensor


_FIXED_SIZE = ("hybrid", "hybrid_chunked", "sliding_window", "static")


class TupleCache:
    """The cache of a model that returns `((keys, values), …)` and takes it back with the next call."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def get_seq_length(self) -> int:
        """Return how many positions the rows stand for."""
        return 0 if not self.value else int(stored_rows(self, 0)[0].shape[2])


def new_cache(model: Any) -> Any:
    """Return an empty cache of the kind that the model makes for itself. Raises ModelError where that is beyond us."""
    import transformers
    from transformers import DynamicCache

    stateful = "cache_params" in inspect.signature(model.forward).parameters
    if stateful and not hasattr(DynamicCache, "update_conv_state"):
        raise ModelError(
            "this model's own cache cannot be driven here", where=type(model).__name__,
            measured=f"a state-space cache under transformers {transformers.__version__}",
            allowed="states in the common cache, as transformers 5 keeps them",
            next_step="use a transformers whose DynamicCache has update_conv_state",
        )  # fmt: skip
    if knows_windows():
        return DynamicCache(config=model.config)
    kind = getattr(model.config, "cache_implementation", None)
    if kind in _FIXED_SIZE:
        raise ModelError(
            "this model's own cache cannot be driven here", where=type(model).__name__,
            measured=f"a {kind} cache, of fixed size, under transformers {transformers.__version__}",
            allowed="a cache that grows; a growing one in its place would lose the sliding window",
            next_step="use transformers 4.56 or later, where this model has one",
        )  # fmt: skip
    return DynamicCache()


def knows_windows() -> bool:
    """Whether this transformers' growing cache takes a configuration, and with it each layer's window (from 4.56)."""
    from transformers import DynamicCache

    return "config" in inspect.signature(DynamicCache.__init__).parameters


def opened(past: Any) -> Any:
    """Return what a model was called with, or gave back, as a cache."""
    return TupleCache(past) if past is None or isinstance(past, tuple) else past


def past_of(call: Any) -> Any:
    """Return the cache among a forward call's keyword arguments, or in its output, by either of its names."""
    get = call.get if isinstance(call, dict) else partial(getattr, call)
    past = get("past_key_values", None)
    return opened(get("cache_params", None) if past is None else past)


def filled(cache: Any) -> bool:
    """Whether a cache holds anything: rows, or states."""
    return any(_holds_rows(cache, layer) or stored_states(cache, layer).all for layer in range(layer_count(cache)))


def row_layers(cache: Any) -> list[int]:
    """Return the layers that hold K/V rows; in a hybrid model the others hold states, or nothing."""
    return [layer for layer in range(layer_count(cache)) if _holds_rows(cache, layer)]


def _holds_rows(cache: Any, layer: int) -> bool:
    if isinstance(cache, TupleCache) or not hasattr(cache, "layers"):
        return bool(stored_rows(cache, layer)[0].numel())
    keys = getattr(cache.layers[layer], "keys", None)
    return isinstance(keys, Tensor) and bool(keys.numel())


def stored_rows(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Return a cache layer's own keys and values, `[B, G, S, D]`, not copies; the layer must be of `row_layers`."""
    if isinstance(cache, TupleCache):
        return _four_axes(*cache.value[layer][:2])
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]


def _four_axes(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values as `[B, G, S, D]`; BLOOM kept `[B·H, D, S]` and `[B·H, S, D]`."""
    if values.dim() == 4:
        return keys, values
    turned = keys.shape[1] == values.shape[2]
    return (keys.transpose(1, 2) if turned else keys).unsqueeze(0), values.unsqueeze(0)


def appends(cache: Any, layer: int) -> bool:
    """Whether a layer of a cache appends by copying, so that what it handed out before is never written to."""
    held = cache.layers[layer] if hasattr(cache, "layers") else None
    return getattr(type(held), "update", None) in _appending()


@lru_cache(maxsize=1)
def _appending() -> tuple[object, ...]:
    from transformers import cache_utils

    kinds = (getattr(cache_utils, name, None) for name in ("DynamicLayer", "DynamicSlidingWindowLayer"))
    return tuple(kind.update for kind in kinds if kind is not None)


def layer_count(cache: Any) -> int:
    """Return how many layers hold rows."""
    if isinstance(cache, TupleCache):
        return len(cache.value or ())
    return len(cache.layers if hasattr(cache, "layers") else cache.key_cache)


@contextmanager
def rows_heard(model: Any, cache: Any, spy: Spy, heard: Heard) -> Iterator[None]:
    """Listen to what goes into one cache, and comes out, while the context lasts."""
    if isinstance(cache, TupleCache):
        hook = model.register_forward_hook(partial(_handed_back, heard), prepend=True)  # before anyone changes them
        undo: Callable[[], None] = hook.remove
    else:
        cache.update = _listening(cache.update, spy)
        undo = partial(delattr, cache, "update")
    try:
        yield
    finally:
        undo()


def _listening(update: Callable[..., Any], spy: Spy) -> Callable[..., Any]:
    def listening(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        output = update(key_states, value_states, layer_idx, *args, **kw)
        spy.cache_update(layer_idx, key_states, value_states, output[0], output[1])
        return output

    return listening


def _handed_back(heard: Heard, _model: object, _args: object, output: Any) -> None:
    cache = TupleCache(output.past_key_values)
    for layer in range(layer_count(cache)):
        keys, values = stored_rows(cache, layer)
        heard.cache[layer] = Rows.of(keys, values, shared=False)
        heard.cut.discard(layer)
