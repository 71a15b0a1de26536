"""Plants faults of what attention may see: keys masked, keys too many, windows, leaking masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from driftprobe.causes import Parameters
from driftprobe.engines.hf.anatomy import text_config
from driftprobe.engines.hf.attention import sliding_window
from driftprobe.engines.hf.cache import TupleCache, past_of
from driftprobe.engines.hf.planting.base import (
    Call,
    Planter,
    Site,
    Undo,
    after_prefill,
    cannot_act,
    during,
    is_decode,
    is_prefill,
    set_attribute,
)
from driftprobe.engines.hf.planting.hooks import argument_changed, is_masked, mask_changed, rows_handed, switched
from driftprobe.faults import Expected

Tensor = torch.Tensor
SINKS = 4
"""First tokens that streaming attention keeps (Xiao et al. 2024), and that a careless eviction loses."""
_Keys = Callable[[int, "int | None"], tuple[int, ...]]
"""(Position of the newest token, the layer's window) -> positions of the keys that are hidden."""


def windows(site: Site) -> dict[int, int]:
    """Return layer -> sliding window in tokens, of those that have one."""
    found = {layer.index: sliding_window(layer.attention, layer.index) for layer in site.anatomy.layers}
    return {index: window for index, window in found.items() if window is not None}


def _hidden(name: str, keys: _Keys, told: Callable[[int | None], Parameters], *, sliding: bool = False) -> Planter:
    """Return the planter of a fault that hides keys from decode, in all layers or in those with a window."""

    @contextmanager
    def planted(site: Site, _strength: float) -> Iterator[Expected]:
        known, fresh = windows(site), [False]
        first = _first_windowed(name, known) if sliding else 0

        def noted(_cache: Any) -> None:
            fresh[0] = True

        def change(layer: int, mask: Tensor) -> None:
            if sliding and layer not in known:
                return
            columns, newest = mask.shape[-1], switch.position
            hidden = [columns - 1 - (newest - key) for key in keys(newest, known.get(layer))]
            if layer == first and fresh[0]:
                fresh[0] = False
                _check_seen(name, hidden, known.get(layer), newest)
            mask[..., [column for column in hidden if column >= 0]] = torch.finfo(mask.dtype).min

        with switched(site, is_decode) as switch, mask_changed(site, switch, change), after_prefill(site, noted):
            where = site.first(first, "attn_scores", "attn_probs", "attn_ctx")
            yield Expected(*where, "computation", "keys_masked", told(known.get(first)))

    return planted


def _first_windowed(name: str, known: dict[int, int]) -> int:
    if not known:
        raise cannot_act(name, "no layer with a sliding window", "a model that has one")
    return min(known)


def _check_seen(name: str, hidden: list[int], window: int | None, newest: int) -> None:
    """Raise where the first decode step after a prefill does not see the keys that the fault hides anyway."""
    if not hidden or min(hidden) < 0:
        seen = "all keys" if window is None else f"a sliding window of {window} tokens"
        raise cannot_act(name, f"{seen}, after {newest} cached rows",
                         "a prompt whose first decode step sees the keys that the fault hides")  # fmt: skip


@contextmanager
def _window_plus_one(site: Site, _strength: float) -> Iterator[Expected]:
    """Let decode see one key more than the window; the cache keeps a row more for it to see."""
    name, known = "window_plus_one", windows(site)
    first, config = _first_windowed(name, known), text_config(site.model)
    before = config.sliding_window
    modules = [site.anatomy.layers[index].attention for index in known]

    def narrow(_call: Call) -> list[Undo]:
        return [set_attribute(config, "sliding_window", before)]

    def widen(_call: Call) -> list[Undo]:
        return [set_attribute(m, "sliding_window", before + 1) for m in modules if hasattr(m, "sliding_window")]

    put_back = set_attribute(config, "sliding_window", before + 1)
    try:
        with during(site, is_prefill, narrow), during(site, is_decode, widen):
            where = site.first(first, "attn_scores", "attn_probs", "attn_ctx")
            yield Expected(*where, "computation", "keys_extra", {"count": 1})
    finally:
        put_back()


@contextmanager
def _extra_key_visible(site: Site, _strength: float) -> Iterator[Expected]:
    """Let decode see one row behind its own that nobody wrote, in the layers that see all keys."""
    whole = _whole("extra_key_visible", site)
    with switched(site, is_decode) as switch:

        def handed(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
            if not switch.on or layer not in whole:
                return keys, values
            return tuple(torch.cat([rows, torch.zeros_like(rows[:, :, :1])], dim=2) for rows in (keys, values))

        def widened(layer: int, mask: Tensor | None, _states: Tensor) -> Tensor | None:
            if mask is None or layer not in whole:
                return mask
            seen = torch.ones_like(mask[..., :1]) if mask.dtype == torch.bool else torch.zeros_like(mask[..., :1])
            return torch.cat([mask, seen], dim=-1)

        with rows_handed(site, handed), argument_changed(site, switch, "attention_mask", widened):
            where = site.first(whole[0], "attn_scores", "attn_probs", "attn_ctx")
            yield Expected(*where, "computation", "keys_extra", {"count": 1})


def _whole(name: str, site: Site) -> list[int]:
    """Return the layers whose attention sees all keys. Raises UsageError where there is none."""
    known = windows(site)
    found = [layer.index for layer in site.anatomy.layers if layer.attention is not None and layer.index not in known]
    if not found:
        raise cannot_act(name, "a sliding window in every layer", "a layer that sees all keys")
    return found


@contextmanager
def _oldest_row_lost(site: Site, _strength: float) -> Iterator[Expected]:
    """Take the oldest row out of the cache before the first decode step, in the layers that see all keys."""
    whole, fresh = _whole("oldest_row_lost", site), list[bool]()

    def evict(call: Call) -> list[Undo]:
        cache = past_of(call)
        if isinstance(cache, TupleCache) or not hasattr(cache, "layers"):
            raise cannot_act("oldest_row_lost", "a cache that is not kept in layers", "a Cache object of layers")
        for held in (cache.layers[layer] for layer in whole if fresh):
            held.keys, held.values = held.keys[:, :, 1:], held.values[:, :, 1:]
        fresh.clear()
        return []

    with during(site, is_decode, evict), after_prefill(site, lambda _cache: fresh.append(True)):
        where = site.first(whole[0], "attn_scores", "attn_probs", "attn_ctx")
        yield Expected(*where, "computation", "keys_masked", {"keys": (0,)})


def _prefill_mask(cause: str, told: Callable[[float], Parameters], change: Callable[[Tensor, float], None]) -> Planter:
    """Return the planter of a prefill whose mask lets later keys in: seen where another prefill is longer."""

    @contextmanager
    def planted(site: Site, strength: float) -> Iterator[Expected]:
        def changed(_layer: int, mask: Tensor) -> None:
            change(mask, strength)

        with switched(site, is_prefill) as switch, mask_changed(site, switch, changed):
            where = site.first(0, "attn_scores", "attn_probs", "attn_ctx")
            yield Expected(*where, "contents", cause, told(strength))

    return planted


def _leak(mask: Tensor, value: float) -> None:
    later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1 + mask.shape[-1] - mask.shape[-2])
    mask[is_masked(mask) & later] = value


def _next_seen(mask: Tensor, _strength: float) -> None:
    for row in range(mask.shape[-2] - 1):
        mask[..., row, mask.shape[-1] - mask.shape[-2] + row + 1] = 0.0


PLANTERS: dict[str, Planter] = {
    "oldest_key_masked": _hidden("oldest_key_masked", lambda _n, _w: (0,), lambda _w: {"keys": (0,)}),
    "oldest_row_lost": _oldest_row_lost,
    "sink_tokens_lost": _hidden(
        "sink_tokens_lost", lambda _n, _w: tuple(range(SINKS)), lambda _w: {"keys": tuple(range(SINKS))}
    ),
    "newest_key_masked": _hidden("newest_key_masked", lambda newest, _w: (newest,), lambda _w: {"behind": (0,)}),
    "window_minus_one": _hidden(
        "window_minus_one",
        lambda newest, window: () if window is None or newest + 1 < window else (newest + 1 - window,),
        lambda window: {"behind": ((window or 0) - 1,)},
        sliding=True,
    ),
    "window_plus_one": _window_plus_one,
    "extra_key_visible": _extra_key_visible,
    "mask_leak": _prefill_mask("mask_leak", lambda value: {"value": value}, _leak),
    "prefill_sees_next": _prefill_mask("keys_extra", lambda _s: {"count": 1}, _next_seen),
}
