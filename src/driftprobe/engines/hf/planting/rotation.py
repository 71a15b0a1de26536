"""Undoes a model's own rotary embedding: what a key was before it was rotated for its position."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from driftprobe.engines.hf.planting.base import Site

Tensor = torch.Tensor
_CLOSE = 16.0
"""Roundings of its dtype within which rotating back and forth must give the key again."""


def unrotated(site: Site, layer: int, keys_BGSD: Tensor, start: int) -> Tensor | None:
    """Return a layer's keys as they were before rotation, the first one of position `start`; None if it cannot be told.

    The model's own function rotates by the opposite angle; the result counts if rotating it again gives the keys.
    """
    attention: Any = site.anatomy.layers[layer].attention
    apply = inspect.unwrap(type(attention).forward).__globals__.get("apply_rotary_pos_emb")
    if apply is None:
        return None
    wide = keys_BGSD.to(torch.promote_types(keys_BGSD.dtype, torch.float32))
    positions = torch.arange(start, start + keys_BGSD.shape[2], device=keys_BGSD.device)[None]
    for cos, sin in _angles(site, attention, wide, positions):
        try:
            size = cos.square() + sin.square()  # attention_scaling squared, and what rounding has made of 1
            back = _rotate(apply, wide, cos / size, -sin / size)
            again = _rotate(apply, back, cos, sin)
        except (RuntimeError, TypeError, ValueError):
            continue
        allowed = _CLOSE * torch.finfo(keys_BGSD.dtype).eps * wide.norm()
        if again.shape == wide.shape and float((again - wide).norm()) <= float(allowed):
            return back
    return None


def _rotate(apply: Any, keys_BGSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate keys; a partial rotation leaves the last dimensions of a head as they are."""
    dims = cos.shape[-1]
    turned: Tensor = apply(keys_BGSD[..., :dims], keys_BGSD[..., :dims], cos, sin)[1]
    return torch.cat([turned, keys_BGSD[..., dims:]], dim=-1)


def _angles(site: Site, attention: Any, like: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield cos and sin of each rotary module that this layer could use."""
    kind = getattr(attention, "layer_type", None)
    for name, module in site.model.named_modules():
        if "rotary" not in name.rsplit(".", 1)[-1]:
            continue
        for extra in ((kind,), ()) if kind else ((),):
            try:
                found = module(like, positions, *extra)
            except (RuntimeError, TypeError, ValueError, AttributeError, KeyError):
                continue
            if isinstance(found, tuple) and len(found) == 2:
                yield found[0].to(like.dtype), found[1].to(like.dtype)
                break
