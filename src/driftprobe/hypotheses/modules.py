"""Hypotheses about modules: norms, projections, MLP and experts, the residual stream, logits.

Each looks at one arm alone, and says what its failing op would give under a cause; so the same hypotheses tell what is
wrong with decode, and, with the roles exchanged, with prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np

from driftprobe.hypotheses import experts, logits, mlp, norms, projections, residual, tables
from driftprobe.hypotheses.base import DECODE, PREFILL, Prediction
from driftprobe.hypotheses.blame import blame
from driftprobe.hypotheses.view import Guess, Guesses, View
from driftprobe.scene import Scene

_FAMILIES: tuple[Callable[[View], Guesses], ...] = (
    norms.guesses,
    projections.guesses,
    mlp.guesses,
    experts.guesses,
    residual.guesses,
    logits.guesses,
    tables.guesses,
)


def predictions(scene: Scene) -> Iterator[Prediction]:
    """Yield what the side at fault would have under each cause; both sides' where it is not known which one it is."""
    arm = scene.failure.arm
    views = {DECODE: View(scene, arm, "P"), PREFILL: View(scene, "P", arm)}
    told = blame(scene)
    for side, view in views.items():
        if told is None or told.side == side:
            for guess in chain.from_iterable(_guessed(family, view) for family in _FAMILIES):
                yield Prediction(guess.cause, guess.parameters, view.layer, view.tensor, guess.predicted,
                                 guess.fitted, side)  # fmt: skip


def _guessed(family: Callable[[View], Guesses], view: View) -> list[Guess]:
    """Return a family's guesses; none where a trace holds constants of shapes that do not go together."""
    try:
        with np.errstate(all="ignore"):
            return list(family(view))
    except (ValueError, IndexError):  # NumPy's words for shapes that do not fit
        return []


def longer_prefill(scene: Scene) -> Iterator[Prediction]:
    """What is left where a longer prefill differs and nothing else says why: prefill changes with its length."""
    result = scene.candidate(scene.failure.layer, scene.failure.tensor)
    if scene.failure.phase == "prefill_ext" and result is not None:
        yield Prediction("prefill_length", {}, scene.failure.layer, scene.failure.tensor, result, result.size)


HYPOTHESES: tuple[Callable[[Scene], Iterator[Prediction]], ...] = (predictions, longer_prefill)
