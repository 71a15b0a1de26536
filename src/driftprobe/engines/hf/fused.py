"""Fused projections: the ways in which models lay q, k and v out in one output, and which of them a model uses.

A layout is not read off the module's name: it is the one whose v is, bit for bit, the value that the model then gives
to its cache.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor
LAYOUTS = ("concatenated", "per_head", "per_group", "latent")


def split(layout: str, fused: Tensor, heads: int, groups: int, value_dim: int = 0) -> dict[str, Tensor]:
    """Return tap -> `[B, T, heads, D]` of a fused output; nothing where the layout is unknown or does not fit.

    `concatenated`: all of q, all of k, all of v (Phi-3, GPT-2). `per_head`: q, k, v of head 0, of head 1, … (BLOOM,
    GPT-NeoX). `per_group`: the queries of a group, its k, its v, then the next group (Falcon). `latent:D`: for each
    head its share of k, then its v of size D (DeepSeek).
    """
    name, _, size = layout.partition(":")
    width, lead = fused.shape[-1], fused.shape[:-1]
    if name == "latent":
        value = value_dim or int(size or 0)
        return {"v_proj": fused.reshape(*lead, heads, -1)[..., -value:]} if value and width % heads == 0 else {}
    if not heads or not groups or width % (heads + 2 * groups):
        return {}
    dim = width // (heads + 2 * groups)
    if name == "concatenated":
        q, k, v = torch.split(fused, [heads * dim, groups * dim, groups * dim], dim=-1)
        parts = (q.reshape(*lead, heads, dim), k.reshape(*lead, groups, dim), v.reshape(*lead, groups, dim))
    elif name == "per_head" and groups == heads:
        q, k, v = fused.reshape(*lead, heads, 3, dim).unbind(-2)
        parts = (q, k, v)
    elif name == "per_group" and heads % groups == 0:
        grouped = fused.reshape(*lead, groups, heads // groups + 2, dim)
        parts = (grouped[..., :-2, :].reshape(*lead, heads, dim), grouped[..., -2, :], grouped[..., -1, :])
    else:
        return {}
    return dict(zip(("q_proj", "k_proj", "v_proj"), parts, strict=True))


def find_layout(fused: Tensor, value_TGD: Tensor, row: int, heads: int, groups: int) -> str | None:
    """Return the layout whose v of a row is the value that the cache was given, once for each of its heads."""
    for name in LAYOUTS:
        layout = f"latent:{value_TGD.shape[-1]}" if name == "latent" else name
        value = split(layout, fused, heads, groups).get("v_proj")
        if value is None or value.dim() != 4 or value_TGD.shape[1] % value.shape[2]:
            continue
        found = value[0, row].repeat_interleave(value_TGD.shape[1] // value.shape[2], dim=0)
        if same_bits(found, value_TGD[0]):
            return layout
    return None


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, bit for bit (a NaN is itself)."""
    if left.numel() != right.numel() or left.dtype != right.dtype:
        return False
    a, b = left.contiguous().view(-1), right.contiguous().view(-1)
    return bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8)))
