"""Which side is at fault: the one whose result its own inputs do not explain.

Either side may be the wrong one. Each side's op is replayed in float64 from what that side gave it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from driftprobe.compare import ratio
from driftprobe.fingerprint import Float64, l2_norm
from driftprobe.hypotheses.base import DECODE, PREFILL
from driftprobe.hypotheses.replay import replay
from driftprobe.hypotheses.view import View
from driftprobe.scene import Scene

AGREES, DIFFERS = 0.25, 0.5
"""Shares of the drift: a replay this near agrees, one so far off does not."""


@dataclass(frozen=True)
class Blame:
    """The side at fault, and how far each side is from the replay of its own op."""

    side: str
    decode: float
    """‖result − replay‖₂ / ‖replay‖₂ of the candidate."""
    prefill: float


def blame(scene: Scene) -> Blame | None:
    """Return the side whose result does not follow from its inputs, or None where the trace does not tell."""
    arm = scene.failure.arm
    decode, prefill = (_distance(View(scene, *arms)) for arms in ((arm, "P"), ("P", arm)))
    if decode is None or prefill is None:
        return None
    reference, candidate = (scene.tensor(a, scene.failure.layer, scene.failure.tensor) for a in ("P", arm))
    drift = None if reference is None or candidate is None else _relative(candidate, reference)
    if drift is None:
        return None
    for side, guilty, other in ((DECODE, decode, prefill), (PREFILL, prefill, decode)):
        if other <= AGREES * drift and guilty >= DIFFERS * drift:
            return Blame(side, decode, prefill)
    return None


def _distance(view: View) -> float | None:
    try:
        with np.errstate(all="ignore"):
            result, found = view.result(), replay(view)
    except (ValueError, IndexError):  # constants of shapes that do not go together explain nothing
        return None
    return None if result is None or found is None else _relative(result, found)


def _relative(result: Float64, reference: Float64) -> float | None:
    """Return the relative distance over elements that are finite on both sides; None where the shapes differ."""
    if result.shape != reference.shape:
        return None
    finite = np.isfinite(result) & np.isfinite(reference)
    if not finite.any():
        return None
    return ratio(l2_norm((result - reference)[finite]), l2_norm(reference[finite]))
