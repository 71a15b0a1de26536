"""Hypotheses about states: inputs that a convolution has lost, and a recurrent state that began anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from driftprobe.fingerprint import Float64
from driftprobe.hypotheses.base import Prediction
from driftprobe.scene import Scene

_NOTHING = 0.01
"""A factor below this leaves nothing of a state: it began anew."""
_LARGEST = 4.0
"""Largest factor that is looked for."""


def conv_window(scene: Scene) -> Iterator[Prediction]:
    """Prefill's convolution state `[C, W]` with its oldest inputs zero; the newest is the step's own token."""
    layer, reference = scene.failure.layer, scene.reference(scene.failure.layer, "conv_state")
    if reference is None or reference.ndim != 2:
        return
    for lost in range(1, reference.shape[1]):
        predicted = reference.copy()
        predicted[:, :lost] = 0.0
        yield Prediction("conv_window", {"lost": lost}, layer, "conv_state", predicted)


def recurrent(scene: Scene) -> Iterator[Prediction]:
    """A state that began anew, or that was carried over times a factor f, `[H, D, N]`, one matrix a head, or `[C, N]`.

    A step keeps of the state what a linear map of it gives, and adds an outer product (Mamba; Gu and Dao 2023, section
    3.2: h' = Ā h + B̄ x; the delta rule: Yang et al. 2024). So what was carried over times f leaves f × prefill's state
    and 1 − f times that product: candidate − f × prefill's is of rank one, and of no other f is it so.
    """
    layer, candidate = scene.failure.layer, scene.candidate(scene.failure.layer, "ssm_state")
    if candidate is None or candidate.ndim not in (2, 3) or min(candidate.shape[-2:]) < 2:
        return
    if not np.isfinite(candidate).all():
        return
    fitted = candidate.size // candidate.shape[-1] + candidate.size // candidate.shape[-2]
    yield Prediction("state_lost", {}, layer, "ssm_state", _rank_one(candidate), fitted)
    reference = scene.reference(layer, "ssm_state")
    if reference is None or reference.shape != candidate.shape or not np.isfinite(reference).all():
        return
    factor = _carried(candidate, reference)
    if factor > _NOTHING:
        predicted = factor * reference + _rank_one(candidate - factor * reference)
        yield Prediction("state_scaled", {"factor": factor}, layer, "ssm_state", predicted, fitted + 1)


def _carried(candidate: Float64, reference: Float64) -> float:
    """Return the factor in [0, _LARGEST] at which candidate − factor × reference is nearest to matrices of rank one."""
    factor = _roughly_carried(candidate, reference)
    for _ in range(8):  # Gauss and Newton: what is beside rank one, along what of the reference is beside it
        left, _, right = np.linalg.svd(candidate - factor * reference, full_matrices=False)
        u, v = left[..., :1], right[..., :1, :]
        beside_candidate, beside = _beside(candidate, u, v), _beside(reference, u, v)
        size = float(np.square(beside).sum())
        if size == 0.0:
            break
        factor = float((beside_candidate * beside).sum()) / size
    return factor


def _roughly_carried(candidate: Float64, reference: Float64) -> float:
    """Return the best factor of a grid.

    What a matrix M has beside rank one is its squared size less its largest squared singular value, which is the
    largest eigenvalue of M Mᵀ; and that is quadratic in the factor, so it is made once.
    """
    if candidate.shape[-2] > candidate.shape[-1]:
        candidate, reference = candidate.swapaxes(-1, -2), reference.swapaxes(-1, -2)
    own, mixed, of_reference = (left @ right.swapaxes(-1, -2) for left, right in (
        (candidate, candidate), (candidate, reference), (reference, reference)))  # fmt: skip
    mixed = mixed + mixed.swapaxes(-1, -2)
    grid = np.linspace(0.0, _LARGEST, 81)
    grams = (own - factor * mixed + factor**2 * of_reference for factor in grid)
    beside = [float((np.trace(g, axis1=-2, axis2=-1) - np.linalg.eigvalsh(g)[..., -1]).sum()) for g in grams]
    return float(grid[int(np.argmin(beside))])


def _beside(matrices: Float64, left: Float64, right: Float64) -> Float64:
    """Return the matrices without what has the column `left` or the row `right`, both of size one."""
    rows = matrices - left @ (left.swapaxes(-1, -2) @ matrices)
    return np.asarray(rows - (rows @ right.swapaxes(-1, -2)) @ right)


def _rank_one(matrices: Float64) -> Float64:
    """Return the best approximation of rank one of each matrix (Eckart and Young 1936)."""
    left, sizes, right = np.linalg.svd(matrices, full_matrices=False)
    best: Float64 = left[..., :, :1] * sizes[..., None, :1] * right[..., :1, :]
    return best


HYPOTHESES: tuple[Callable[[Scene], Iterator[Prediction]], ...] = (conv_window, recurrent)
