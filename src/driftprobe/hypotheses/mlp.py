"""Hypotheses about the MLP: another activation, a bias left out, weights rounded to a few bits."""

from __future__ import annotations

from dataclasses import replace

from driftprobe.hypotheses.ops import ACTIVATIONS, activation_name, mlp_input, mlp_of
from driftprobe.hypotheses.projections import quantised
from driftprobe.hypotheses.view import Guess, Guesses, View


def guesses(view: View) -> Guesses:
    """Yield what the failing MLP would give under each cause."""
    mlp, result = mlp_of(view), view.result()
    if view.tensor != "mlp_out" or mlp is None or result is None:
        return
    x, own = mlp_input(view, mlp.up.shape[1]), activation_name(view)
    if x is None:
        return
    for name, activation in ACTIVATIONS.items():
        if name != own:
            yield Guess("activation", {"name": name}, mlp(x, activation).reshape(result.shape))
    if not own:
        return
    for without in (("up",), ("down",), ("gate",), ("gate", "up"), ("up", "down"), ("gate", "up", "down")):
        if set(without) <= mlp.biases.keys():
            predicted = mlp(x, ACTIVATIONS[own], without)
            yield Guess("bias_missing", {}, predicted.reshape(result.shape))
    parts = {"up": mlp.up, "down": mlp.down, **({} if mlp.gate is None else {"gate": mlp.gate})}
    for kinds in zip(*(quantised(matrix) for matrix in parts.values()), strict=False):
        if len({bits for bits, _ in kinds}) == 1:
            rounded = replace(mlp, **dict(zip(parts, (matrix for _, matrix in kinds), strict=True)))
            yield Guess("weights_quantised", {"bits": kinds[0][0]}, rounded(x, ACTIVATIONS[own]).reshape(result.shape))
