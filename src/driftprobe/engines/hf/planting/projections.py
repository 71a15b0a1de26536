"""Plants faults of projections: a bias left out, a low-rank change of the weights, weights rounded to a few bits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from driftprobe.engines.hf.anatomy import Layer
from driftprobe.engines.hf.planting.base import Planter, Site, Undo, cannot_act
from driftprobe.engines.hf.planting.swap import planters, swap_weight
from driftprobe.engines.hf.weights import matrix_of
from driftprobe.faults import Expected

Tensor = torch.Tensor
_BITS = (4, 8)
GROUP = 32
"""Neighbouring inputs that share a scale in 4 bits; in 8 bits all inputs of an output do."""
_AFTER = {"q_proj": ("q_norm", "q_rope"), "k_proj": ("k_norm", "k_rope"), "v_proj": ("v_cache",)}


def _inputs(layer: Layer) -> dict[str, Any]:
    """Return the modules that make q, k and v of a layer, by the first tap that each shows in."""
    if layer.fused is not None and layer.q_proj is None:
        return {"q_proj": layer.fused}
    return {name: module for name in ("q_proj", "k_proj", "v_proj") if (module := getattr(layer, name)) is not None}


def _first(site: Site, index: int, name: str) -> tuple[int | None, str]:
    return site.first(index, name, *_AFTER[name], "attn_scores", "attn_out")


def _biased(site: Site) -> list[tuple[int, str, Any]]:
    """Return (layer, tap, module) of the projections with a bias: those of q, k and v, else the output projection."""
    layers = site.anatomy.layers
    found = [(layer.index, name, module) for layer in layers for name, module in _inputs(layer).items()]
    found += [(layer.index, "attn_out", layer.out_proj) for layer in layers]
    return [item for item in found if isinstance(getattr(item[2], "bias", None), Tensor)]


def _bias(site: Site, _strength: float) -> Expected:
    biased = _biased(site)
    if not biased:
        raise cannot_act("bias_missing", "no projection of attention has a bias", "a model with such a bias")
    index, name, _ = biased[0]
    where = _first(site, index, name) if name in _AFTER else site.first(index, name)
    return Expected(*where, "computation", "bias_missing")


def _change_bias(site: Site, _strength: float) -> list[Undo]:
    return [swap_weight(module, "bias", torch.zeros_like) for _, _, module in _biased(site)]


def _adapter(site: Site, _strength: float) -> Expected:
    if not list(_queries(site)):
        raise cannot_act("adapter_unmerged", "no query projection found", "a model with one")
    return Expected(*_first(site, 0, "q_proj"), "computation", "adapter", {"rank": 1})


def _queries(site: Site) -> Iterator[Any]:
    for layer in site.anatomy.layers:
        module = _inputs(layer).get("q_proj")
        if matrix_of(module) is not None:
            yield module


def _change_adapter(site: Site, strength: float) -> list[Undo]:
    def merged(weight: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(weight.shape[0])
        left, right = (torch.randn(n, generator=draw, dtype=torch.float64) for n in weight.shape)
        change = torch.outer(left / left.norm(), right / right.norm()).to(weight.device)
        own: Tensor = weight.double()
        changed: Tensor = own + strength * own.norm() * change
        return changed

    return [swap_weight(module, "weight", merged) for module in _queries(site)]


def _quantised(site: Site, strength: float) -> Expected:
    bits = int(strength)
    if bits not in _BITS:
        raise cannot_act("weights_quantised", f"{strength} bits", " or ".join(map(str, _BITS)))
    names = _inputs(site.anatomy.layers[0])
    if not names:
        raise cannot_act("weights_quantised", "no projection of attention found", "a model with one")
    return Expected(*_first(site, 0, next(iter(names))), "computation", "weights_quantised", {"bits": bits})


def _change_quantised(site: Site, strength: float) -> list[Undo]:
    undo = []
    for layer in site.anatomy.layers:
        for module in (*_inputs(layer).values(), layer.out_proj):
            if matrix_of(module) is not None:
                flip = type(module).__name__ == "Conv1D"
                undo.append(swap_weight(module, "weight", partial(_rounded, bits=int(strength), flip=flip)))
    return undo


def _rounded(weight: Tensor, bits: int, *, flip: bool) -> Tensor:
    """Round a matrix to signed integers of so many bits, each group of inputs with a scale of its own."""
    matrix = weight.double().T if flip else weight.double()
    out, width = matrix.shape
    group = GROUP if bits < 8 and width % GROUP == 0 else width
    rows = matrix.reshape(out, width // group, group)
    scale = rows.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    found = ((rows / scale).round() * scale).reshape(out, width)
    return found.T if flip else found


PLANTERS: dict[str, Planter] = {
    **planters("bias_missing", _bias, _change_bias, prefill=True),
    **planters("adapter_unmerged", _adapter, _change_adapter),
    **planters("weights_quantised", _quantised, _change_quantised, prefill=True),
}
