"""Plants faults of attention: positions, the cache's contents and extent, heads, scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from driftprobe.engines.hf.attention import sliding_window
from driftprobe.engines.hf.cache import TupleCache, past_of, row_layers, stored_rows
from driftprobe.engines.hf.planting.base import (
    Call,
    Planter,
    Site,
    Undo,
    after_prefill,
    cannot_act,
    during,
    is_decode,
    set_attribute,
)
from driftprobe.faults import Expected, find_fault

_SCALE = ("scaling", "scale", "inv_norm_factor")
_OF_K_AND_V = ("k_rows_swapped", "v_row_zero", "kv_heads_swapped")
"""Faults of keys and values as such, which a cache of latents does not hold."""
_OF_THE_OLDEST_ROW = {"v_row_zero": 1, "oldest_key_masked": 0}
"""Faults of row 0, and the layer that must still see it, which one with a sliding window soon does not."""
_OF_TWO_ROWS = 2


def _old(name: str) -> Planter:
    """Return the planter of a fault of `_BEFORE_DECODE` or `_AFTER_PREFILL`."""

    @contextmanager
    def planted(site: Site, _strength: float) -> Iterator[Expected]:
        if site.latent and name in _OF_K_AND_V:
            raise cannot_act(name, "a cache of latents, from which keys and values are made anew", "a cache of K and V")
        before, after, fault = _BEFORE_DECODE.get(name), _AFTER_PREFILL.get(name), find_fault(name)
        fresh = False

        def noted(_cache: Any) -> None:
            nonlocal fresh
            fresh = True
            if after is not None:
                after(_cache)

        def change(call: Call) -> list[Undo]:
            nonlocal fresh
            if fresh:
                _check_window(name, site, past_of(call))
                fresh = False
            return [] if before is None else before(site, call)

        with during(site, is_decode, change), after_prefill(site, noted):
            yield Expected(fault.layer, fault.tensor, fault.reading, fault.cause)

    return planted


def _check_window(name: str, site: Site, cache: Any) -> None:
    """Raise where the first decode step after a prefill does not see the row that the fault changes."""
    index = _OF_THE_OLDEST_ROW.get(name)
    if index is None:
        return
    rows = cache.get_seq_length() if name in _BEFORE_DECODE else stored_rows(cache, index)[0].shape[2]
    window = sliding_window(site.anatomy.layers[index].attention, index)
    if window is not None and rows + 1 > window:
        raise cannot_act(name, f"a sliding window of {window} tokens in layer {index}, after {rows} cached rows",
                         f"a prompt of fewer than {window} tokens")  # fmt: skip


def _rope_plus_one(site: Site, call: Call) -> list[Undo]:
    if not site.anatomy.rotary or "position_ids" not in call:
        raise cannot_act("rope_plus_one", "no rotary embedding that is told positions", "a model with RoPE")
    call["position_ids"] = call["position_ids"] + 1
    return []


def _wrong_token(site: Site, call: Call) -> list[Undo]:
    call["input_ids"] = (call["input_ids"] + 1) % site.model.get_input_embeddings().weight.shape[0]
    return []


def _oldest_key_masked(_site: Site, call: Call) -> list[Undo]:
    mask = torch.ones(1, past_of(call).get_seq_length() + 1, dtype=torch.long)
    mask[0, 0] = 0
    call["attention_mask"] = mask.to(call["input_ids"].device)
    return []


def _attn_scale(site: Site, _call: Call) -> list[Undo]:
    modules = [layer.attention for layer in site.anatomy.layers]
    undo = [
        set_attribute(module, name, getattr(module, name) * 1.05)
        for module in modules
        for name in _SCALE
        if isinstance(getattr(module, name, None), float)
    ]
    if not undo:
        raise cannot_act("attn_scale", f"no module has {' or '.join(_SCALE)}", "a model that keeps it as an attribute")
    return undo


def _other_layer_cache(_site: Site, call: Call) -> list[Undo]:
    cache = past_of(call)
    pairs = list(zip(stored_rows(cache, 1), stored_rows(cache, 0), strict=True))
    if any(mine.shape != other.shape for mine, other in pairs):
        raise cannot_act("other_layer_cache", f"layer 0 holds {tuple(pairs[0][1].shape)}, layer 1 "
                         f"{tuple(pairs[0][0].shape)}", "layers with caches of one shape")  # fmt: skip
    for mine, other in pairs:
        mine.copy_(other)
    return []


def _kv_heads_swapped(_site: Site, call: Call) -> list[Undo]:
    cache = past_of(call)
    if isinstance(cache, TupleCache):
        raise cannot_act("kv_heads_swapped", "a model that keeps its cache in tuples", "a model with a Cache object")
    heard = cache.__dict__.get("update")
    update = cache.update

    def swapped(*args: Any, **kwargs: Any) -> Any:
        return tuple(rows[:, [1, 0, *range(2, rows.shape[1])]] for rows in update(*args, **kwargs))

    cache.update = swapped
    if heard is not None:
        return [partial(setattr, cache, "update", heard)]
    return [partial(delattr, cache, "update")]


def _cache_shift(cache: Any) -> None:
    for layer in row_layers(cache):
        for rows in stored_rows(cache, layer):
            rows.copy_(rows.roll(1, dims=2))
            rows[:, :, 0] = 0  # nobody wrote this slot


def _k_rows_swapped(cache: Any) -> None:
    keys = stored_rows(cache, 1)[0]
    count = keys.shape[2]
    if count < _OF_TWO_ROWS:
        raise cannot_act("k_rows_swapped", f"a prefill of {count} token", "a prompt of 2 tokens or more")
    keys.copy_(keys[:, :, [count - 1, *range(1, count - 1), 0]])


def _v_row_zero(cache: Any) -> None:
    stored_rows(cache, 1)[1][:, :, 0] = 0


_BEFORE_DECODE: dict[str, Callable[[Site, Call], list[Undo]]] = {
    "rope_plus_one": _rope_plus_one,
    "wrong_token": _wrong_token,
    "oldest_key_masked": _oldest_key_masked,
    "attn_scale": _attn_scale,
    "other_layer_cache": _other_layer_cache,
    "kv_heads_swapped": _kv_heads_swapped,
}
_AFTER_PREFILL: dict[str, Callable[[Any], None]] = {
    "cache_shift": _cache_shift,
    "k_rows_swapped": _k_rows_swapped,
    "v_row_zero": _v_row_zero,
}
PLANTERS: dict[str, Planter] = {name: _old(name) for name in (*_BEFORE_DECODE, *_AFTER_PREFILL)}
