"""How prefill makes scores out of its queries and keys: scale, soft-cap, linear biases; read from its own tensors.

Axes: H query heads, G key/value heads, S keys seen, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from driftprobe.fingerprint import Float64, l2_norm
from driftprobe.scene import Scene

_RECOGNISED = 0.05
"""How far, relative, prefill's scores may be from the model that explains them: rounding in bfloat16, and more."""
_AS_GOOD = 2.0
"""How many times more a stated scale may leave over than a fitted one, and still be the scale."""
_BETTER = 0.1
"""How much less a model with a constant a head must leave over to be believed."""
_QUERIES = ("q_rope", "q_norm", "q_proj")


@dataclass(frozen=True)
class Attended:
    """One arm's scores, and what they were made of."""

    query_HD: Float64
    keys_SGD: Float64
    scores_HS: Float64
    start: int
    """Absolute position of the first key."""

    @property
    def positions(self) -> Float64:
        """Absolute positions of the keys."""
        return self.start + np.arange(self.scores_HS.shape[1], dtype=np.float64)

    @property
    def repeat(self) -> int:
        """How many query heads read one KV head."""
        return len(self.query_HD) // int(self.keys_SGD.shape[1])

    def products(self, heads: tuple[int, ...] | None = None) -> Float64:
        """Return query · key `[H, S]`, with the KV head that each query head reads (by groups, unless told)."""
        read = [h // self.repeat for h in range(len(self.query_HD))] if heads is None else list(heads)
        found: Float64 = np.einsum("hd,shd->hs", self.query_HD, self.keys_SGD[:, read])
        return found


def attended(scene: Scene, arm: str) -> Attended | None:
    """Return an arm's attention at the failing layer and step, or None where the trace does not hold it."""
    layer = scene.failure.layer
    scores, keys = scene.tensor(arm, layer, "attn_scores"), scene.tensor(arm, layer, "k_cache")
    query = next((t for tap in _QUERIES if (t := scene.tensor(arm, layer, tap)) is not None), None)
    record = scene.record(arm, layer, "attn_scores")
    if scores is None or keys is None or query is None or record is None:
        return None
    if scores.ndim != 3 or keys.ndim != 3 or query.ndim != 3 or len(keys) != scores.shape[2]:
        return None
    if query.shape[1] % keys.shape[1] or query.shape[2] != keys.shape[2] or query.shape[1] != scores.shape[1]:
        return None
    return Attended(query[0], keys, scores[0], record.row_start)


@dataclass(frozen=True)
class ScoreModel:
    """Scores as a function of query · key: soft-cap(scale × product) + slope × position."""

    scale: float
    softcap: float | None
    slopes_H: Float64
    shifted: bool = False
    """Whether each head's scores have a constant of their own, which softmax does not see (a maximum taken off)."""

    def scores(self, products_HS: Float64, like: Attended, scale: float | None = None) -> Float64:
        """Return what the scores are, without any mask; the constants of shifted ones are those of `like`."""
        scaled = products_HS * (self.scale if scale is None else scale)
        if self.softcap:
            scaled = self.softcap * np.tanh(scaled / self.softcap)
        found: Float64 = scaled + self.slopes_H[:, None] * like.positions
        return found + levels(like.scores_HS - found) if self.shifted else found

    def fit_scale(self, products_HS: Float64, like: Attended) -> float:
        """Return the scale that explains scores best, all else as it is here (least squares, Gauss–Newton)."""
        goal = like.scores_HS - self.slopes_H[:, None] * like.positions
        hidden = ~np.isfinite(goal)
        goal, x = np.where(hidden, np.nan, goal), np.where(hidden, np.nan, products_HS)
        if not self.softcap:
            return _least_squares(self._centred(x), self._centred(goal))
        scale, cap = self.scale, self.softcap
        for _ in range(60):
            bent = np.tanh(scale * x / cap)
            step = _least_squares(self._centred(x * (1.0 - bent**2)), self._centred(goal - cap * bent))
            scale += float(np.clip(step, -0.5 * abs(scale), 0.5 * abs(scale)))
            if abs(step) <= 1e-16 * abs(scale):
                break
        return scale

    def _centred(self, values_HS: Float64) -> Float64:
        return values_HS - levels(values_HS) if self.shifted else values_HS


def levels(values_HS: Float64) -> Float64:
    """Return each head's mean over what is finite, `[H, 1]`."""
    seen = np.isfinite(values_HS)
    total = np.where(seen, values_HS, 0.0).sum(axis=1, keepdims=True)
    found: Float64 = total / np.maximum(seen.sum(axis=1, keepdims=True), 1)
    return found


def recognise(scene: Scene, found: Attended) -> ScoreModel | None:
    """Return how these scores, prefill's, are made, or None where no model explains them."""
    seen = np.isfinite(found.scores_HS)
    products, size = found.products(), l2_norm(found.scores_HS[seen])
    cap, slopes = (scene.constant(scene.failure.layer, name) for name in ("attn_scores.softcap", "alibi.slopes"))
    stated = scene.constant(scene.failure.layer, "attn_scores.scale")
    zero = np.zeros(len(products))
    softcap = float(cap.reshape(-1)[0]) if cap is not None else None
    first = float(stated.reshape(-1)[0]) if stated is not None else found.keys_SGD.shape[2] ** -0.5
    biases = slopes.reshape(-1) if slopes is not None and slopes.size == len(products) else zero
    best: tuple[float, ScoreModel] | None = None
    for shifted in (False, True):
        plain = ScoreModel(first, softcap, biases, shifted)
        fitted = ScoreModel(plain.fit_scale(products, found), softcap, biases, shifted)
        left = [l2_norm((model.scores(products, found) - found.scores_HS)[seen]) for model in (plain, fitted)]
        mine = (left[0], plain) if left[0] <= _AS_GOOD * left[1] else (left[1], fitted)
        if best is None or mine[0] < _BETTER * best[0]:
            best = mine
    return best[1] if best is not None and best[0] <= _RECOGNISED * size else None


def _least_squares(x: Float64, y: Float64) -> float:
    size = float(np.nansum(np.square(x)))
    return float(np.nansum(x * y)) / size if size > 0.0 else 0.0
