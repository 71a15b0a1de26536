"""The ops of a decoder in float64, from an arm's own captured inputs and the model's constants.

Axes legend: see taps.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from driftprobe.fingerprint import Float64
from driftprobe.hypotheses.view import View
from driftprobe.taps import linear_taps

_erf = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS: dict[str, Callable[[Float64], Float64]] = {
    "silu": lambda x: np.asarray(x / (1.0 + np.exp(-x))),
    "gelu": lambda x: np.asarray(0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))),
    "gelu_tanh": lambda x: np.asarray(0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))),
    "relu": lambda x: np.maximum(x, 0.0),
}
"""Hendrycks and Gimpel 2016 for both kinds of GELU."""
NORM_INPUTS = {"attn_norm": ("x_in",), "q_norm": ("q_proj",), "k_norm": ("k_proj",), "ffn_norm": ("x_mid", "x_in")}
MLP_INPUTS = ("ffn_norm", "x_mid", "attn_norm")


@dataclass(frozen=True)
class Norm:
    """A norm's formula, as docs/trace-format.md has it."""

    eps: float
    centred: bool
    gain: Float64 | float
    bias: Float64 | float

    def normalised(self, x: Float64, eps: float | None = None) -> Float64:
        """Return x with mean square 1, before weight and bias."""
        y = self.moved(x)
        return np.asarray(y / np.sqrt(np.square(y).mean(-1, keepdims=True) + (self.eps if eps is None else eps)))

    def moved(self, x: Float64) -> Float64:
        """Return x less its mean, where the norm takes it off."""
        return x - x.mean(-1, keepdims=True) if self.centred else x

    def __call__(self, x: Float64) -> Float64:
        """Return the norm of x."""
        return np.asarray(self.normalised(x) * self.gain + self.bias)


def norm_of(view: View, name: str) -> Norm | None:
    """Return a norm of the failing layer, or None where its constants are not in the trace."""
    eps, centred, offset = (view.number(f"{name}.{what}") for what in ("eps", "centred", "offset"))
    if eps is None or centred is None or offset is None:
        return None
    weight, bias = view.constant(f"{name}.weight"), view.constant(f"{name}.bias")
    return Norm(eps, bool(centred), 1.0 if weight is None else weight + offset, 0.0 if bias is None else bias)


def norm_input(view: View) -> Float64 | None:
    """Return what the failing norm was given, in the shape in which it norms."""
    if view.tensor == "final_norm":
        x = view.tap("x_out", view.scene.judged.engine.layers - 1)
    else:
        x = view.first(*NORM_INPUTS.get(view.tensor, ()))
    weight = view.constant(f"{view.tensor}.weight")
    if x is not None and weight is not None and weight.ndim == 1 and weight.size == x[0].size != x.shape[-1]:
        return x.reshape(len(x), -1)  # one norm over all heads together
    return x


def linear_input(view: View) -> Float64 | None:
    """Return what the failing projection was given, `[T, in]`; one of low rank, what stands before its last matrix."""
    x = view.first(*linear_taps(view.tensor))
    weight = view.constant(f"{view.tensor}.weight")
    norm = norm_of(view, f"{view.tensor}.low_norm")
    if x is not None and norm is not None:
        x = _latent(view, x.reshape(len(x), -1), norm)
    if x is None or weight is None or weight.ndim != 2 or x[0].size != weight.shape[1]:
        return None
    return x.reshape(len(x), -1)


def _latent(view: View, x: Float64, norm: Norm) -> Float64 | None:
    """Return norm(low · x + bias): what a projection of low rank (DeepSeek-V2, 2024, section 2.1.3) multiplies last."""
    low, bias = (view.constant(f"{view.tensor}.low.{name}") for name in ("weight", "bias"))
    if low is None or low.ndim != 2 or low.shape[1] != x.shape[1]:
        return None
    return norm(x @ low.T + (0.0 if bias is None else bias))


def linear(view: View, weight: Float64, *, biased: bool = True) -> Float64 | None:
    """Return the failing projection's result with these weights, in the shape of the captured one."""
    x, result = linear_input(view), view.result()
    if x is None or result is None:
        return None
    bias = view.constant(f"{view.tensor}.bias")
    y = x @ weight.T + (0.0 if bias is None or not biased else bias)
    return y.reshape(result.shape) if y.size == result.size else None


def activation_name(view: View) -> str:
    """Return the name of the failing layer's activation, or an empty string."""
    values = view.constant("mlp_out.activation")
    if values is None:
        return ""
    points = np.linspace(-4.0, 4.0, values.size)
    gaps = {name: float(np.abs(function(points) - values).max()) for name, function in ACTIVATIONS.items()}
    best = min(gaps, key=gaps.__getitem__)
    return best if gaps[best] < 1e-5 else ""


@dataclass(frozen=True)
class Mlp:
    """The matrices of a plain MLP, `[out, in]` each."""

    gate: Float64 | None
    up: Float64
    down: Float64
    biases: dict[str, Float64]

    def __call__(self, x: Float64, act: Callable[[Float64], Float64], without: tuple[str, ...] = ()) -> Float64:
        """Return down(act(gate x) · up x), or down(act(up x)); `without` names biases that are left out."""
        used = {name: bias for name, bias in self.biases.items() if name not in without}
        up = x @ self.up.T + used.get("up", 0.0)
        inner = act(up) if self.gate is None else act(x @ self.gate.T + used.get("gate", 0.0)) * up
        return np.asarray(inner @ self.down.T + used.get("down", 0.0))


def mlp_of(view: View) -> Mlp | None:
    """Return the failing layer's MLP, or None where its matrices are not in the trace."""
    gate, up, down = (view.constant(f"mlp_out.{name}.weight") for name in ("gate", "up", "down"))
    if up is None or down is None or up.shape[0] != down.shape[1]:
        return None
    found = {name: view.constant(f"mlp_out.{name}.bias") for name in ("gate", "up", "down")}
    return Mlp(gate, up, down, {name: bias for name, bias in found.items() if bias is not None})


def mlp_input(view: View, width: int) -> Float64 | None:
    """Return what the failing layer's MLP was given, `[T, C]`, or None where it has another width."""
    x = view.first(*MLP_INPUTS)
    return x if x is not None and x.shape[-1] == width else None
