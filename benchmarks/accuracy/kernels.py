"""Attention kernels that compute the same in another order or precision: what engines run in decode and not in prefill.

Each takes the query, key, value and mask that a transformers attention function takes, and returns `[B, T, H, D]`.
None calls torch's softmax on the whole row in another order than the keys stand in: what is heard is what is meant.

Axes: B batch, H query heads, T tokens, S key rows, D head dimension. Sources: online softmax, Milakov and Gimelshein
(2018); split keys merged by their log-sum-exp, Dao et al. (flash decoding, 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Inputs:
    """One call, keys and values repeated for every query head, the mask as a sum or None."""

    query_BHTD: Tensor
    key_BHSD: Tensor
    value_BHSD: Tensor
    bias_BHTS: Tensor | None
    scale: float
    softcap: float | None
    sinks_H: Tensor | None


Kernel = Callable[[Inputs], Tensor]


def scores(given: Inputs, low: int = 0, high: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Return scaled, capped and masked scores over key rows [low, high), in float32 or wider unless told otherwise."""
    wide = dtype or torch.promote_types(given.query_BHTD.dtype, torch.float32)
    found = given.query_BHTD.to(wide) @ given.key_BHSD[:, :, low:high].to(wide).transpose(2, 3) * given.scale
    if given.softcap:
        found = torch.tanh(found / given.softcap) * given.softcap
    return found if given.bias_BHTS is None else found + given.bias_BHTS[..., low:high].to(wide)


def online(given: Inputs, tile: int = 8) -> Tensor:
    """Online softmax over tiles of keys: running maximum, sum and weighted values."""
    return _merged([_part(given, low, low + tile) for low in range(0, given.key_BHSD.shape[2], tile)], given)


def reversed_order(given: Inputs) -> Tensor:
    """The last key first, one at a time."""
    rows = given.key_BHSD.shape[2]
    return _merged([_part(given, row, row + 1) for row in reversed(range(rows))], given)


def split(parts: int) -> Kernel:
    """Return a kernel that splits the keys, as flash decoding does, and merges the parts by their log-sum-exp."""

    def kernel(given: Inputs) -> Tensor:
        rows = given.key_BHSD.shape[2]
        size = -(-rows // parts)
        return _merged([_part(given, low, min(low + size, rows)) for low in range(0, rows, size)], given)

    return kernel


def _part(given: Inputs, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maximum, the sum of exponentials and the weighted values of some keys."""
    part = scores(given, low, high)
    top = part.amax(dim=-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))  # every key of this part may be masked
    weights = torch.exp(part - top)
    return top, weights.sum(dim=-1, keepdim=True), weights @ given.value_BHSD[:, :, low:high].to(weights.dtype)


def _merged(parts: list[tuple[Tensor, Tensor, Tensor]], given: Inputs) -> Tensor:
    top, total, values = parts[0]
    for other_top, other_total, other_values in parts[1:]:
        new = torch.maximum(top, other_top)
        mine, theirs = torch.exp(top - new), torch.exp(other_top - new)
        top, total, values = new, total * mine + other_total * theirs, values * mine + other_values * theirs
    if given.sinks_H is not None:
        total = total + torch.exp(given.sinks_H.to(total.dtype).reshape(1, -1, 1, 1) - top)
    return (values / total).to(given.query_BHTD.dtype).transpose(1, 2)


def _plain(given: Inputs, in_scores: torch.dtype, in_softmax: torch.dtype) -> Tensor:
    found = scores(given, dtype=in_scores).to(in_softmax)
    if given.sinks_H is not None:
        sinks = given.sinks_H.to(in_softmax).reshape(1, -1, 1, 1).expand(*found.shape[:3], 1)
        found = torch.cat([found, sinks], dim=-1)
    probs = torch.softmax(found, dim=-1)[..., : given.key_BHSD.shape[2]].to(given.value_BHSD.dtype)
    return (probs @ given.value_BHSD).transpose(1, 2).contiguous()


def softmax_wide(given: Inputs) -> Tensor:
    """Scores in the model's dtype, softmax in float32 (or wider, where the model is)."""
    return _plain(given, given.query_BHTD.dtype, torch.promote_types(given.query_BHTD.dtype, torch.float32))


def softmax_own(given: Inputs) -> Tensor:
    """Scores and softmax in the model's own dtype, each step of it: torch's own computes in float32 inside."""
    found = scores(given, dtype=given.query_BHTD.dtype)
    top = found.amax(dim=-1, keepdim=True)
    weights = torch.exp(found - top)
    total = weights.sum(dim=-1, keepdim=True)
    if given.sinks_H is not None:
        total = total + torch.exp(given.sinks_H.to(total.dtype).reshape(1, -1, 1, 1) - top)
    return ((weights / total) @ given.value_BHSD).transpose(1, 2).contiguous()


def query_scaled(given: Inputs) -> Tensor:
    """The scale goes into the query before the product, not onto the scores after it."""
    scaled = Inputs(given.query_BHTD * given.scale, given.key_BHSD, given.value_BHSD, given.bias_BHTS, 1.0,
                    given.softcap, given.sinks_H)  # fmt: skip
    return _plain(scaled, given.query_BHTD.dtype, torch.promote_types(given.query_BHTD.dtype, torch.float32))


def keys_float16(given: Inputs) -> Tensor:
    """Keys and query go through float16 whatever the cache holds, as in llama.cpp's flash attention."""
    dtype = given.query_BHTD.dtype
    rounded = Inputs(given.query_BHTD.half().to(dtype), given.key_BHSD.half().to(dtype), given.value_BHSD,
                     given.bias_BHTS, given.scale, given.softcap, given.sinks_H)  # fmt: skip
    return online(rounded)


def fused(backend: str) -> Kernel:
    """Return torch's scaled_dot_product_attention, held to one of its backends where this torch can hold it."""

    def kernel(given: Inputs) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if given.softcap or given.sinks_H is not None:
            raise NotImplementedError("scaled_dot_product_attention has no soft-cap and no sinks")
        with sdpa_kernel(getattr(SDPBackend, backend)):
            output = torch.nn.functional.scaled_dot_product_attention(
                given.query_BHTD, given.key_BHSD, given.value_BHSD, scale=given.scale,
                attn_mask=None if given.bias_BHTS is None else given.bias_BHTS.to(given.query_BHTD.dtype),
            )  # fmt: skip
        return output.transpose(1, 2).contiguous()

    return kernel


def padded(pads: int, *, left: bool) -> Kernel:
    """Return a kernel of a batch of two whose keys are padded on one side, the pads masked; ours is the first row."""

    def kernel(given: Inputs) -> Tensor:
        where = (pads, 0) if left else (0, pads)
        rows = given.key_BHSD.shape[2]
        mask = torch.nn.functional.pad(
            torch.zeros(1, 1, 1, rows, dtype=given.query_BHTD.dtype), where, value=-torch.inf
        )
        bias = mask if given.bias_BHTS is None else mask + torch.nn.functional.pad(given.bias_BHTS, where)
        key, value = (torch.nn.functional.pad(t, (0, 0, *where)) for t in (given.key_BHSD, given.value_BHSD))
        both = Inputs(torch.cat([given.query_BHTD, given.query_BHTD.flip(-1)]), torch.cat([key, key]),
                      torch.cat([value, value]), bias, given.scale, given.softcap, given.sinks_H)  # fmt: skip
        dtype = given.query_BHTD.dtype
        return _plain(both, dtype, torch.promote_types(dtype, torch.float32))[:1]

    return kernel


def prepare(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float,
    softcap: float | None, sinks: Tensor | None,
) -> Inputs:  # fmt: skip
    """Return the inputs of a kernel from those of a transformers attention function."""
    repeat = query.shape[1] // key.shape[1]
    bias = mask
    if mask is not None:
        bias = mask[..., : key.shape[2]]
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, -torch.inf)
    return Inputs(query, key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1), bias, scale,
                  softcap, sinks)  # fmt: skip
