"""Impact, apart from cause: what the difference does to the logits and to the token that would be chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from driftprobe.compare import PayloadSource
from driftprobe.fingerprint import Float64, to_float64
from driftprobe.floor import Floor
from driftprobe.judgement import Cell, Impact
from driftprobe.trace import Record

RMS_TO_MAX = 4.0
"""Largest of a vocabulary's rounding errors in units of their root mean square (four standard deviations)."""


def measure_impact(cells: Iterable[Cell], payloads: PayloadSource) -> Impact | None:
    """Return the impact of the step whose logits differ most, or None where no logits were compared."""
    found = [_of_cell(cell, payloads) for cell in cells if cell.tensor == "logits"]
    return worst_impact(found)


def worst_impact(found: Iterable[Impact | None]) -> Impact | None:
    """Return the impact with a flip before one without, then the one with the largest logit difference."""
    known = [impact for impact in found if impact is not None]
    return max(known, key=_weight, default=None)


def _weight(impact: Impact) -> tuple[int, float, float]:
    flips = {"none": 0, "unknown": 1, "tie flip": 2, "confident flip": 3}
    return (flips[impact.flip], impact.max_abs_dlogit or 0.0, impact.kl or 0.0)


def _of_cell(cell: Cell, payloads: PayloadSource) -> Impact:
    p, d = payloads.get(cell.reference), payloads.get(cell.candidate)
    if p is not None and d is not None:
        return _from_logits(to_float64(p).reshape(-1), to_float64(d).reshape(-1), cell)
    return _from_tops(cell)


def _from_logits(p: Float64, d: Float64, cell: Cell) -> Impact:
    if not (np.isfinite(p).all() and np.isfinite(d).all()):
        return Impact(None, math.inf, None, None, "unknown")
    log_p, log_d = _log_softmax(p), _log_softmax(d)
    agree = bool(p.argmax() == d.argmax())
    margin = float(np.diff(np.sort(p)[-2:])[0]) if p.size > 1 else math.inf
    return Impact(
        kl=max(0.0, float((np.exp(log_p) * (log_p - log_d)).sum())),
        max_abs_dlogit=float(np.abs(p - d).max()),
        top1_agree=agree,
        margin=margin,
        flip=_flip(agree, margin, cell),
    )


def _from_tops(cell: Cell) -> Impact:
    p, d = cell.reference.top, cell.candidate.top
    if p is None or d is None or len(p.ids) < 2 or not d.ids:
        same = cell.drift.equal
        return Impact(0.0 if same else None, 0.0 if same else None, True if same else None, None,
                      "none" if same else "unknown")  # fmt: skip
    other = dict(zip(d.ids, d.values, strict=True))
    shared = [abs(value - other[i]) for i, value in zip(p.ids, p.values, strict=True) if i in other]
    agree, margin = p.ids[0] == d.ids[0], p.values[0] - p.values[1]
    return Impact(
        0.0 if cell.drift.equal else None, max(shared, default=None), agree, margin, _flip(agree, margin, cell)
    )


def _flip(agree: bool, margin: float, cell: Cell) -> str:
    if agree:
        return "none"
    rounding = rounding_of_a_logit(cell)
    if rounding is None:
        return "unknown"
    return "tie flip" if margin <= rounding else "confident flip"


def rounding_of_a_logit(cell: Cell) -> float | None:
    """Return how far rounding alone moves the difference of two logits: floor × rms of the logits × 4, twice.

    None where the trace does not say how large the logits are.
    """
    return rounding_of_difference(cell.reference, cell.floor)


def rounding_of_difference(record: Record, floor: Floor) -> float | None:
    """Return how far rounding moves the difference of two elements of a tensor: floor × rms × 4, twice; or None."""
    if not record.shape or record.l2 is None:
        return None
    return 2 * RMS_TO_MAX * floor.value * record.l2 / math.sqrt(math.prod(record.shape))


def _log_softmax(logits: Float64) -> Float64:
    shifted = logits - logits.max()
    result: Float64 = shifted - np.log(np.exp(shifted).sum())
    return result
