"""The small constants of a transformers model: epsilons, norm weights, biases, rotary frequencies, scales, slopes.

A constant whose place is not known is absent, never guessed: a diagnosis that lacks it finds nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from driftprobe.engines.base import Constant
from driftprobe.engines.hf.activations import activation_of
from driftprobe.engines.hf.anatomy import Anatomy, Layer, text_config
from driftprobe.engines.hf.attention import sliding_window
from driftprobe.engines.hf.heard import Learned
from driftprobe.engines.hf.host import to_array
from driftprobe.engines.hf.norms import recognise
from driftprobe.engines.hf.weights import (
    biases,
    branch_norms,
    embedding_scale,
    experts_of,
    low_rank,
    output_head,
    renormalises,
)

_SCORE_SCALE = ("scaling", "scale", "inv_norm_factor", "softmax_scale", "scale_attn", "norm_factor")
_SOFTCAP = ("attn_logit_softcapping", "logit_softcapping", "attn_softcapping")
_OF_CONFIG = {"logits.softcap": "final_logit_softcapping", "residual.multiplier": "residual_multiplier"}


def constants_of(model: Any, anatomy: Anatomy, learned: Learned, layers: frozenset[int]) -> Iterator[Constant]:
    """Return every small constant of these layers, and those outside the layers."""
    for layer in anatomy.layers:
        if layer.index in layers:
            yield from _of_layer(model, anatomy, learned, layer)
    yield from _norm(None, "final_norm", anatomy.final_norm)
    head = output_head(model)
    if head is not None and isinstance(getattr(head, "bias", None), torch.Tensor):
        yield Constant(None, "logits.bias", to_array(head.bias))
    yield from _of_config(text_config(model))
    scale = embedding_scale(model)
    if scale is not None:
        inside = hasattr(anatomy.embed, "embed_scale")  # the lookup hands out rows that are scaled already
        yield number(None, "embed.scale", 1.0 if inside else scale)


def number(layer: int | None, name: str, value: float) -> Constant:
    """Return a plain number as a constant of one element."""
    return Constant(layer, name, np.array([float(value)], dtype=np.float64))


def _of_layer(model: Any, anatomy: Anatomy, learned: Learned, layer: Layer) -> Iterator[Constant]:
    i = layer.index
    norms = {"attn_norm": layer.attn_norm, "q_norm": layer.q_norm, "k_norm": layer.k_norm, "ffn_norm": layer.ffn_norm}
    low = low_rank(layer)
    if low is not None:
        norms["q_proj.low_norm"] = low.norm
    for tensor, module in {**norms, **branch_norms(layer)}.items():
        yield from _norm(i, tensor, module)
    for tensor, bias in biases(layer, anatomy, learned).items():
        yield Constant(i, f"{tensor}.bias", to_array(bias))
    yield from _rotary(model, layer)
    yield from _scores(layer, learned)
    slopes = _slopes(model, anatomy.heads)
    if slopes is not None:
        yield Constant(i, "alibi.slopes", to_array(slopes))
    experts = experts_of(layer)
    if experts is not None and experts.chosen:
        yield number(i, "expert_ids.count", experts.chosen)
        sums = renormalises(layer)
        if sums is not None:
            yield number(i, "expert_ids.renormalised", float(sums))
    activation = activation_of(layer)
    if activation is not None:
        yield Constant(i, "mlp_out.activation", to_array(activation))


def _norm(layer: int | None, tensor: str, module: Any) -> Iterator[Constant]:
    norm = None if module is None else recognise(module)
    if norm is None:
        return
    yield number(layer, f"{tensor}.eps", norm.eps)
    yield number(layer, f"{tensor}.centred", float(norm.centred))
    yield number(layer, f"{tensor}.offset", norm.offset)
    for name, value in (("weight", norm.weight), ("bias", norm.bias)):
        if value is not None:
            yield Constant(layer, f"{tensor}.{name}", to_array(value))


def _rotary(model: Any, layer: Layer) -> Iterator[Constant]:
    """Inverse frequencies and the scaling of cosine and sine; where layer types differ, those of this layer's type."""
    module = _rotary_module(model, layer)
    if module is None or not getattr(layer.attention, "use_rope", True):
        return
    config = text_config(model)
    kinds = getattr(config, "layer_types", None)
    lead = f"{kinds[layer.index]}_" if kinds and hasattr(module, f"{kinds[layer.index]}_inv_freq") else ""
    frequencies = getattr(module, f"{lead}inv_freq", None)
    if isinstance(frequencies, torch.Tensor):
        yield Constant(layer.index, "rope.inv_freq", to_array(frequencies))
        scaling = getattr(module, f"{lead}attention_scaling", 1.0)
        yield number(layer.index, "rope.scaling", float(scaling) if isinstance(scaling, int | float) else 1.0)


def _rotary_module(model: Any, layer: Layer) -> Any:
    own = getattr(layer.attention, "rotary_emb", None)
    if own is not None:
        return own
    local = getattr(layer.attention, "is_sliding", False) and _named(model, "rotary_emb_local")
    return local or _named(model, "rotary_emb")


def _named(model: Any, name: str) -> Any:
    return next((module for path, module in model.named_modules() if path.rsplit(".", 1)[-1] == name), None)


def _scores(layer: Layer, learned: Learned) -> Iterator[Constant]:
    i, attention = layer.index, layer.attention
    scale = learned.scales.get(i, _attribute(attention, _SCORE_SCALE))
    if scale is not None:
        yield number(i, "attn_scores.scale", scale)
    softcap = learned.softcaps.get(i, _attribute(attention, _SOFTCAP))
    if softcap:
        yield number(i, "attn_scores.softcap", softcap)
    window = sliding_window(attention, i)
    if window is not None:
        yield number(i, "attn_scores.window", window)
    sinks = getattr(attention, "sinks", None)
    if isinstance(sinks, torch.Tensor):
        yield Constant(i, "attn_scores.sinks", to_array(sinks))


def _attribute(module: Any, names: tuple[str, ...]) -> float | None:
    return next((float(v) for name in names if isinstance(v := getattr(module, name, None), float)), None)


def _slopes(model: Any, heads: int) -> torch.Tensor | None:
    """Return ALiBi's slope of each head (Press et al. 2022), by the model's own function."""
    space = inspect.unwrap(type(model).forward).__globals__
    config = text_config(model)
    with torch.no_grad():
        if "build_alibi_tensor" in space and getattr(config, "alibi", True):
            mask = torch.ones(1, 2, dtype=torch.long)
            table: torch.Tensor = space["build_alibi_tensor"](mask, heads, torch.float32)
            return table.reshape(heads, 2)[:, 1].clone()
        if "build_mpt_alibi_tensor" in space and getattr(getattr(config, "attn_config", None), "alibi", False):
            table = space["build_mpt_alibi_tensor"](heads, 2, config.attn_config.alibi_bias_max)
            rows = table.reshape(heads, 2)
            return (rows[:, 1] - rows[:, 0]).clone()
    return None


def _of_config(config: Any) -> Iterator[Constant]:
    for constant, name in _OF_CONFIG.items():
        value = getattr(config, name, None)
        if isinstance(value, int | float):
            yield number(None, constant, value)
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    if isinstance(scale, int | float):
        yield number(None, "logits.scale", scale)
    elif isinstance(divisor, int | float) and divisor:
        yield number(None, "logits.scale", 1.0 / divisor)
