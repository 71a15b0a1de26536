"""What a projection of two paths does where nothing known explains it: another bias, a few outputs, other weights.

A path is judged at many positions, and what is wrong shows in how the change of the result depends on the input there.
Axes: P positions, I inputs, O outputs.
"""

from __future__ import annotations

import numpy as np

from driftprobe.fingerprint import Float64, l2_norm
from driftprobe.floor import LIMIT
from driftprobe.hypotheses.view import Guess, Guesses, View
from driftprobe.judgement import Status
from driftprobe.taps import linear_taps
from driftprobe.trace import CALL_TOKENS

_ALIKE = 1e-6
"""Below this share of the largest, a singular value is rounding of the largest's own."""
_FEW = 8
"""Outputs are few where they are no more than one in so many."""
_EVIDENCE = 5.0
"""Nats by which one change of the weights must explain the changes better than errors that are free at each position:
odds of 150 to 1 (Kass and Raftery 1995 call as much strong)."""


_SMOOTH = 0.25
"""Share of what independent changes would differ by, below which they follow from the result."""


def of_paths(view: View, weight: Float64) -> Guesses:
    """Yield what is left where nothing else fits. One position alone cannot tell, and says nothing.

    A change that is the same vector everywhere is another bias; one of a few outputs is named by them. Other weights
    are only named where the change depends on the input as theirs would: of less rank than the positions can show it
    is an adapter's, else `_of_weights` asks. Where positions pass in calls of the same kind, the weights are innocent.
    """
    result, inputs = view.result(), next((found for tap in linear_taps(view.tensor) if (found := view.rows(tap))), {})
    results, bias = view.rows(view.tensor), view.constant(f"{view.tensor}.bias")
    at = [
        position
        for position, status in view.scene.positions.items()
        if status is Status.FAIL and position in inputs and position in results
        if np.isfinite(inputs[position]).all() and np.isfinite(results[position]).all()
    ]
    if result is None or len(at) < 2 or _spared(view, at):
        return
    x_PI = np.stack([inputs[p].reshape(-1) for p in at])
    plain = x_PI @ weight.T + (0.0 if bias is None else bias)
    changes_PO = np.stack([results[p].reshape(-1) for p in at]) - plain
    noise = LIMIT * view.scene.failure.floor * l2_norm(plain.reshape(-1))
    yield from _told(result, weight, (x_PI, plain, changes_PO), noise)


def _told(result: Float64, weight: Float64, seen: tuple[Float64, Float64, Float64], noise: float) -> Guesses:
    """Yield the one reading of the changes that they allow; `noise` is what rounding does to all of them together."""
    x_PI, plain, changes_PO = seen
    size = l2_norm(changes_PO.reshape(-1))
    allowed = max(noise, 1e-3 * size)
    common = changes_PO.mean(axis=0)
    few = _few(changes_PO, allowed)
    rank = rank_of(changes_PO, noise)
    each = noise / plain.size**0.5
    if l2_norm((changes_PO - common).reshape(-1)) <= allowed:
        error = l2_norm(common) * len(plain) ** 0.5 / l2_norm(plain.reshape(-1))
        yield Guess("bias_other", {"error": error}, result, fitted=result.size)
    elif few:
        yield Guess("outputs_other", {"outputs": few}, result, fitted=result.size)
    elif rank < min(len(x_PI), *weight.shape):
        yield Guess("adapter", {"rank": rank}, result, fitted=result.size)
    else:
        error = _relative_error(weight, x_PI, changes_PO, each)
        if not _of_result(plain, changes_PO) and _of_weights(weight, x_PI, changes_PO, (error, each)):
            yield Guess("weights_other", {"error": error}, result, fitted=result.size)


def _spared(view: View, failing: list[int]) -> bool:
    """Whether a position passes in a call of a kind (one token, several) that fails elsewhere: it has those weights."""
    sizes = view.scene.measured(CALL_TOKENS, view.arm)
    kinds = {sizes[p] == 1 if p in sizes else None for p in failing}
    passing = [p for p, status in view.scene.positions.items() if status is Status.PASS]
    return any((sizes[p] == 1 if p in sizes else None) in kinds for p in passing)


def _few(changes_PO: Float64, allowed: float) -> tuple[int, ...]:
    """Return the outputs that alone differ, where they are few; an empty tuple where they are not."""
    sizes = np.square(changes_PO).sum(axis=0)
    ranked = np.argsort(-sizes, kind="stable")
    beyond = np.sqrt(np.maximum(sizes.sum() - np.cumsum(sizes[ranked]), 0.0)) > allowed
    count = int(beyond.sum()) + 1
    return tuple(sorted(int(o) for o in ranked[:count])) if count * _FEW <= len(sizes) else ()


def _of_result(plain: Float64, changes_PO: Float64) -> bool:
    """Whether the change follows from the right result alone, element by element, as where results are clipped.

    Elements whose results are neighbours in size then have like changes: the mean square of their differences is far
    below twice the variance, which it is where the changes are independent of the result (von Neumann 1941).
    """
    ranked = changes_PO.reshape(-1)[np.argsort(plain.reshape(-1), kind="stable")]
    variance = float(ranked.var())
    return bool(variance > 0.0 and float(np.square(np.diff(ranked)).mean()) < _SMOOTH * 2.0 * variance)


def _relative_error(weight: Float64, x_PI: Float64, changes_PO: Float64, noise: float) -> float:
    """Return the e of weights that are each off by w·e·n, n of mean square 1: what most likely gives such changes.

    The changes of output o at all positions then have the covariance e² X diag(w²) Xᵀ. Its directions in which
    rounding, `noise` an element, would show beside e are left out. Standard error: e / √(2 · what is left).
    """
    terms = np.concatenate([np.concatenate(both) for both in _terms(weight, x_PI, changes_PO, noise)])
    return float(np.sqrt(terms.mean() if terms.size else _crude(weight, x_PI, changes_PO)))


def _crude(weight: Float64, x_PI: Float64, changes_PO: Float64) -> float:
    """Return the e² that all changes together ask for."""
    size = float((np.square(x_PI) @ np.square(weight).T).sum())
    return float(np.square(changes_PO).sum()) / size if size else 0.0


def _terms(weight: Float64, x_PI: Float64, changes_PO: Float64, noise: float) -> list[tuple[Float64, Float64]]:
    """Return for each output what each direction over the positions says e² is, narrow directions and wide ones."""
    crude, found = _crude(weight, x_PI, changes_PO), []
    for square_I, change_P in zip(np.square(weight), changes_PO.T, strict=True):
        spread, directions = np.linalg.eigh((x_PI * square_I) @ x_PI.T)
        seen = crude * spread > np.maximum(100.0 * noise**2, _ALIKE**2 * crude * spread[-1])
        terms = np.square(directions.T @ change_P)[seen] / spread[seen]
        found.append((terms[: len(terms) // 2], terms[len(terms) // 2 :]))
    return found


def _of_weights(weight: Float64, x_PI: Float64, changes_PO: Float64, sizes: tuple[float, float]) -> bool:
    """Whether one change of the weights explains the changes at all positions better than one that is free at each.

    Inputs that are alike then change their result alike: the covariance over positions is e² X diag(w²) Xᵀ, against
    its diagonal alone, of the size that fits best. `sizes`: e, and the rounding of one element.
    """
    error, noise = sizes
    floor = max(noise, 1e-9 * float(np.abs(changes_PO).max())) ** 2
    spreads = [(x_PI * square_I) @ x_PI.T for square_I in np.square(weight)]
    scales = [np.square(change_P) / np.diag(spread) for spread, change_P in zip(spreads, changes_PO.T, strict=True)
              if (np.diag(spread) > 0.0).all()]  # fmt: skip
    free = float(np.mean(scales)) if scales else 0.0
    told = 0.0
    for spread, change_P in zip(spreads, changes_PO.T, strict=True):
        told += _likelihood(error**2 * spread, floor, change_P)
        told -= _likelihood(free * np.diag(np.diag(spread)), floor, change_P)
    return told > _EVIDENCE


def _likelihood(covariance_PP: Float64, floor: float, change_P: Float64) -> float:
    """Return the logarithm of a normal distribution's density at a change, up to a constant."""
    spread, directions = np.linalg.eigh(covariance_PP)
    variances = np.maximum(spread, 0.0) + floor
    return float(-0.5 * (np.square(directions.T @ change_P) / variances + np.log(variances)).sum())


def rank_of(changes: Float64, floor: float) -> int:
    """Return how many singular values of a matrix stand above rounding; at least 1."""
    sizes = np.linalg.svd(changes, compute_uv=False)
    return max(1, int((sizes > max(floor, _ALIKE * sizes[0])).sum()))
