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
    def positions_S(self) -> Float64:
        """Absolute positions of the keys."""
        return self.start + np.arange(self.scores_HS.shape[1], dtype=np.float64)

    @property
    def repeat(self) -> int:
        """How many query heads read one KV head."""
        return len(self.query_HD) // self.keys_SGD.shape[1]

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
    """Scores as a function of query · key: soft-cap(scale × product) + slope × position + level."""

    scale: float
    softcap: float | None
    slopes_H: Float64
    levels_H: Float64

    def scores(self, products_HS: Float64, positions_S: Float64, scale: float | None = None) -> Float64:
        """Return what the scores are, without any mask."""
        scaled = products_HS * (self.scale if scale is None else scale)
        if self.softcap:
            scaled = self.softcap * np.tanh(scaled / self.softcap)
        found: Float64 = scaled + self.slopes_H[:, None] * positions_S + self.levels_H[:, None]
        return found

    def fit_scale(self, products_HS: Float64, scores_HS: Float64, positions_S: Float64) -> float:
        """Return the scale that explains these scores best, all else as it is here (least squares, Gauss–Newton)."""
        seen = np.isfinite(scores_HS)
        goal = scores_HS - self.slopes_H[:, None] * positions_S - self.levels_H[:, None]
        x, y = products_HS[seen], goal[seen]
        if not self.softcap:
            return _least_squares(x, y)
        scale, cap = self.scale, self.softcap
        for _ in range(60):
            bent = np.tanh(scale * x / cap)
            step = _least_squares(x * (1.0 - bent**2), y - cap * bent)
            scale += float(np.clip(step, -0.5 * abs(scale), 0.5 * abs(scale)))
            if abs(step) <= 1e-16 * abs(scale):
                break
        return scale


def recognise(scene: Scene, found: Attended) -> ScoreModel | None:
    """Return how these scores, prefill's, are made, or None where no model explains them."""
    seen = np.isfinite(found.scores_HS)
    products, size = found.products(), l2_norm(found.scores_HS[seen])
    cap, slopes = (scene.constant(scene.failure.layer, name) for name in ("attn_scores.softcap", "alibi.slopes"))
    stated = scene.constant(scene.failure.layer, "attn_scores.scale")
    zero = np.zeros(len(products))
    softcap = float(cap.reshape(-1)[0]) if cap is not None else None
    first = float(stated.reshape(-1)[0]) if stated is not None else found.keys_SGD.shape[2] ** -0.5
    models = [ScoreModel(first, softcap, zero, zero)]
    if slopes is not None and slopes.size == len(products):
        models.append(_with_biases(first, slopes.reshape(-1), products, found))
    models += [_refitted(model, products, found) for model in models]
    for model in models:
        left = (model.scores(products, found.positions_S) - found.scores_HS)[seen]
        if l2_norm(left) <= (_RECOGNISED if model is models[-1] else 1e-3) * size:
            return model
    return None


def _refitted(model: ScoreModel, products: Float64, found: Attended) -> ScoreModel:
    scale = model.fit_scale(products, found.scores_HS, found.positions_S)
    return ScoreModel(scale, model.softcap, model.slopes_H, model.levels_H)


def _with_biases(scale: float, slopes: Float64, products: Float64, found: Attended) -> ScoreModel:
    """Return a model with linear biases; their level a head, which softmax does not see, is read from the scores."""
    left = found.scores_HS - scale * products - slopes[:, None] * found.positions_S
    levels = np.array([float(np.median(row[np.isfinite(row)])) for row in left])
    return ScoreModel(scale, None, slopes, np.where(np.abs(levels) < 1e-5, 0.0, levels))


def _least_squares(x: Float64, y: Float64) -> float:
    size = float(np.square(x).sum())
    return float((x * y).sum()) / size if size > 0.0 else 0.0
