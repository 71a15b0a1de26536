"""The matrices of a transformers model by the op they belong to, in one layout whatever the model's own is.

A matrix is `[out, in]` as in y = W x; experts stand first, `[expert, out, in]`. Fused projections are split as their
outputs are (`fused.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from driftprobe.engines.base import Constant
from driftprobe.engines.hf.anatomy import Anatomy, Layer, text_config
from driftprobe.engines.hf.fused import split
from driftprobe.engines.hf.heard import Learned
from driftprobe.engines.hf.host import to_array

Tensor = torch.Tensor
_GATE, _UP = ("gate_proj", "w1"), ("up_proj", "w3", "c_fc", "fc1", "dense_h_to_4h", "up")
_DOWN = ("down_proj", "w2", "c_proj", "fc2", "dense_4h_to_h", "down")
_GATE_UP = ("gate_up_proj",)
_POSITIONS = ("wpe", "embed_positions", "position_embeddings")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Experts:
    """A layer's experts: `[expert, out, in]` matrices."""

    gate: Tensor
    up: Tensor
    down: Tensor
    chosen: int
    """How many experts a token goes to; 0 where that is not stated."""


@dataclass(frozen=True)
class LowRank:
    """What stands before a projection that is made of two (DeepSeek): a matrix `[rank, in]`, and a norm behind it."""

    matrix: Tensor
    bias: Tensor | None
    norm: nn.Module


def weights_of(model: Any, anatomy: Anatomy, learned: Learned, index: int | None, tensor: str) -> Iterator[Constant]:
    """Return the matrices of the op behind a tap; nothing where they are not known."""
    if index is None:
        head = output_head(model)
        if tensor == "logits" and head is not None and isinstance(head.weight, Tensor):
            yield Constant(None, "logits.weight", to_array(head.weight))
        return
    layer = anatomy.layers[index]
    if tensor == "x_in" and index == 0:
        positions = position_table(model)
        if positions is not None:
            yield Constant(0, "x_in.positions", to_array(positions))
    elif tensor in _PROJECTIONS:
        found = projections(layer, anatomy, learned)
        if tensor in found:
            yield Constant(index, f"{tensor}.weight", to_array(found[tensor]))
        low = low_rank(layer) if tensor == "q_proj" else None
        if low is not None:
            yield Constant(index, "q_proj.low.weight", to_array(low.matrix))
    elif tensor == "attn_out":
        matrix = matrix_of(layer.out_proj)
        if matrix is not None:
            yield Constant(index, "attn_out.weight", to_array(matrix))
    elif tensor == "router_logits" and isinstance(getattr(layer.router, "weight", None), Tensor):
        assert layer.router is not None
        yield Constant(index, "router_logits.weight", to_array(layer.router.weight))  # type: ignore[arg-type]
    elif tensor in ("mlp_out", "x_out"):
        for name, matrix in mlp_matrices(layer).items():
            yield Constant(index, f"mlp_out.{name}", to_array(matrix))


def output_head(model: Any) -> Any:
    """Return the module that makes logits, where it has a weight; None else."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if hasattr(head, "weight") else None


def matrix_of(module: Any) -> Tensor | None:
    """Return a linear module's weight as `[out, in]`."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return weight.T if type(module).__name__ == "Conv1D" else weight


def projections(layer: Layer, anatomy: Anatomy, learned: Learned) -> dict[str, Tensor]:
    """Return tap -> `[out, in]` of q, k and v."""
    found = {name: matrix_of(getattr(layer, name)) for name in _PROJECTIONS}
    fused, layout = matrix_of(layer.fused), learned.layouts.get(layer.index, "")
    if fused is not None and layout:
        for name, part in split(layout, fused.T[None], anatomy.heads, anatomy.kv_heads).items():
            found[name] = part[0].flatten(1).T
    return {name: matrix for name, matrix in found.items() if matrix is not None}


def low_rank(layer: Layer) -> LowRank | None:
    """Return the first half of a query projection of low rank; None where queries are made by one projection."""
    owner = layer.attention
    if layer.q_proj is None or layer.q_proj is not getattr(owner, "q_b_proj", None):
        return None
    first, norm = getattr(owner, "q_a_proj", None), getattr(owner, "q_a_layernorm", None)
    matrix = matrix_of(first)
    return LowRank(matrix, _bias(first), norm) if matrix is not None and isinstance(norm, nn.Module) else None


def biases(layer: Layer, anatomy: Anatomy, learned: Learned) -> dict[str, Tensor]:
    """Return tap -> bias of q, k, v, the output projection and the MLP's matrices, those that have one."""
    found = {name: _bias(getattr(layer, name)) for name in _PROJECTIONS}
    fused, layout = _bias(layer.fused), learned.layouts.get(layer.index, "")
    if fused is not None and layout:
        for name, part in split(layout, fused[None, None], anatomy.heads, anatomy.kv_heads).items():
            found[name] = part.flatten()
    found["attn_out"] = _bias(layer.out_proj)
    if experts_of(layer) is None:
        for name, module in _mlp_modules(layer).items():
            found[f"mlp_out.{name}"] = _bias(module)
    found["router_logits"] = _bias(layer.router)
    low = low_rank(layer)
    found["q_proj.low"] = None if low is None else low.bias
    return {name: bias for name, bias in found.items() if bias is not None}


def _bias(module: Any) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def branch_norms(layer: Layer) -> dict[str, nn.Module]:
    """Return the norms that stand between a branch and the residual sum, by the sum's tap (Gemma 2, OLMo 2)."""
    owner, found = layer.module, {}
    if getattr(owner, "pre_feedforward_layernorm", None) is not None or layer.attn_norm is None:
        for tap, name in (("x_mid.branch", "post_attention_layernorm"), ("x_out.branch", "post_feedforward_layernorm")):
            module = getattr(owner, name, None)
            if isinstance(module, nn.Module) and (module is not layer.ffn_norm or layer.attn_norm is None):
                found[tap] = module
    return found


def _mlp_modules(layer: Layer) -> dict[str, Any]:
    owners = [layer.mlp_in, layer.module, getattr(layer.module, "mlp", None)]
    found: dict[str, Any] = {}
    for name, names in (("gate", _GATE), ("up", _UP), ("down", _DOWN), ("gate_up", _GATE_UP)):
        module = next(
            (m for owner in owners for n in names if isinstance(m := getattr(owner, n, None), nn.Module)), None
        )
        if module is not None:
            found[name] = module
    return found


def mlp_matrices(layer: Layer) -> dict[str, Tensor]:
    """Return `gate.weight`, `up.weight`, `down.weight` of a layer's MLP, or `experts.*` of its experts."""
    experts = experts_of(layer)
    if experts is not None:
        return {"experts.gate": experts.gate, "experts.up": experts.up, "experts.down": experts.down}
    found = {name: m for name, module in _mlp_modules(layer).items() if (m := matrix_of(module)) is not None}
    if "gate_up" in found:
        found["gate"], found["up"] = found.pop("gate_up").chunk(2, dim=0)
    return {f"{name}.weight": matrix for name, matrix in found.items()}


def experts_of(layer: Layer) -> Experts | None:
    """Return a layer's experts, where they are plain gated MLPs; None for any other kind.

    transformers 5 keeps them in three-axis parameters, gate above up; before, each is a module of its own.
    """
    owner = getattr(layer.mlp_in, "experts", None)
    if owner is None or getattr(layer.mlp_in, "shared_experts", None) is not None:
        return None
    chosen = next((int(v) for where in (layer.router, layer.mlp_in) for name in ("top_k", "num_experts_per_tok")
                   if isinstance(v := getattr(where, name, None), int)), 0)  # fmt: skip
    fused, down = getattr(owner, "gate_up_proj", None), getattr(owner, "down_proj", None)
    if isinstance(fused, Tensor) and isinstance(down, Tensor):
        hidden = down.shape[1]
        if fused.shape[2] != hidden or hasattr(owner, "gate_up_proj_bias"):
            return None  # transposed, or with biases: another formula
        gate, up = fused.chunk(2, dim=1)
        return Experts(gate, up, down, chosen)
    if isinstance(owner, nn.ModuleList) and len(owner):
        parts = [_expert(module) for module in owner]
        if all(part is not None for part in parts):
            gate, up, down = (torch.stack(list(m)) for m in zip(*[p for p in parts if p is not None], strict=True))
            return Experts(gate, up, down, chosen)
    return None


def _expert(module: nn.Module) -> tuple[Tensor, Tensor, Tensor] | None:
    found = [
        next((m for n in names if (m := matrix_of(getattr(module, n, None))) is not None), None)
        for names in (_GATE, _UP, _DOWN)
    ]
    gate, up, down = found
    return None if gate is None or up is None or down is None else (gate, up, down)


def renormalises(layer: Layer) -> bool | None:
    """Return whether the chosen experts' softmax weights are made to sum to one; None where that is not known."""
    owners = [owner for owner in (layer.router, layer.mlp_in) if owner is not None]
    stated = next((v for o in owners if isinstance(v := getattr(o, "norm_topk_prob", None), bool)), None)
    if stated is None and any(type(owner).__name__.startswith("Mixtral") for owner in owners):
        return True  # Mixtral's code always does, and has no setting for it
    return stated


def embedding_scale(model: Any) -> float | None:
    """Return the factor between a row of the embedding table and the first layer's input; None where there is none."""
    embed = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    config = text_config(model)
    own, other = getattr(embed, "embed_scale", None), getattr(config, "embedding_multiplier", None)
    if isinstance(own, Tensor | int | float):
        return float(own)
    if isinstance(other, int | float):
        return float(other)
    if str(getattr(config, "model_type", "")).startswith("gemma"):
        return math.sqrt(config.hidden_size)  # before transformers 5, Gemma's code multiplies by it
    return None


def position_table(model: Any) -> Tensor | None:
    """Return a learned position embedding, row k for position k (OPT keeps two rows before that of position 0)."""
    module = position_module(model)
    if module is None:
        return None
    weight: Tensor = module.weight
    return weight[int(getattr(module, "offset", 0) or 0) :]


def position_module(model: Any) -> Any:
    """Return the module of a learned position embedding, or None."""
    return next(
        (
            module
            for path, module in model.named_modules()
            if path.rsplit(".", 1)[-1] in _POSITIONS and isinstance(getattr(module, "weight", None), Tensor)
        ),
        None,
    )
