"""Attention scores are known up to a constant along a row: softmax does not see it, and neither may a verdict.

ALiBi in some models counts its distances from the end of the call, so that the same token's scores in a longer prefill
are shifted by a constant. Whole tensors are compared without that shift (`compare.exact_drift`). A sketch cannot be rid
of it: there the probabilities decide, which the scores are for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from driftprobe.compare import SCORES, Drift, Pair
from driftprobe.floor import Controls, Floors, innocent
from driftprobe.judgement import Cell, Status

_PROBS = "attn_probs"
_Where = tuple[int, int | None]
"""Step and layer."""


def pass_shifts(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Return cells, with scores passed that fail without whole tensors while their probabilities pass."""
    settled = {(c.step, c.layer) for c in cells if c.tensor == _PROBS and c.status is Status.PASS}
    return tuple(
        replace(c, status=Status.PASS)
        if c.tensor == SCORES and c.status is Status.FAIL and _may_be_shift(c.drift) and (c.step, c.layer) in settled
        else c
        for c in cells
    )


def without_shifts(controls: Controls, floors: Floors) -> Controls:
    """Return controls without the pairs of scores that rounding does not explain while their probabilities agree."""
    return {arm: tuple(_unshifted(pairs, floors)) for arm, pairs in controls.items()}


def _unshifted(pairs: Iterable[Pair], floors: Floors) -> Iterable[Pair]:
    found = list(pairs)
    settled = {_where(pair) for pair in found if pair.reference.tensor == _PROBS and innocent(pair, floors)}
    for pair in found:
        shifted = pair.reference.tensor == SCORES and _may_be_shift(pair.drift) and not innocent(pair, floors)
        if not (shifted and _where(pair) in settled):
            yield pair


def _where(pair: Pair) -> _Where:
    return (pair.reference.step, pair.reference.layer)


def _may_be_shift(drift: Drift) -> bool:
    return drift.rung != "payload" and drift.value is not None and math.isfinite(drift.value)
