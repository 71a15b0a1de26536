"""Hypotheses about states: inputs that a convolution has lost, and a recurrent state that began anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from driftprobe.fingerprint import Float64
from driftprobe.hypotheses.base import Prediction
from driftprobe.scene import Scene


def conv_window(scene: Scene) -> Iterator[Prediction]:
    """Prefill's convolution state `[C, W]` with its oldest inputs zero; the newest is the step's own token."""
    layer, reference = scene.failure.layer, scene.reference(scene.failure.layer, "conv_state")
    if reference is None or reference.ndim != 2:
        return
    for lost in range(1, reference.shape[1]):
        predicted = reference.copy()
        predicted[:, :lost] = 0.0
        yield Prediction("conv_window", {"lost": lost}, layer, "conv_state", predicted)


def state_lost(scene: Scene) -> Iterator[Prediction]:
    """The step's own token alone: its contribution is an outer product, so a state that began anew has rank one.

    One matrix a head, `[H, D, N]`, or one in all, `[C, N]` (Mamba; Gu and Dao 2023, section 3.2: h = Ā h + B̄ x).
    """
    layer, candidate = scene.failure.layer, scene.candidate(scene.failure.layer, "ssm_state")
    if candidate is None or candidate.ndim not in (2, 3) or min(candidate.shape[-2:]) < 2:
        return
    if not np.isfinite(candidate).all():
        return
    fitted = candidate.size // candidate.shape[-1] + candidate.size // candidate.shape[-2]
    yield Prediction("state_lost", {}, layer, "ssm_state", _rank_one(candidate), fitted)


def _rank_one(matrices: Float64) -> Float64:
    """Return the best approximation of rank one of each matrix (Eckart and Young 1936)."""
    left, sizes, right = np.linalg.svd(matrices, full_matrices=False)
    best: Float64 = left[..., :, :1] * sizes[..., None, :1] * right[..., :1, :]
    return best


HYPOTHESES: tuple[Callable[[Scene], Iterator[Prediction]], ...] = (conv_window, state_lost)
