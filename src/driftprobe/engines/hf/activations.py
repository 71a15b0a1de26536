"""Activations by what they compute, whatever a model calls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from driftprobe.engines.hf.anatomy import Layer

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
POINTS = torch.linspace(-4.0, 4.0, 33, dtype=torch.float64)
"""Where an activation is looked at: docs/trace-format.md, `mlp_out.activation`."""
_TOLERANCE = 1e-5
"""Largest difference at these points; the two kinds of GELU are 5e-4 apart."""


def values_of(activation: Any) -> torch.Tensor | None:
    """Return an activation's values at POINTS, in float64; None where it is no function of one tensor."""
    try:
        with torch.no_grad():
            values = activation(POINTS.clone())
    except (RuntimeError, TypeError, ValueError):
        return None
    return values if isinstance(values, torch.Tensor) and values.shape == POINTS.shape else None


def name_of(activation: Any) -> str:
    """Return the name of an activation, or an empty string where it is none of FUNCTIONS."""
    values = values_of(activation)
    if values is None:
        return ""
    gaps = {name: float((function(POINTS) - values).abs().max()) for name, function in FUNCTIONS.items()}
    name = min(gaps, key=gaps.__getitem__)
    return name if gaps[name] <= _TOLERANCE else ""


_ATTRIBUTES = ("act_fn", "act", "activation_fn", "gelu_impl")


def activations(layer: Layer) -> list[tuple[Any, str]]:
    """Return (owner, attribute) of what may be an activation in a layer's MLP."""
    owners = [*(layer.mlp_in.modules() if layer.mlp_in is not None else ()), layer.module]
    owners += [module for name, module in layer.module.named_children() if name == "mlp"]
    found = {(id(owner), name): (owner, name) for owner in owners for name in _ATTRIBUTES if hasattr(owner, name)}
    return list(found.values())


def activation_of(layer: Layer) -> torch.Tensor | None:
    """Return the values at POINTS of a layer's activation, where all that it has are one function."""
    found = [v for owner, name in activations(layer) if (v := values_of(getattr(owner, name))) is not None]
    return found[0] if found and all(torch.equal(found[0], other) for other in found) else None
