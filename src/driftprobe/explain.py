"""explain(): the prediction of the fault dictionary that leaves the least of a failure unexplained."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from driftprobe.compare import SCORES
from driftprobe.fingerprint import Float64, l2_norm
from driftprobe.floor import LIMIT
from driftprobe.hypotheses import HYPOTHESES, Prediction
from driftprobe.hypotheses.base import MIN_EXPLAINED, PREFILL
from driftprobe.hypotheses.blame import blame
from driftprobe.hypotheses.sides import side_and_calls
from driftprobe.judgement import Diagnosis
from driftprobe.scene import Scene

PERFECT = 1e-12
"""Share of the squared difference that may be left where nothing is left: a millionth of it, which is rounding."""


def explain(scene: Scene) -> Diagnosis | None:
    """Return the cause whose prediction fits the failing tensor best, or None where none explains it."""
    if not _numbers(scene):
        return None
    found = [_judged(prediction, scene) for family in HYPOTHESES for prediction in family(scene)]
    fitting = [(prediction, diagnosis) for prediction, diagnosis in filter(None, found) if _fits(diagnosis, scene)]
    best = min(fitting, key=lambda pair: _rank(*pair), default=None)
    if best is None:
        return None
    if scene.failure.of_control:
        return replace(best[1], side=PREFILL)  # both arms are prefills
    told = blame(scene)
    if told is None:
        return best[1]
    return replace(best[1], side=told.side, parameters={**best[1].parameters, **side_and_calls(scene, told.side)})


def _numbers(scene: Scene) -> bool:
    """Whether the failing tensor holds numbers alone; the infinities of a mask are numbers in scores."""
    failing = scene.candidate(scene.failure.layer, scene.failure.tensor)
    if failing is None or scene.failure.tensor == SCORES:
        return failing is None or not np.isnan(failing).any()
    return bool(np.isfinite(failing).all())


def _rank(prediction: Prediction, found: Diagnosis) -> tuple[bool, float, int, float]:
    """The smallest residual is best, and of those that leave next to nothing the one that fits the fewest numbers.

    A prediction with a free number for every element comes after all others: it fits whatever is there.
    """
    left = 0.0 if 1.0 - found.explained <= PERFECT else found.residual
    return (prediction.fitted >= prediction.predicted.size, left, prediction.fitted, found.residual)


def _judged(prediction: Prediction, scene: Scene) -> tuple[Prediction, Diagnosis] | None:
    reference = scene.reference(prediction.layer, prediction.tensor)
    candidate = scene.candidate(prediction.layer, prediction.tensor)
    if prediction.side == PREFILL:  # the roles are exchanged: it says what prefill would have
        reference, candidate = candidate, reference
    if reference is None or candidate is None or candidate.shape != prediction.predicted.shape:
        return None
    size = l2_norm(reference[np.isfinite(reference)])
    left = distance(candidate, prediction.predicted)
    whole = distance(candidate, reference) if candidate.shape == reference.shape else math.inf
    residual = 0.0 if left == 0.0 else left / size if size > 0.0 else math.inf
    explained = 1.0 if math.isinf(whole) and math.isfinite(left) else 1.0 - (left / whole) ** 2 if whole else 0.0
    return prediction, Diagnosis(
        prediction.cause, prediction.parameters, prediction.layer, prediction.tensor, residual, explained
    )


def distance(left: Float64, right: Float64) -> float:
    """Return ‖left − right‖₂; equal infinities are equal, others are infinitely far apart."""
    alike = (left == right) | (np.isnan(left) & np.isnan(right))
    if not (np.isfinite(left) & np.isfinite(right) | alike).all():
        return math.inf
    return l2_norm(
        np.where(alike, 0.0, np.where(np.isfinite(left), left, 0.0) - np.where(np.isfinite(right), right, 0.0)).reshape(
            -1
        )
    )


def _fits(found: Diagnosis, scene: Scene) -> bool:
    cells = scene.judged.aligned_cells if scene.failure.arm == "A" else scene.judged.cells
    where = (scene.step, found.layer, found.tensor)
    floor = next((c.floor.value for c in cells if (c.step, c.layer, c.tensor) == where), scene.failure.floor)
    return found.residual <= LIMIT * floor and found.explained >= MIN_EXPLAINED
