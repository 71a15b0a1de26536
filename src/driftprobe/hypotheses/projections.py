"""Hypotheses about projections: a bias left out, weights rounded to a few bits, other weights of low rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from driftprobe.fingerprint import Float64, l2_norm
from driftprobe.floor import LIMIT
from driftprobe.hypotheses.ops import linear, linear_input, linear_taps
from driftprobe.hypotheses.view import Guess, Guesses, View
from driftprobe.judgement import Status
from driftprobe.taps import input_of

TAPS = frozenset({"q_proj", "k_proj", "v_proj", "attn_out", "router_logits"})
BITS = (8, 4)
GROUPS = (0, -1, 32, 64, 128)
"""Inputs that share a scale: all of an output (0), all of the matrix (−1), or so many neighbours."""
_ALIKE = 1e-6
"""Below this share of the largest, a singular value is rounding of the largest's own."""


def guesses(view: View) -> Guesses:
    """Yield what the failing projection would give under each cause."""
    weight = view.constant(f"{view.tensor}.weight")
    known = view.tensor in TAPS or view.tap(input_of(view.tensor)) is not None
    if not known or weight is None or linear_input(view) is None:
        return
    if view.constant(f"{view.tensor}.bias") is not None:
        bare = linear(view, weight, biased=False)
        if bare is not None:
            yield Guess("bias_missing", {}, bare)
    for bits, rounded in quantised(weight):
        predicted = linear(view, rounded)
        if predicted is not None:
            yield Guess("weights_quantised", {"bits": bits}, predicted)
    yield from _scaled(view)
    if view.scene.of_paths:
        yield from _others_of_paths(view, weight)
    else:
        yield from _other_weights(view)


def quantised(weight: Float64) -> Iterator[tuple[int, Float64]]:
    """Yield a matrix `[out, in]` rounded to signed integers of 8 and 4 bits, with scales shared in usual ways.

    Symmetric rounding to nearest with the largest magnitude at the largest integer, as in LLM.int8 (Dettmers et al.
    2022) for rows and GPTQ's baseline (Frantar et al. 2023) for groups.
    """
    out, width = weight.shape
    for bits in BITS:
        for group in GROUPS:
            if group > 0 and (width % group or group >= width):
                continue
            rows = weight.reshape(1, -1) if group < 0 else weight.reshape(out, -1, group or width)
            scale = np.abs(rows).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
            scale = np.where(scale == 0.0, 1.0, scale)
            yield bits, (np.round(rows / scale) * scale).reshape(out, width)


def _scaled(view: View) -> Guesses:
    """A result that is as a whole larger or smaller than it should be, by a share that is fitted."""
    result, mine = view.result(), _plain(view)
    size = 0.0 if mine is None else float(np.square(mine).sum())
    if result is not None and mine is not None and size:
        error = float(((result - mine) * mine).sum()) / size
        yield Guess("projection_scale", {"error": error}, (1.0 + error) * mine, fitted=1)


def _others_of_paths(view: View, weight: Float64) -> Guesses:
    """What is left where nothing else fits: the weights are others, by as much as all failing positions show together.

    Changes of less rank than the positions can show are an adapter's.
    """
    result, mine = view.result(), _plain(view)
    inputs = next((found for tap in linear_taps(view.tensor) if (found := view.rows(tap))), {})
    results, bias = view.rows(view.tensor), view.constant(f"{view.tensor}.bias")
    at = [p for p, status in view.scene.positions.items() if status is Status.FAIL and p in inputs and p in results]
    if result is None or mine is None or not at:
        return
    x = np.stack([inputs[p].reshape(-1) for p in at])
    plain = x @ weight.T + (0.0 if bias is None else bias)
    changes = np.stack([results[p].reshape(-1) for p in at]) - plain
    noise = LIMIT * view.scene.failure.floor * l2_norm(plain.reshape(-1))
    rank = _rank(changes, noise)
    if rank < min(len(at), *weight.shape):
        yield Guess("adapter", {"rank": rank}, result, fitted=result.size)
    else:
        error = _relative_error(weight, x, changes, noise / plain.size**0.5)
        yield Guess("weights_other", {"error": error}, result, fitted=result.size)


def _relative_error(weight: Float64, x_PI: Float64, changes_PO: Float64, noise: float) -> float:
    """Return the e of weights that are each off by w·e·n, n of mean square 1: what most likely gives such changes.

    The changes of output o at all positions then have the covariance e² X diag(w²) Xᵀ. Its directions in which
    rounding, `noise` an element, would show beside e are left out. Standard error: e / √(2 · what is left).
    """
    squares_OI = np.square(weight)
    size = float((np.square(x_PI) @ squares_OI.T).sum())
    crude = float(np.square(changes_PO).sum()) / size if size else 0.0
    found = []
    for square_I, change_P in zip(squares_OI, changes_PO.T, strict=True):
        spread, directions = np.linalg.eigh((x_PI * square_I) @ x_PI.T)
        seen = crude * spread > np.maximum(100.0 * noise**2, _ALIKE**2 * crude * spread[-1])
        found.append(np.square(directions.T @ change_P)[seen] / spread[seen])
    terms = np.concatenate(found)
    return float(np.sqrt(terms.mean() if terms.size else crude))


def _rank(changes: Float64, floor: float) -> int:
    sizes = np.linalg.svd(changes, compute_uv=False)
    return max(1, int((sizes > max(floor, _ALIKE * sizes[0])).sum()))


def _other_weights(view: View) -> Guesses:
    """What is left where nothing else fits: the weights are others. Their change has the rank that the steps show.

    Each step gives one vector, (change of the weights) · input; so many steps show a rank of at most so many.
    """
    changes = [found for step in range(view.scene.trace.header.steps) if (found := _change(view.at(step))) is not None]
    own, mine = _change(view), _plain(view)
    if own is None or mine is None or not changes:
        return
    _, _, rows = np.linalg.svd(np.stack(changes), full_matrices=False)
    floor = LIMIT * view.scene.failure.floor * l2_norm(mine.reshape(-1)) * len(changes) ** 0.5
    rank = _rank(np.stack(changes), floor)
    basis = rows[:rank]
    predicted = mine + ((own @ basis.T) @ basis).reshape(mine.shape)
    yield Guess("adapter", {"rank": rank}, predicted, fitted=mine.size)


def _change(view: View) -> Float64 | None:
    result, mine = view.result(), _plain(view)
    return None if result is None or mine is None else (result - mine).reshape(-1)


def _plain(view: View) -> Float64 | None:
    weight = view.constant(f"{view.tensor}.weight")
    return None if weight is None else linear(view, weight)
