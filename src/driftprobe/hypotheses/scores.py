"""Hypotheses about scores and what of them is seen: scale, soft-cap, head map, masks, keys too many, biases, sinks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from driftprobe.causes import Parameters
from driftprobe.fingerprint import Float64, l2_norm
from driftprobe.hypotheses.base import Prediction
from driftprobe.hypotheses.score_model import Attended, ScoreModel, attended, recognise
from driftprobe.scene import Scene

Flags = npt.NDArray[np.bool_]
_NO_LEAK = 1e-3
"""Mask values nearer to zero than this are no mask at all."""


def scores(scene: Scene) -> Iterator[Prediction]:
    """Yield what `attn_scores` would be, made of the candidate's own query and keys, under each fault of scores."""
    if scene.failure.tensor != "attn_scores":
        return
    prefill, own = attended(scene, "P"), attended(scene, scene.failure.arm)
    model = None if prefill is None else recognise(scene, prefill)
    if prefill is None or own is None or model is None:
        return
    if own.scores_HS.shape[1] != prefill.scores_HS.shape[1] or own.start != prefill.start:
        yield from _others(scene, model, prefill, own)
        return
    hidden = np.isneginf(own.scores_HS) & ~np.isneginf(prefill.scores_HS)
    if hidden.any():
        yield from _masked(scene, model, np.asarray(hidden.all(axis=0)), own)
        return
    yield from _scaled(scene, model, own)
    yield from _read(scene, model, own)
    if model.softcap:
        bare = replace(model, softcap=None)
        yield _made(scene, "score_softcap", {}, bare.scores(own.products(), own), own)
    if model.slopes_H.any():
        yield from _biased(scene, model, own)


def _made(
    scene: Scene, cause: str, parameters: Parameters, scores_HS: Float64, own: Attended, fitted: int = 0
) -> Prediction:
    """Return a prediction, masked where the candidate is: which keys are masked is another hypothesis."""
    masked = np.where(np.isneginf(own.scores_HS), -np.inf, scores_HS)
    return Prediction(cause, parameters, scene.failure.layer, "attn_scores", masked[None], fitted)


def _masked(scene: Scene, model: ScoreModel, hidden_S: Flags, own: Attended) -> Iterator[Prediction]:
    """Keys that no head of the candidate sees, and prefill does."""
    yield from _lost(scene, model, own.positions[hidden_S], own)


def _lost(scene: Scene, model: ScoreModel, positions: Float64, own: Attended) -> Iterator[Prediction]:
    keys = tuple(int(key) for key in positions)
    if not keys:
        return
    told: Parameters = {"keys": keys, "behind": tuple(scene.position - key for key in keys)}
    made = model.scores(own.products(), own)
    yield _made(scene, "keys_masked", told, made, own)
    if model.slopes_H.any():  # linear biases by column (BLOOM): keys behind lost rows stand that many columns earlier
        yield _made(scene, "keys_masked", told, made - len(keys) * model.slopes_H[:, None], own)


def _others(scene: Scene, model: ScoreModel, prefill: Attended, own: Attended) -> Iterator[Prediction]:
    """The candidate has other keys than prefill: fewer, or more, with their full weight or that of a finite mask."""
    known = np.isin(own.positions, prefill.positions)
    if known.all():
        lost = prefill.positions[~np.isin(prefill.positions, own.positions)]
        yield from _lost(scene, model, lost, own)
        return
    shared = replace(own, scores_HS=np.where(known, own.scores_HS, np.nan))
    plain = model.scores(own.products(), shared)
    beyond = own.scores_HS[:, ~known] - plain[:, ~known]
    value = float(np.median(beyond[np.isfinite(beyond)])) if np.isfinite(beyond).any() else 0.0
    if value > -_NO_LEAK:
        yield _made(scene, "keys_extra", {"count": int((~known).sum())}, plain, own)
        return
    value = float(beyond[np.isfinite(beyond)].mean())
    yield _made(scene, "mask_leak", {"value": value}, plain + np.where(known, 0.0, value), own, 1)


def _scaled(scene: Scene, model: ScoreModel, own: Attended) -> Iterator[Prediction]:
    products = own.products()
    scale = model.fit_scale(products, own)
    if model.scale and scale != model.scale:
        told = {"factor": scale / model.scale}
        yield _made(scene, "score_scale", told, model.scores(products, own, scale), own, 1)


def _read(scene: Scene, model: ScoreModel, own: Attended) -> Iterator[Prediction]:
    """Ask for each query head which KV head's keys its scores were made with."""
    groups, heads = own.keys_SGD.shape[1], len(own.query_HD)
    seen = np.isfinite(own.scores_HS)
    made = [model.scores(own.products((g,) * heads), own) for g in range(groups)]
    gaps = [[l2_norm((made[g][h] - own.scores_HS[h])[seen[h]]) for g in range(groups)] for h in range(heads)]
    read = tuple(int(np.argmin(row)) for row in gaps)
    if read != tuple(h // own.repeat for h in range(heads)):
        yield _made(scene, "head_map", {"heads": read}, model.scores(own.products(read), own), own)


def _biased(scene: Scene, model: ScoreModel, own: Attended) -> Iterator[Prediction]:
    """ALiBi (Press et al. 2022): every cached key is taken for `offset` tokens farther away than it is."""
    plain = model.scores(own.products(), own)
    cached = np.isfinite(own.scores_HS) & (own.positions < scene.position)
    slopes = np.broadcast_to(model.slopes_H[:, None], plain.shape)
    size = float(np.square(slopes[cached]).sum())
    if size > 0.0 and not model.shifted:
        offset = float(((plain - own.scores_HS)[cached] * slopes[cached]).sum()) / size
        shifted = plain - offset * slopes * (own.positions < scene.position)
        yield _made(scene, "alibi", {"offset": offset}, shifted, own, 1)


def sinks(scene: Scene) -> Iterator[Prediction]:
    """Yield what `attn_probs` would be, were the softmax over the candidate's scores alone."""
    layer = scene.failure.layer
    reference = scene.reference(layer, "attn_probs")
    given = scene.candidate(layer, "attn_scores")
    if scene.failure.tensor != "attn_probs" or reference is None or given is None or not np.isfinite(given).any():
        return
    weights = np.exp(given - given.max(axis=-1, keepdims=True))
    leaves = (reference.sum(axis=-1) < 1.0 - 1e-3).any()
    if leaves or scene.constant(layer, "attn_scores.sinks") is not None:  # prefill leaves something to a sink
        yield Prediction("sinks_lost", {}, layer, "attn_probs", weights / weights.sum(axis=-1, keepdims=True))
