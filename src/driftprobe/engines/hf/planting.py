"""Plants the faults of `driftprobe faults` in a transformers model, from outside, with hooks on its forward call.

The engine does not know of them: it feeds tokens and listens as ever. Faults of the cache's contents act after a
prefill, as a wrong write would; faults of the decode computation act in one-token calls on a filled cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from driftprobe.engines.hf.anatomy import Anatomy
from driftprobe.engines.hf.cache import layer_count, stored_rows
from driftprobe.errors import UsageError
from driftprobe.faults import find_fault

_EPSILON = ("variance_epsilon", "eps", "epsilon")
_SCALE = ("scaling", "scale", "inv_norm_factor")

Undo = Callable[[], None]
Call = dict[str, Any]
"""The keyword arguments of one forward call, to be changed in place."""


@contextmanager
def plant(name: str, model: Any, anatomy: Anatomy) -> Iterator[None]:
    """Keep a fault planted in a model while the context lasts.

    Raises UsageError where the fault is unknown, or cannot act in this model.
    """
    fault = find_fault(name)
    if len(anatomy.layers) < fault.min_layers or anatomy.kv_heads < fault.min_kv_heads:
        raise cannot_act(name, f"{len(anatomy.layers)} layers, {anatomy.kv_heads} KV heads",
                         f"{fault.min_layers} layers, {fault.min_kv_heads} KV heads or more")  # fmt: skip
    before, after = _BEFORE_DECODE.get(name), _AFTER_PREFILL.get(name)
    undo: list[Undo] = []

    def pre_hook(_model: object, args: tuple[Any, ...], call: Call) -> tuple[tuple[Any, ...], Call]:
        if before is not None and _is_decode(call):
            call = dict(call)
            undo.extend(before(model, anatomy, call))
        return args, call

    def post_hook(_model: object, _args: object, call: Call, output: Any) -> None:
        while undo:
            undo.pop()()
        if after is not None and not _is_decode_after(call):
            after(call["past_key_values"])

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(post_hook, with_kwargs=True).remove)
        yield


def cannot_act(name: str, measured: str, allowed: str) -> UsageError:
    """Return the error that says why a fault changes nothing here."""
    return UsageError(
        "the fault cannot act here", where=f"--fault {name}", measured=measured, allowed=allowed,
        next_step="choose another fault (`driftprobe faults`), prompt or model",
    )  # fmt: skip


def _is_decode(call: Call) -> bool:
    return bool(call["input_ids"].shape[1] == 1 and call["past_key_values"].get_seq_length() > 0)


def _is_decode_after(call: Call) -> bool:
    return bool(call["input_ids"].shape[1] == 1 and call["past_key_values"].get_seq_length() > 1)


def _rope_plus_one(_model: Any, _anatomy: Anatomy, call: Call) -> list[Undo]:
    call["position_ids"] = call["position_ids"] + 1
    return []


def _wrong_token(model: Any, _anatomy: Anatomy, call: Call) -> list[Undo]:
    call["input_ids"] = (call["input_ids"] + 1) % model.get_input_embeddings().weight.shape[0]
    return []


def _oldest_key_masked(_model: Any, _anatomy: Anatomy, call: Call) -> list[Undo]:
    mask = torch.ones(1, call["past_key_values"].get_seq_length() + 1, dtype=torch.long)
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
    mine, other = (stored_rows(call["past_key_values"], layer) for layer in (1, 0))
    for target, source in zip(mine, other, strict=True):
        target.copy_(source)
    return []


def _kv_heads_swapped(_model: Any, _anatomy: Anatomy, call: Call) -> list[Undo]:
    cache = call["past_key_values"]
    heard = cache.__dict__.get("update")
    update = cache.update

    def swapped(*args: Any, **kwargs: Any) -> Any:
        order: list[int] | None = None
        parts = []
        for rows in update(*args, **kwargs):
            order = order or [1, 0, *range(2, rows.shape[1])]
            parts.append(rows[:, order])
        return tuple(parts)

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
    order = list(range(keys.shape[2]))
    order[0], order[-1] = order[-1], order[0]
    keys.copy_(keys[:, :, order])


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
