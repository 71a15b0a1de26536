"""pair() and the metrics: how far two records of the same tap are from each other, and on what evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from driftprobe.fingerprint import Array, Float64, l2_norm, to_float64
from driftprobe.taps import execution_order
from driftprobe.trace import Record, Trace


class PayloadSource(Protocol):
    """Where whole tensors are found, if anywhere."""

    def get(self, record: Record) -> Array | None:
        """Return a record's tensor, or None where there is none."""
        ...


class NoPayloads:
    """The source that has none."""

    def get(self, record: Record) -> Array | None:
        """Return None."""
        return None


@dataclass(frozen=True, slots=True)
class Drift:
    """Distance of a candidate tensor d from a reference p."""

    value: float | None
    """‖d−p‖₂/‖p‖₂ (0/0 is 0, x/0 is inf; inf where one side is not finite and the other is); None: cannot be told.

    On the rung `moments` it is |‖d‖₁−‖p‖₁|/‖p‖₁, a lower bound of the same ratio in the 1-norm.
    """
    rung: str
    """The evidence it stands on: `hash`, `payload`, `sketch`, `moments` (a lower bound), or `none`."""
    max_abs: float | None = None
    """Largest |d−p|; payload only."""
    ulp: float | None = None
    """`max_abs` in units in the last place of the reference's largest element; payload only."""
    worst: tuple[int, ...] | None = None
    """Index of the element that differs most; payload only."""

    @property
    def lower_bound(self) -> bool:
        """Whether the true drift may be larger than `value`."""
        return self.rung == "moments" and self.value is not None and math.isfinite(self.value)

    @property
    def equal(self) -> bool:
        """Whether the tensors are bit for bit the same."""
        return self.rung == "hash" and self.value == 0.0


EQUAL = Drift(0.0, "hash", 0.0, 0.0)
UNKNOWN = Drift(None, "none")


@dataclass(frozen=True, slots=True)
class Pair:
    """A reference record and a candidate record of the same tap, step and position."""

    reference: Record
    candidate: Record
    drift: Drift


@dataclass(frozen=True, slots=True)
class Pairing:
    """All pairs of two arms, and what found no partner. Nothing is skipped."""

    matched: tuple[Pair, ...]
    only_reference: tuple[Record, ...]
    only_candidate: tuple[Record, ...]

    @property
    def unpaired(self) -> tuple[Record, ...]:
        """Leftovers of both sides."""
        return self.only_reference + self.only_candidate


def pair(trace: Trace, reference: str, candidate: str, payloads: PayloadSource) -> Pairing:
    """Return the pairs of two arms of a trace, in execution order, matched by step, layer, tensor and position.

    Records of the same tap whose shapes disagree are not pairs: both are left over.
    """
    left = {
        _key(record): record for record in trace.records if record.arm == reference and record.phase != "prefill_row"
    }
    right = {_key(record): record for record in trace.records if record.arm == candidate}
    steps = {record.step for record in right.values()}
    fits = {key for key in left.keys() & right.keys() if _same_shape(left[key], right[key])}
    pairs = tuple(
        Pair(left[key], right[key], drift_between(left[key], right[key], payloads)) for key in sorted(fits, key=_order)
    )
    return Pairing(
        pairs,
        tuple(left[key] for key in sorted(left.keys() - fits, key=_order) if left[key].step in steps or not steps),
        tuple(right[key] for key in sorted(right.keys() - fits, key=_order)),
    )


_Key = tuple[int, int | None, str, int | None]


def _key(record: Record) -> _Key:
    return (record.step, record.layer, record.tensor, record.logical_tok_idx)


def _order(key: _Key) -> tuple[int, tuple[int, int, int, str], int]:
    step, layer, tensor, position = key
    return (step, execution_order(layer, tensor), -1 if position is None else position)


def _same_shape(left: Record, right: Record) -> bool:
    return left.shape is None or right.shape is None or left.shape == right.shape


def drift_between(reference: Record, candidate: Record, payloads: PayloadSource) -> Drift:
    """Return the drift of two records, on the best evidence that both carry: hash, payload, sketch, moments."""
    if reference.hash == candidate.hash and reference.dtype == candidate.dtype:
        return EQUAL
    if not _finite_alike(reference, candidate):
        return Drift(math.inf, "moments")
    p, d = payloads.get(reference), payloads.get(candidate)
    if p is not None and d is not None:
        return exact_drift(p, d)
    if reference.sketch is not None and candidate.sketch is not None and reference.l2 is not None:
        difference = np.subtract(candidate.sketch, reference.sketch)
        return Drift(ratio(l2_norm(difference), reference.l2), "sketch")
    if reference.abs_sum is not None and candidate.abs_sum is not None:
        return Drift(ratio(abs(candidate.abs_sum - reference.abs_sum), reference.abs_sum), "moments")
    return UNKNOWN


def exact_drift(reference: Array, candidate: Array) -> Drift:
    """Return the drift of two whole tensors of one shape. Equal infinities, and NaN in the same places, are equal."""
    p, d = to_float64(reference).reshape(-1), to_float64(candidate).reshape(-1)
    alike = (p == d) | (np.isnan(p) & np.isnan(d))
    if not (np.isfinite(p) & np.isfinite(d) | alike).all():
        return Drift(math.inf, "payload", math.inf, math.inf)
    finite = np.isfinite(p)
    gaps: Float64 = np.where(alike, 0.0, np.where(finite, d, 0.0) - np.where(finite, p, 0.0))
    worst = int(np.abs(gaps).argmax()) if gaps.size else 0
    largest = float(np.abs(gaps[worst])) if gaps.size else 0.0
    scale = float(np.abs(p[finite]).max()) if finite.any() else 0.0
    return Drift(
        ratio(l2_norm(gaps), l2_norm(p[finite])),
        "payload",
        max_abs=largest,
        ulp=ratio(largest, _ulp(scale, reference)),
        worst=tuple(int(i) for i in np.unravel_index(worst, reference.shape)) if gaps.size else None,
    )


def ratio(distance: float, size: float) -> float:
    """Return distance/size, with 0/0 = 0 and x/0 = inf."""
    if distance == 0.0:
        return 0.0
    return distance / size if size > 0.0 else math.inf


def _finite_alike(left: Record, right: Record) -> bool:
    counts = [(r.nan_count, r.inf_count) for r in (left, right)]
    return None in counts[0] or None in counts[1] or counts[0] == counts[1]


def _ulp(value: float, array: Array) -> float:
    if array.dtype.kind in "iub":
        return 1.0
    nearest = np.abs(np.asarray(value).astype(array.dtype))
    above = np.nextafter(nearest, np.asarray(np.inf, dtype=array.dtype))
    gap = float(above.astype(np.float64) - nearest.astype(np.float64))
    return gap if math.isfinite(gap) else 0.0
