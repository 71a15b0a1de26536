"""Hypotheses about the output head: its soft-cap, its scale, rows of it that are old."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from driftprobe.fingerprint import Float64
from driftprobe.hypotheses.ops import linear
from driftprobe.hypotheses.view import Guess, Guesses, View

MOST_STALE = 0.25
"""Largest share of the vocabulary that can be old: the rest must show what agrees."""
_BEYOND = 20.0
"""How far beyond the differences of tokens that agree an old one stands, at least."""


@dataclass(frozen=True)
class Head:
    """Logits before scale and soft-cap, and those two."""

    raw: Float64
    scale: float
    cap: float

    def result(self, *, capped: bool = True) -> Float64:
        """Return the logits."""
        scaled = self.raw * self.scale
        return np.asarray(self.cap * np.tanh(scaled / self.cap)) if self.cap and capped else scaled


def head_of(view: View) -> Head | None:
    """Return the output head's logits for this arm's final norm, or None where its weights are not in the trace."""
    weight = view.constant("logits.weight")
    raw = None if weight is None else linear(view, weight)
    if raw is None:
        return None
    return Head(raw, view.number("logits.scale") or 1.0, view.number("logits.softcap") or 0.0)


def guesses(view: View) -> Guesses:
    """Yield what the logits would be under each cause."""
    result = view.result()
    if view.tensor != "logits" or result is None:
        return
    head, cap = head_of(view), view.number("logits.softcap")
    expected = view.of_other() if head is None else head.result()
    if expected is None or expected.shape != result.shape:
        return
    if head is not None and head.cap:
        yield Guess("logit_softcap", {}, head.result(capped=False))
    elif cap:
        with np.errstate(divide="ignore", invalid="ignore"):
            yield Guess("logit_softcap", {}, np.asarray(cap * np.arctanh(expected / cap)))
    size = float(np.square(expected).sum())
    if size:
        factor = float((expected * result).sum() / size)
        yield Guess("logit_scale", {"factor": factor}, factor * expected, fitted=1)
    tokens = _stale(view, expected)
    if tokens and len(tokens) <= MOST_STALE * result.size:
        predicted = expected.copy()
        predicted[..., list(tokens)] = result[..., list(tokens)]
        yield Guess("output_embedding", {"tokens": tokens}, predicted, fitted=len(tokens))


def _stale(view: View, expected: Float64) -> tuple[int, ...]:
    """Return the tokens whose logit differs in a way that those of most others do not."""
    result = view.result()
    if result is None:
        return ()
    gaps = np.abs(result - expected).reshape(-1)
    usual = float(np.quantile(gaps, 1.0 - MOST_STALE))
    rounding = float(np.sqrt(np.square(expected).mean())) * view.scene.failure.floor
    return tuple(int(i) for i in np.flatnonzero(gaps > max(_BEYOND * usual, rounding)))
