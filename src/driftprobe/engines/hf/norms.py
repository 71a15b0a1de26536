"""Which norm a module computes, told by running it: layer or root-mean-square norm, and what is added to its weight.

Names and classes do not say it: Gemma's norm multiplies by 1 + weight, and some norms have no weight at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

EPSILON = ("variance_epsilon", "eps", "epsilon")
"""What norms call the number that keeps their division finite."""
_TOLERANCE = 1e-3
"""How far a formula may be from the module's own result, relative: float16 rounds by less."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm's formula: (x − mean if centred) / √(mean square + eps) × (weight + offset) + bias."""

    centred: bool
    offset: float
    eps: float
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def recognise(module: Any) -> Norm | None:
    """Return the formula that gives what the module gives, or None where none does."""
    weight, bias = (_tensor(getattr(module, name, None)) for name in ("weight", "bias"))
    eps = next((float(v) for name in EPSILON if isinstance(v := getattr(module, name, None), float)), None)
    if eps is None:
        return None
    probe = _probe(weight)
    try:
        with torch.no_grad():
            result = module(probe.to(weight.dtype if weight is not None else torch.float32))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    if not isinstance(result, torch.Tensor) or result.shape != probe.shape:
        return None
    for centred in (False, True):
        for offset in (0.0, 1.0):
            norm = Norm(centred, offset, eps, weight, bias)
            error = float((_compute(norm, probe.double()) - result.double()).norm() / result.double().norm())
            if error <= _TOLERANCE * (8.0 if result.dtype == torch.bfloat16 else 1.0):
                return norm
    return None


def _compute(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    if norm.centred:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    if norm.weight is not None:
        y = y * (norm.weight.double() + norm.offset)
    return y if norm.bias is None else y + norm.bias.double()


def _probe(weight: torch.Tensor | None) -> torch.Tensor:
    """Return an input with a mean and a size that no norm leaves as they are; the same every time."""
    shape = tuple(weight.shape) if weight is not None else (8,)
    count = 1
    for n in shape:
        count *= n
    wave = torch.cos(torch.arange(count, dtype=torch.float32) * 1.7) * 3.0 + 1.0
    return wave.reshape(1, 1, *shape).to(weight.device if weight is not None else "cpu")


def _tensor(value: object) -> torch.Tensor | None:
    return value.detach() if isinstance(value, torch.Tensor) and value.dim() > 0 else None
