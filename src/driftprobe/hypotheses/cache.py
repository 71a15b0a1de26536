"""Hypotheses about what the cache holds: each row of it as a row that prefill has, or a change of it.

Axes: S rows, G key/value heads, D head dimension. The step's own row is the last one; the rows before it are cached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from driftprobe.causes import Parameters
from driftprobe.fingerprint import Float64, l2_norm
from driftprobe.floor import LIMIT
from driftprobe.hypotheses.base import MIN_EXPLAINED, Prediction
from driftprobe.hypotheses.rounding import rounded
from driftprobe.judgement import RowCheck
from driftprobe.row_causes import cause_of_rows
from driftprobe.scene import Scene
from driftprobe.taps import CACHE_TAPS

STRANGE = 0.1
"""Relative distance from which a row that matches none of prefill's is another text's, and not its own, changed."""
ANOTHER = 2 / 3
"""Share of strange rows above which they are another sequence's: two texts share a token here and there."""


@dataclass(frozen=True)
class Rows:
    """The failing cache tap: prefill's rows, decode's, and which of them are cached."""

    scene: Scene
    layer: int
    tensor: str
    prefill_SGD: Float64
    decode_SGD: Float64
    start: int
    """Position of the first row."""
    cached: int
    """How many rows stand before the step's own."""

    @property
    def limit(self) -> float:
        """Relative distance that rounding explains here."""
        return LIMIT * self.scene.failure.floor

    @property
    def newest(self) -> int:
        """Position of the step's own row."""
        return self.start + self.cached

    def closer(self, other_SGD: Float64) -> Float64:
        """Return each row as the other rows have it or as prefill has it, whichever is closer to decode's."""
        theirs, ours = (_sizes(self.decode_SGD - rows) for rows in (other_SGD, self.prefill_SGD))
        return np.where((theirs < ours)[:, None, None], other_SGD, self.prefill_SGD)

    def cached_only(self, other_SGD: Float64) -> Float64:
        """Return the cached rows of one, and prefill's own row of this step."""
        return np.concatenate([other_SGD[: self.cached], self.prefill_SGD[self.cached :]])

    def explains(self, predicted_SGD: Float64) -> bool:
        """Whether a prediction leaves no more of decode's rows than rounding explains, and little of the difference."""
        gap, whole = (l2_norm((self.decode_SGD - rows).reshape(-1)) for rows in (predicted_SGD, self.prefill_SGD))
        within = gap <= self.limit * l2_norm(self.prefill_SGD.reshape(-1))
        return within and gap**2 <= (1.0 - MIN_EXPLAINED) * whole**2

    def predict(self, cause: str, parameters: Parameters, predicted: Float64, fitted: int = 0) -> Prediction:
        """Return a prediction of the failing tap."""
        return Prediction(cause, parameters, self.layer, self.tensor, predicted, fitted)


def _sizes(rows_SGD: Float64) -> Float64:
    sizes: Float64 = np.sqrt(np.square(rows_SGD).sum(axis=(1, 2)))
    return sizes


def _rows_of(scene: Scene) -> Rows | None:
    failure = scene.failure
    if failure.tensor not in CACHE_TAPS or failure.layer is None:
        return None
    prefill = scene.reference(failure.layer, failure.tensor)
    decode = scene.candidate(failure.layer, failure.tensor)
    record = scene.record("P", failure.layer, failure.tensor)
    if prefill is None or decode is None or record is None or prefill.shape != decode.shape or prefill.ndim != 3:
        return None
    cached = min(scene.position - record.row_start, len(prefill))
    if cached < 1 or not (np.isfinite(prefill).all() and np.isfinite(decode).all()):
        return None
    return Rows(scene, failure.layer, failure.tensor, prefill, decode, record.row_start, cached)


def cache_contents(scene: Scene) -> Iterator[Prediction]:
    """Yield what the cached rows would be under each fault of a cache's contents that their numbers suggest."""
    rows = _rows_of(scene)
    if rows is None:
        return
    explained = False
    for hypothesis in _HYPOTHESES:
        for prediction in hypothesis(rows):
            explained |= rows.explains(prediction.predicted)
            yield prediction
    if not explained:
        yield from _stale(rows)


def _known_again(rows: Rows) -> Iterator[Prediction]:
    """Yield rows that stand elsewhere, are empty, or come from another layer, as the row check found them."""
    where = (rows.scene.step, rows.layer, rows.tensor)
    check = next((c for c in rows.scene.judged.rows if (c.step, c.layer, c.tensor) == where), None)
    found = None if check is None else cause_of_rows(check, rows.newest)
    if check is None or found is None:
        return
    predicted = _as_checked(check, rows)
    if predicted is not None:
        yield rows.predict(*found, predicted)


def _as_checked(check: RowCheck, rows: Rows) -> Float64 | None:
    """Return prefill's rows moved, emptied and taken from other layers as a row check says; None without their tensors.

    The step's own row may be empty too, where it was written elsewhere.
    """
    predicted = rows.prefill_SGD.copy()
    for position, source in check.moved:
        predicted[position - rows.start] = rows.prefill_SGD[source - rows.start]
    for position in check.zero:
        predicted[position - rows.start] = 0.0
    for position, layer in check.other_layer:
        other = rows.scene.reference(layer, rows.tensor)
        if other is None or other.shape != predicted.shape:
            return None
        predicted[position - rows.start] = other[position - rows.start]
    if not rows.decode_SGD[rows.cached :].any():
        predicted[rows.cached :] = 0.0
    return predicted


def _other_layer(rows: Rows) -> Iterator[Prediction]:
    layers = {r.layer for r in rows.scene.trace.records if r.tensor == rows.tensor and r.arm == "P"}
    for layer in sorted(layer for layer in layers if layer is not None and layer != rows.layer):
        other = rows.scene.reference(layer, rows.tensor)
        if other is not None and other.shape == rows.prefill_SGD.shape:
            yield rows.predict("cache_other_layer", {"source": layer}, rows.closer(other))


def _exchanged(rows: Rows) -> Iterator[Prediction]:
    """Yield the rows as those of the other cache.

    An engine that rotates neighbouring dimensions keeps its keys in another order than they are recorded in, and its
    values in their own: rows that stand in the wrong cache of it have their dimensions reordered.
    """
    other = rows.scene.reference(rows.layer, "v_cache" if rows.tensor == "k_cache" else "k_cache")
    if other is None or other.shape != rows.prefill_SGD.shape:
        return
    yield rows.predict("cache_kv_exchanged", {}, rows.closer(other))
    order = _rotation_order(rows)
    if order is not None:
        reordered = other[..., order if rows.tensor == "k_cache" else np.argsort(order)]
        yield rows.predict("cache_kv_exchanged", {}, rows.closer(reordered))


def _rotation_order(rows: Rows) -> npt.NDArray[np.int64] | None:
    """Return the order that puts dimension 2i beside others of its kind: rotated pairs half of what is rotated apart.

    All of a head is taken for rotated where the trace has no frequencies. None where two dimensions are, or fewer.
    """
    size = rows.prefill_SGD.shape[2]
    constant = _of_rotation(rows, "rope.inv_freq")
    rotated = size if constant is None else 2 * constant.size
    if not 4 <= rotated <= size:
        return None
    return np.concatenate([np.arange(0, rotated, 2), np.arange(1, rotated, 2), np.arange(rotated, size)])


def _of_rotation(rows: Rows, name: str) -> Float64 | None:
    """Return a constant of the rotation: this layer's, or the model's."""
    found = rows.scene.constant(rows.layer, name)
    return rows.scene.constant(None, name) if found is None else found


def _axes(rows: Rows) -> Iterator[Prediction]:
    count, groups, size = rows.prefill_SGD.shape
    if groups > 1:
        turned = rows.prefill_SGD.transpose(0, 2, 1).reshape(count, groups, size)
        back = rows.prefill_SGD.reshape(count, size, groups).transpose(0, 2, 1)
        for other in (turned, back):
            yield rows.predict("cache_axes", {}, rows.closer(other))


def _scaled(rows: Rows) -> Iterator[Prediction]:
    """Yield one factor for all cached rows, and one for each head alone, by least squares."""
    mine, ours = rows.decode_SGD[: rows.cached], rows.prefill_SGD[: rows.cached]
    factor = _factor(mine, ours)
    if factor is not None:
        scaled = factor * rows.prefill_SGD
        yield rows.predict("cache_scale", {"factor": factor}, rows.cached_only(scaled), 1)
        yield rows.predict("cache_scale", {"factor": factor}, scaled, 1)
    for head in range(ours.shape[1]) if ours.shape[1] > 1 else ():
        factor = _factor(mine[:, head], ours[:, head])
        if factor is not None:
            scaled = rows.prefill_SGD.copy()
            scaled[:, head] *= factor
            parameters: Parameters = {"head": head, "factor": factor}
            yield rows.predict("cache_head_scale", parameters, rows.cached_only(scaled), 1)
            yield rows.predict("cache_head_scale", parameters, scaled, 1)


def _factor(mine: Float64, ours: Float64) -> float | None:
    size = float(np.square(ours).sum())
    return float((mine * ours).sum() / size) if size > 0.0 else None


def _lossy(rows: Rows) -> Iterator[Prediction]:
    """Yield the cached rows, or all, rounded to each coarser dtype and scale."""
    for dtype, either in rounded(rows.prefill_SGD, rows.cached, rows.limit):
        lower, upper = either
        nearer = np.where(abs(rows.decode_SGD - lower) <= abs(rows.decode_SGD - upper), lower, upper)
        yield rows.predict("precision", {"dtype": dtype}, rows.cached_only(nearer))
        yield rows.predict("precision", {"dtype": dtype}, nearer)


def _unrotated(rows: Rows) -> Iterator[Prediction]:
    """Yield the keys as they were before rotation, by the model's own frequencies where the trace holds them.

    RoPE turns dimensions 2i and 2i+1, or i and i + d/2, of a key at position p by the angle p·ω_i (Su et al. 2021).
    """
    if rows.tensor != "k_cache":
        return
    constant = _of_rotation(rows, "rope.inv_freq")
    scaling = rows.scene.constant(rows.layer, "rope.scaling")
    size = 1.0 if scaling is None else float(scaling.reshape(-1)[0])
    for paired in (_halves, _neighbours):
        frequencies = _seen_frequencies(rows, paired) if constant is None else constant.reshape(-1)
        if frequencies is None or not 0 < 2 * len(frequencies) <= rows.prefill_SGD.shape[2]:
            continue
        dims = 2 * len(frequencies)
        angles = np.arange(rows.start, rows.start + len(rows.prefill_SGD))[:, None] * frequencies
        first, second = paired(dims)
        turned, (a, b) = rows.prefill_SGD.copy(), (rows.prefill_SGD[..., i] for i in (first, second))
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        turned[..., first], turned[..., second] = (a * cos + b * sin) / size, (b * cos - a * sin) / size
        yield rows.predict("cache_unrotated", {}, rows.cached_only(turned))


def _halves(dims: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(dims // 2), np.arange(dims // 2, dims)


def _neighbours(dims: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(0, dims, 2), np.arange(1, dims, 2)


def _seen_frequencies(rows: Rows, paired: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> Float64 | None:
    """Return the frequencies by which prefill's keys are turned against decode's, None unless the first is 1.

    The first frequency of RoPE is base^0 = 1 whatever its base, so that keys rotated with another base or for another
    position are not taken for unrotated ones. A frequency is read off the turn from row to row; each further row makes
    it finer, and the rows before settle its whole turns. Dimensions that no row has turned are not rotated.
    """
    changed = (rows.prefill_SGD != rows.decode_SGD)[: rows.cached].any(axis=(0, 1))
    dims = int(np.flatnonzero(changed).max(initial=-1)) + 1
    if rows.cached < 2 or dims < 2 or dims % 2:
        return None
    first, second = paired(dims)
    p, d = (x[: rows.cached, :, first] + 1j * x[: rows.cached, :, second] for x in (rows.prefill_SGD, rows.decode_SGD))
    turns = (p * d.conj()).sum(axis=1)
    found = np.angle(turns[1] * turns[0].conj())
    for row in range(2, rows.cached):
        found = found + np.angle(turns[row] * turns[0].conj() * np.exp(-1j * row * found)) / row
    newest = rows.newest - 1
    found = found + np.angle(turns[-1] * np.exp(-1j * newest * found)) / newest
    return found if math.isclose(found[0], 1.0, rel_tol=1e-2) else None


def _stale(rows: Rows) -> Iterator[Prediction]:
    """Yield the rows that no row of prefill's explains as another text's: one other sequence's where most of them are.

    They can be anything: what is predicted of them is what they are. Only rows far from their own count.
    """
    gaps = _sizes(rows.decode_SGD - rows.prefill_SGD)[: rows.cached]
    sizes = _sizes(rows.prefill_SGD)[: rows.cached]
    strange = gaps > STRANGE * sizes
    own = gaps <= rows.limit * sizes
    if not strange.any() or not (strange | own).all():
        return
    predicted = rows.prefill_SGD.copy()
    predicted[: rows.cached][strange] = rows.decode_SGD[: rows.cached][strange]
    fitted = int(strange.sum()) * rows.prefill_SGD[0].size
    if strange.mean() > ANOTHER:
        yield rows.predict("cache_other_sequence", {}, predicted, fitted)
    else:
        positions = tuple(rows.start + int(i) for i in np.flatnonzero(strange))
        yield rows.predict("cache_stale", {"rows": positions}, predicted, fitted)


_HYPOTHESES: tuple[Callable[[Rows], Iterator[Prediction]], ...] = (
    _known_again, _other_layer, _exchanged, _axes, _scaled, _unrotated, _lossy,
)  # fmt: skip
HYPOTHESES: tuple[Callable[[Scene], Iterator[Prediction]], ...] = (cache_contents,)
