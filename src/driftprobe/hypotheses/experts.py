"""Hypotheses about experts: their order, the weights of their sum, an expert left out.

Axes: X experts, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from driftprobe.fingerprint import Float64
from driftprobe.hypotheses.ops import ACTIVATIONS, activation_name, mlp_input
from driftprobe.hypotheses.view import Guess, Guesses, View

_USED = 0.01
"""Share of the largest coefficient from which an expert counts as used."""


@dataclass(frozen=True)
class Mixture:
    """One token's experts: what each of them gives, which were chosen, and with what weight."""

    results_XC: Float64
    chosen: tuple[int, ...]
    probabilities: Float64
    """Softmax of the router's logits, of the chosen experts."""
    renormalised: bool | None

    @property
    def weights(self) -> Float64:
        """The weights of the sum, as the model makes them."""
        total = float(self.probabilities.sum())
        return self.probabilities / total if self.renormalised else self.probabilities

    def sum(self, experts: tuple[int, ...], weights: Float64) -> Float64:
        """Return the weighted sum of experts' results."""
        return np.asarray(weights @ self.results_XC[list(experts)])


def mixture_of(view: View, activation: str = "") -> Mixture | None:
    """Return the failing layer's mixture for its token, or None where the trace does not hold what it needs.

    `activation` takes the place of the model's own.
    """
    gate, up, down = (view.constant(f"mlp_out.experts.{name}") for name in ("gate", "up", "down"))
    logits, name, count = (
        view.tap("router_logits"),
        activation or activation_name(view),
        view.number("expert_ids.count"),
    )
    if gate is None or up is None or down is None or logits is None or not name or not count:
        return None
    x = mlp_input(view, up.shape[2])
    if x is None or len(x) != 1 or logits.size != len(up):
        return None
    inner = ACTIVATIONS[name](np.einsum("xoc,c->xo", gate, x[0])) * np.einsum("xoc,c->xo", up, x[0])
    shares = np.exp(logits[0] - logits.max())
    shares = shares / shares.sum()
    ids = view.tap("expert_ids")
    chosen = np.argsort(-shares, kind="stable")[: int(count)] if ids is None else ids.reshape(-1).astype(int)
    told = view.number("expert_ids.renormalised")
    return Mixture(np.einsum("xco,xo->xc", down, inner), tuple(int(i) for i in chosen), shares[chosen],
                   None if told is None else bool(told))  # fmt: skip


def expert_sum(view: View) -> Float64 | None:
    """Return the failing mixture's sum, where it is known how its weights are made."""
    mixture = mixture_of(view)
    if mixture is None or mixture.renormalised is None:
        return None
    return mixture.sum(mixture.chosen, mixture.weights)


def guesses(view: View) -> Guesses:
    """Yield what the failing mixture would give under each cause."""
    mixture, result = (mixture_of(view) if view.tensor == "mlp_out" else None), view.result()
    if mixture is None or result is None or mixture.renormalised is None or result.size != mixture.results_XC.shape[1]:
        return
    whole, weights, chosen = mixture.sum(mixture.chosen, mixture.weights), mixture.weights, mixture.chosen
    total = float(mixture.probabilities.sum())
    factor = total if mixture.renormalised else 1.0 / total
    yield Guess("expert_weights", {"factor": factor}, (factor * whole).reshape(result.shape))
    for name in ACTIVATIONS:
        other = mixture_of(view, name) if name != activation_name(view) else None
        if other is not None:
            yield Guess("activation", {"name": name}, other.sum(chosen, weights).reshape(result.shape))
    for place, expert in enumerate(chosen):
        rest = np.where(np.arange(len(chosen)) == place, 0.0, weights)
        for kept in (rest, rest / rest.sum() if rest.any() else rest):
            yield Guess("expert_dropped", {"expert": expert}, mixture.sum(chosen, kept).reshape(result.shape))
    used = _used(mixture, result.reshape(-1))
    if len(used) == len(chosen) and set(used) != set(chosen):
        order = np.argsort(-weights, kind="stable")
        matched = dict(zip((chosen[i] for i in order), used, strict=True))
        experts = tuple(matched[expert] for expert in chosen)
        parameters = {"chosen": chosen, "used": experts}
        yield Guess("expert_order", parameters, mixture.sum(experts, weights).reshape(result.shape))
    elif set(used) == set(chosen):
        yield from _permuted(mixture, used, result)


def _permuted(mixture: Mixture, used: tuple[int, ...], result: Float64) -> Guesses:
    """The same experts with each other's weights."""
    order = np.argsort(-mixture.weights, kind="stable")
    matched = dict(zip((mixture.chosen[i] for i in order), used, strict=True))
    experts = tuple(matched[expert] for expert in mixture.chosen)
    if experts != mixture.chosen:
        predicted = mixture.sum(experts, mixture.weights).reshape(result.shape)
        yield Guess("expert_order", {"chosen": mixture.chosen, "used": experts}, predicted)


def _used(mixture: Mixture, result: Float64) -> tuple[int, ...]:
    """Return the experts whose results add up to this one, the one of most weight first."""
    coefficients = np.linalg.lstsq(mixture.results_XC.T, result, rcond=None)[0]
    size = np.abs(coefficients)
    return tuple(int(i) for i in np.argsort(-size, kind="stable") if size[i] > _USED * size.max())
