"""Hypotheses about heads as such: another order of them, a head of zeros."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from driftprobe.fingerprint import l2_norm
from driftprobe.hypotheses.base import Prediction
from driftprobe.scene import Scene

_BY_HEAD = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_ctx")


def heads(scene: Scene) -> Iterator[Prediction]:
    """Yield what a tap with heads would be, were prefill's heads in another order, or one of them zero."""
    layer, tensor = scene.failure.layer, scene.failure.tensor
    reference, candidate = scene.reference(layer, tensor), scene.candidate(layer, tensor)
    if tensor not in _BY_HEAD or reference is None or candidate is None:
        return
    if reference.shape != candidate.shape or reference.ndim != 3 or reference.shape[1] < 2:
        return
    theirs, ours = reference[0], candidate[0]
    order = tuple(int(np.argmin([l2_norm(head - other) for other in theirs])) for head in ours)
    if order != tuple(range(len(order))):
        yield Prediction("head_order", {"heads": order}, layer, tensor, reference[:, list(order)])
    empty = [h for h, head in enumerate(ours) if not head.any() and theirs[h].any()]
    if len(empty) == 1:
        emptied = reference.copy()
        emptied[:, empty] = 0.0
        yield Prediction("head_zero", {"head": empty[0]}, layer, tensor, emptied)
