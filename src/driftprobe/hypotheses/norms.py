"""Hypotheses about norms: another epsilon, another weight, no norm at all."""

from __future__ import annotations

import math

import numpy as np

from driftprobe.fingerprint import Float64
from driftprobe.hypotheses.ops import Norm, norm_input, norm_of
from driftprobe.hypotheses.view import Guess, Guesses, View

TAPS = frozenset({"attn_norm", "q_norm", "k_norm", "ffn_norm", "final_norm"})


def guesses(view: View) -> Guesses:
    """Yield what the failing norm would give under each cause."""
    x, result = norm_input(view), view.result()
    if view.tensor not in TAPS or x is None or result is None or x.size != result.size:
        return
    yield Guess("norm_missing", {}, x.reshape(result.shape))
    norm = norm_of(view, view.tensor)
    if norm is None:
        return
    y = result.reshape(x.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        delta = _epsilon(norm, x, y)
        if delta is not None:
            predicted = norm.normalised(x, norm.eps + delta) * norm.gain + norm.bias
            yield Guess("norm_epsilon", {"delta": delta}, predicted.reshape(result.shape), fitted=1)
        plain = norm.normalised(x)
        offset = float(((y - norm(x)) * plain).sum() / np.square(plain).sum())
        yield Guess("norm_offset", {"offset": offset}, (norm(x) + offset * plain).reshape(result.shape), fitted=1)


def _epsilon(norm: Norm, x: Float64, y: Float64) -> float | None:
    """Return by how much the epsilon is off, from the factor that all channels of a row have in common.

    y = s·m with m = (x − mean)·gain and s = 1/√(mean square + epsilon). A rounding error in s weighs (mean square +
    epsilon) in its row's epsilon, so rows are weighted by the inverse square of that.
    """
    moved = norm.moved(x)
    square = np.square(moved).mean(-1)
    plain = moved * norm.gain
    factor = ((y - norm.bias) * plain).sum(-1) / np.square(plain).sum(-1)
    found = 1.0 / np.square(factor) - square - norm.eps
    weight = 1.0 / np.square(square + norm.eps)
    delta = float((found * weight).sum() / weight.sum())
    usable = math.isfinite(delta) and bool((square + norm.eps + delta > 0.0).all()) and bool((factor > 0.0).all())
    return delta if usable else None
