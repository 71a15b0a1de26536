"""Plants the faults of `driftprobe faults` in a transformers model, from outside, with hooks on its forward call.

The engine does not know of them: it feeds tokens and listens as ever. Faults of the cache's contents act after a
prefill, as a wrong write would; faults of the decode computation act in one-token calls on a filled cache. A fault that
cannot act in a model says so; none does nothing in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from driftprobe.engines.hf.anatomy import Anatomy
from driftprobe.engines.hf.attention import sliding_window
from driftprobe.engines.hf.cache import TupleCache, layer_count, opened, stored_rows
from driftprobe.errors import UsageError
from driftprobe.faults import find_fault

_EPSILON = ("variance_epsilon", "eps", "epsilon")
_SCALE = ("scaling", "scale", "inv_norm_factor")
_OF_K_AND_V = ("k_rows_swapped", "v_row_zero", "kv_heads_swapped")
"""Faults of keys and values as such, which a cache of latents does not hold."""
_OF_THE_OLDEST_ROW = {"v_row_zero": 1, "oldest_key_masked": 0}
"""Faults of row 0, and the layer that must still see it, which one with a sliding window soon does not."""
_OF_TWO_ROWS = 2

Undo = Callable[[], None]
Call = dict[str, Any]
"""The keyword arguments of one forward call, to be changed in place."""


@contextmanager
def plant(name: str, model: Any, anatomy: Anatomy, *, latent: bool = False) -> Iterator[None]:
    """Keep a fault planted in a model while the context lasts; `latent` if its cache holds no keys and values.

    Raises UsageError where the fault is unknown, or cannot act in this model; while it runs, where it cannot act on a
    prompt.
    """
    fault = find_fault(name)
    if len(anatomy.layers) < fault.min_layers or anatomy.kv_heads < fault.min_kv_heads:
        raise cannot_act(name, f"{len(anatomy.layers)} layers, {anatomy.kv_heads} KV heads",
                         f"{fault.min_layers} layers, {fault.min_kv_heads} KV heads or more")  # fmt: skip
    if latent and name in _OF_K_AND_V:
        raise cannot_act(name, "a cache of latents, from which keys and values are made anew", "a cache of K and V")
    before, after = _BEFORE_DECODE.get(name), _AFTER_PREFILL.get(name)
    undo: list[Undo] = []
    fresh = False

    def pre_hook(_model: object, args: tuple[Any, ...], call: Call) -> tuple[tuple[Any, ...], Call]:
        nonlocal fresh
        if fresh and _is_decode(call):
            _check_window(name, anatomy, opened(call["past_key_values"]))
            fresh = False
        if before is not None and _is_decode(call):
            call = dict(call)
            undo.extend(before(model, anatomy, call))
        return args, call

    def post_hook(_model: object, _args: object, call: Call, output: Any) -> None:
        nonlocal fresh
        while undo:
            undo.pop()()
        written = opened(output.past_key_values)
        if call["input_ids"].shape[1] > 1 or written.get_seq_length() == 1:
            fresh = True
            if after is not None:
                after(written)

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(post_hook, with_kwargs=True).remove)
        try:
            yield
        finally:
            while undo:  # a call that failed did not come to its post-hook
                undo.pop()()


def cannot_act(name: str, measured: str, allowed: str) -> UsageError:
    """Return the error that says why a fault changes nothing here."""
    return UsageError(
        "the fault cannot act here", where=f"--fault {name}", measured=measured, allowed=allowed,
        next_step="choose another fault (`driftprobe faults`), prompt or model",
    )  # fmt: skip


def _is_decode(call: Call) -> bool:
    return bool(call["input_ids"].shape[1] == 1 and opened(call["past_key_values"]).get_seq_length() > 0)


def _check_window(name: str, anatomy: Anatomy, cache: Any) -> None:
    """Raise where the first decode step after a prefill does not see the row that the fault changes."""
    index = _OF_THE_OLDEST_ROW.get(name)
    if index is None:
        return
    rows = cache.get_seq_length() if name in _BEFORE_DECODE else stored_rows(cache, index)[0].shape[2]
    window = sliding_window(anatomy.layers[index].attention, index)
    if window is not None and rows + 1 > window:
        raise cannot_act(name, f"a sliding window of {window} tokens in layer {index}, after {rows} cached rows",
                         f"a prompt of fewer than {window} tokens")  # fmt: skip


def _rope_plus_one(_model: Any, anatomy: Anatomy, call: Call) -> list[Undo]:
    if not anatomy.rotary or "position_ids" not in call:
        raise cannot_act("rope_plus_one", "no rotary embedding that is told positions", "a model with RoPE")
    call["position_ids"] = call["position_ids"] + 1
    return []


def _wrong_token(model: Any, _anatomy: Anatomy, call: Call) -> list[Undo]:
    call["input_ids"] = (call["input_ids"] + 1) % model.get_input_embeddings().weight.shape[0]
    return []


def _oldest_key_masked(_model: Any, _anatomy: Anatomy, call: Call) -> list[Undo]:
    mask = torch.ones(1, opened(call["past_key_values"]).get_seq_length() + 1, dtype=torch.long)
    mask[0, 0] = 0
    call["attention_mask"] = mask.to(call["input_ids"].device)
    return []


def _attn_scale(_model: Any, anatomy: Anatomy, _call: Call) -> list[Undo]:
    modules = [layer.attention for layer in anatomy.layers]
    return _change_attributes("attn_scale", modules, _SCALE, lambda value: value * 1.05)


def _norm_epsilon(model: Any, _anatomy: Anatomy, _call: Call) -> list[Undo]:
    modules = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    return _change_attributes("norm_epsilon", modules, _EPSILON, lambda value: value + 0.01)


def _change_attributes(
    fault: str, modules: list[Any], names: tuple[str, ...], change: Callable[[float], float]
) -> list[Undo]:
    undo: list[Undo] = []
    for module in modules:
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, float):
                setattr(module, name, change(value))
                undo.append(partial(setattr, module, name, value))
    if not undo:
        raise cannot_act(fault, f"no module has {' or '.join(names)}", "a model that keeps it as an attribute")
    return undo


def _other_layer_cache(_model: Any, _anatomy: Anatomy, call: Call) -> list[Undo]:
    cache = opened(call["past_key_values"])
    pairs = list(zip(stored_rows(cache, 1), stored_rows(cache, 0), strict=True))
    if any(mine.shape != other.shape for mine, other in pairs):
        raise cannot_act("other_layer_cache", f"layer 0 holds {tuple(pairs[0][1].shape)}, layer 1 "
                         f"{tuple(pairs[0][0].shape)}", "layers with caches of one shape")  # fmt: skip
    for mine, other in pairs:
        mine.copy_(other)
    return []


def _kv_heads_swapped(_model: Any, _anatomy: Anatomy, call: Call) -> list[Undo]:
    cache = opened(call["past_key_values"])
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


_BEFORE_DECODE: dict[str, Callable[[Any, Anatomy, Call], list[Undo]]] = {
    "rope_plus_one": _rope_plus_one,
    "wrong_token": _wrong_token,
    "oldest_key_masked": _oldest_key_masked,
    "attn_scale": _attn_scale,
    "norm_epsilon": _norm_epsilon,
    "other_layer_cache": _other_layer_cache,
    "kv_heads_swapped": _kv_heads_swapped,
}
_AFTER_PREFILL: dict[str, Callable[[Any], None]] = {
    "cache_shift": _cache_shift,
    "k_rows_swapped": _k_rows_swapped,
    "v_row_zero": _v_row_zero,
}
