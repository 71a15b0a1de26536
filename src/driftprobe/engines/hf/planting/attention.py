"""Plants faults of attention: those of the cache's contents here, the others in a file a family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from driftprobe.engines.hf.attention import sliding_window
from driftprobe.engines.hf.cache import layer_count, opened, stored_rows
from driftprobe.engines.hf.planting import extent, heads, positions, scores
from driftprobe.engines.hf.planting.base import (
    Call,
    Planter,
    Site,
    Undo,
    after_prefill,
    cannot_act,
    during,
    is_decode,
)
from driftprobe.faults import Expected, find_fault

_OF_K_AND_V = ("k_rows_swapped", "v_row_zero")
"""Faults of keys and values as such, which a cache of latents does not hold."""
_OF_THE_OLDEST_ROW = {"v_row_zero": 1}
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
                _check_window(name, site, opened(call["past_key_values"]))
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


def _wrong_token(site: Site, call: Call) -> list[Undo]:
    call["input_ids"] = (call["input_ids"] + 1) % site.model.get_input_embeddings().weight.shape[0]
    return []


def _other_layer_cache(_site: Site, call: Call) -> list[Undo]:
    cache = opened(call["past_key_values"])
    pairs = list(zip(stored_rows(cache, 1), stored_rows(cache, 0), strict=True))
    if any(mine.shape != other.shape for mine, other in pairs):
        raise cannot_act("other_layer_cache", f"layer 0 holds {tuple(pairs[0][1].shape)}, layer 1 "
                         f"{tuple(pairs[0][0].shape)}", "layers with caches of one shape")  # fmt: skip
    for mine, other in pairs:
        mine.copy_(other)
    return []


def _cache_shift(cache: Any) -> None:
    for layer in range(layer_count(cache)):
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
    "wrong_token": _wrong_token,
    "other_layer_cache": _other_layer_cache,
}
_AFTER_PREFILL: dict[str, Callable[[Any], None]] = {
    "cache_shift": _cache_shift,
    "k_rows_swapped": _k_rows_swapped,
    "v_row_zero": _v_row_zero,
}
PLANTERS: dict[str, Planter] = {
    **{name: _old(name) for name in (*_BEFORE_DECODE, *_AFTER_PREFILL)},
    **positions.PLANTERS,
    **extent.PLANTERS,
    **heads.PLANTERS,
    **scores.PLANTERS,
}
