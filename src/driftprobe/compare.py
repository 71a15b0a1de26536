"""pair() and the metrics: how far two records of the same tap are from each other, and on what evidence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from driftprobe.fingerprint import Array, Float64, l2_norm, to_float64
from driftprobe.taps import CACHE_TAPS, ExecutionOrder, execution_order
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

    On the rung `moments` it is a lower bound: |‖d‖₂−‖p‖₂|/‖p‖₂ where both sides have `l2`, else |‖d‖₁−‖p‖₁|/‖p‖₁,
    which bounds the same ratio in the 1-norm; `proven` is what follows from it for the ratio in the 2-norm.
    """
    rung: str
    """The evidence it stands on: `hash`, `payload`, `sketch`, `moments` (a lower bound), or `none`."""
    max_abs: float | None = None
    """Largest |d−p|; payload only."""
    ulp: float | None = None
    """`max_abs` in units in the last place of the reference's largest element; payload only."""
    worst: tuple[int, ...] | None = None
    """Index of the element that differs most; payload only."""
    proven: float | None = None
    """Rung `moments` only: what ‖d−p‖₂/‖p‖₂ is at least, whatever the tensors are."""

    @property
    def lower_bound(self) -> bool:
        """Whether the true drift may be larger than `value`."""
        return self.rung == "moments" and self.value is not None and math.isfinite(self.value)

    @property
    def at_least(self) -> float | None:
        """What the drift is at least; the drift itself where it is measured, None where it cannot be told."""
        return self.proven if self.lower_bound else self.value

    @property
    def equal(self) -> bool:
        """Whether the tensors are bit for bit the same."""
        return self.rung == "hash" and self.value == 0.0


EQUAL = Drift(0.0, "hash", 0.0, 0.0)
SCORES = "attn_scores"
"""The tap that counts up to a constant along each row."""
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


ByArm = Mapping[str, Sequence[Record]]
"""Arm -> its records."""


def by_arm(trace: Trace) -> ByArm:
    """Return a trace's records by arm; prefill rows that no decode step computed are left out."""
    found: dict[str, list[Record]] = {}
    for record in trace.records:
        if record.phase != "prefill_row":
            found.setdefault(record.arm, []).append(record)
    return found


def pair(trace: Trace, reference: str, candidate: str, payloads: PayloadSource) -> Pairing:
    """Return the pairs of two arms of a trace, as `pair_arms` does."""
    return pair_arms(by_arm(trace), reference, candidate, payloads)


def pair_arms(arms: ByArm, reference: str, candidate: str, payloads: PayloadSource) -> Pairing:
    """Return the pairs of two arms, in execution order, matched by step, layer, tensor and position.

    A record that names no position is matched with the one record of its step, layer and tensor on the other side.
    Records whose shapes disagree in more than the number of rows seen, and records of the same place beyond the first,
    are not pairs: they are left over.
    """
    left, right = (_by_place(arms.get(arm, ())) for arm in (reference, candidate))
    found: list[tuple[Record, Record]] = []
    for place, mine in left.items():
        found += _matches(mine, right.get(place, []))
    taken = {id(record) for both in found for record in both}
    found.sort(key=lambda both: _order(both[0]))
    return Pairing(_measured(found, payloads), _left_over(left, taken), _left_over(right, taken))


def _measured(found: Sequence[tuple[Record, Record]], payloads: PayloadSource) -> tuple[Pair, ...]:
    """Return pairs with their drifts; those that sketches tell are measured together."""
    surplus = {(p.step, p.layer): _surplus(p, d) for p, d in found if p.tensor == SCORES}

    def drift(p: Record, d: Record) -> Drift | None:
        if same_shape(p, d):
            return _without_sketches(p, d, payloads)
        shown = p.tensor in CACHE_TAPS and surplus.get((p.step, p.layer)) == _surplus(p, d)
        return _drift_of_common_rows(p, d, payloads) if shown else Drift(math.inf, "moments")

    drifts = [drift(p, d) for p, d in found]
    sketched = iter(_sketched_drifts([both for both, told in zip(found, drifts, strict=True) if told is None]))
    return tuple(
        Pair(p, d, next(sketched) if told is None else told) for (p, d), told in zip(found, drifts, strict=True)
    )


_Place = tuple[int, int | None, str]
_ByPlace = dict[_Place, list[Record]]


def _by_place(records: Iterable[Record]) -> _ByPlace:
    """Return records by step, layer and tensor."""
    found: _ByPlace = {}
    for record in records:
        found.setdefault((record.step, record.layer, record.tensor), []).append(record)
    return found


def _matches(left: list[Record], right: list[Record]) -> list[tuple[Record, Record]]:
    """Return the pairs of one place: equal positions first, then one that names none with the only one left."""
    if len(left) == len(right) == 1:
        positions = left[0].logical_tok_idx, right[0].logical_tok_idx
        pairs = [(left[0], right[0])] if positions[0] == positions[1] or None in positions else []
    else:
        pairs = _by_position(left, right)
    return [(p, d) for p, d in pairs if same_shape(p, d) or other_extent(p, d)]


def _by_position(left: list[Record], right: list[Record]) -> list[tuple[Record, Record]]:
    pairs = []
    rest = list(right)
    for record in left:
        partner = next((r for r in rest if r.logical_tok_idx == record.logical_tok_idx), None)
        if partner is not None:
            rest.remove(partner)
            pairs.append((record, partner))
    taken = {id(record) for record, _ in pairs}
    alone = [record for record in left if id(record) not in taken]
    if len(alone) == len(rest) == 1 and None in (alone[0].logical_tok_idx, rest[0].logical_tok_idx):
        pairs.append((alone[0], rest[0]))
    return pairs


def _left_over(records: _ByPlace, taken: set[int]) -> tuple[Record, ...]:
    alone = (record for here in records.values() for record in here if id(record) not in taken)
    return tuple(sorted(alone, key=_order))


def _order(record: Record) -> tuple[int, ExecutionOrder, int]:
    position = record.logical_tok_idx
    return (
        record.step,
        execution_order(record.layer, record.tensor, record.order),
        -1 if position is None else position,
    )


def same_shape(left: Record, right: Record) -> bool:
    """Whether two records have one shape; a record that names none cannot disagree."""
    return left.shape is None or right.shape is None or left.shape == right.shape


_ROWS_AXIS = {"k_cache": 0, "v_cache": 0, "attn_scores": -1, "attn_probs": -1}
"""Taps with a row, or a column, for each position that the step sees: one side may see more than the other."""


def rows_axis(tensor: str) -> int | None:
    """Return the axis along which a tap has a row, or a key, for each position that the step sees; None without one."""
    return _ROWS_AXIS.get(tensor)


def other_extent(left: Record, right: Record) -> bool:
    """Whether two records differ in shape by the number of positions seen, and by nothing else."""
    axis = rows_axis(left.tensor)
    if axis is None or not left.shape or not right.shape or len(left.shape) != len(right.shape):
        return False
    rest = [tuple(n for i, n in enumerate(r.shape or ()) if i != axis % len(left.shape)) for r in (left, right)]
    return rest[0] == rest[1]


def _surplus(reference: Record, candidate: Record) -> tuple[int, int]:
    """Return how many positions more the candidate sees, and how much later it begins."""
    axis = _ROWS_AXIS[reference.tensor]
    if not reference.shape or not candidate.shape:
        return 0, 0
    return candidate.shape[axis] - reference.shape[axis], candidate.row_start - reference.row_start


def _drift_of_common_rows(reference: Record, candidate: Record, payloads: PayloadSource) -> Drift:
    """Return the drift of the cache rows that both sides see; that one sees more is a matter of `attn_scores`."""
    starts, rows = (reference.row_start, candidate.row_start), (reference.rows or (), candidate.rows or ())
    first, last = max(starts), min(start + len(r) for start, r in zip(starts, rows, strict=True))
    if first >= last:
        return Drift(math.inf, "moments")
    hashes = [r[first - start : last - start] for start, r in zip(starts, rows, strict=True)]
    if hashes[0] == hashes[1] and _same_dtype(reference, candidate):
        return EQUAL
    arrays = payloads.get(reference), payloads.get(candidate)
    if arrays[0] is None or arrays[1] is None:
        return UNKNOWN
    return exact_drift(arrays[0][first - starts[0] : last - starts[0]], arrays[1][first - starts[1] : last - starts[1]])


def drift_between(reference: Record, candidate: Record, payloads: PayloadSource) -> Drift:
    """Return the drift of two records, on the best evidence that both carry: hash, payload, sketch, moments."""
    found = _without_sketches(reference, candidate, payloads)
    return _sketched_drifts([(reference, candidate)])[0] if found is None else found


def _without_sketches(reference: Record, candidate: Record, payloads: PayloadSource) -> Drift | None:
    """Return the drift of two records, or None where their sketches are the best evidence."""
    if reference.hash == candidate.hash and _same_dtype(reference, candidate):
        return EQUAL
    if not _finite_alike(reference, candidate):
        return Drift(math.inf, "moments")
    p, d = payloads.get(reference), payloads.get(candidate)
    if p is not None and d is not None:
        return exact_drift(p, without_shift(p, d) if reference.tensor == SCORES else d)
    if reference.sketch is not None and candidate.sketch is not None:
        return None
    return _bound_of_drift(reference, candidate)


_TOGETHER = 1024
"""Pairs whose sketches are subtracted together: what they take stays in the cache."""


def _sketched_drifts(pairs: Sequence[tuple[Record, Record]]) -> list[Drift]:
    """Return ‖sketch(d)−sketch(p)‖/‖p‖₂, with ‖sketch(p)‖ for an unknown ‖p‖₂ (Charikar et al. 2002), of each pair.

    All of one trace have one size, which its header states.
    """
    found: list[Drift] = []
    for start in range(0, len(pairs), _TOGETHER):
        block = pairs[start : start + _TOGETHER]
        p, d = (np.array([both[side].sketch for both in block], dtype=np.float64) for side in (0, 1))
        with np.errstate(over="ignore", invalid="ignore"):
            gaps = _norms(d - p)
        for index, (reference, _) in enumerate(block):
            size = l2_norm(p[index]) if reference.l2 is None else reference.l2
            found.append(Drift(ratio(gaps[index], size), "sketch"))
    return found


def _norms(rows: Float64) -> list[float]:
    """Return the norm of each row `[n, m]`: bit for bit what `l2_norm` says of it."""
    tops = np.abs(rows).max(axis=1, initial=0.0)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        norms: list[float] = np.sqrt(np.square(rows).sum(axis=1)).tolist()
    for index in np.flatnonzero((tops != 0.0) & ~((tops > 1e-100) & (tops < 1e100))).tolist():
        norms[index] = l2_norm(rows[index])
    return norms


def _bound_of_drift(reference: Record, candidate: Record) -> Drift:
    """Return what norms alone say: |‖d‖−‖p‖| ≤ ‖d−p‖ in the 2-norm and in the 1-norm.

    In the 1-norm, ‖d−p‖₁ ≤ √n·‖d−p‖₂ for n elements that may differ, and ‖p‖₁ ≥ ‖p‖₂; so |‖d‖₁−‖p‖₁|/(√n·‖p‖₁) is a
    lower bound of the drift, and without n nothing is proven. Where d is zero throughout, the drift is 1 exactly.
    """
    if reference.l2 is not None and candidate.l2 is not None:
        value = ratio(abs(candidate.l2 - reference.l2), reference.l2)
        return Drift(value, "moments", proven=value)
    if reference.abs_sum is None or candidate.abs_sum is None:
        return UNKNOWN
    value = ratio(abs(candidate.abs_sum - reference.abs_sum), reference.abs_sum)
    if candidate.abs_sum == 0.0:
        return Drift(value, "moments", proven=value)
    count = _elements(reference, candidate)
    return Drift(value, "moments", proven=value / math.sqrt(count) if count else 0.0)


def _elements(reference: Record, candidate: Record) -> int | None:
    """Return in how many elements the two can differ at most, or None where neither shapes nor counts say."""
    shape = reference.shape if reference.shape is not None else candidate.shape
    if shape is not None:
        return math.prod(shape)
    if reference.nz_count is None or candidate.nz_count is None:
        return None
    return reference.nz_count + candidate.nz_count


def without_shift(reference: Array, candidate: Array) -> Array:
    """Return scores `[T, H, S]` less, in each row, the mean of candidate − reference over the keys finite in both.

    Softmax gives the same for scores that differ by a constant along a row; of all constants the mean leaves the
    smallest distance. Where nothing is shifted this takes away a share 1/S of what differs.
    """
    p, d = to_float64(reference), to_float64(candidate)
    if p.shape != d.shape or p.ndim == 0:
        return candidate
    finite = np.isfinite(p) & np.isfinite(d)
    gaps = np.where(finite, np.where(finite, d, 0.0) - np.where(finite, p, 0.0), 0.0)
    shift = gaps.sum(axis=-1, keepdims=True) / np.maximum(finite.sum(axis=-1, keepdims=True), 1)
    shifted: Array = np.where(np.isfinite(d), d - shift, d)
    return shifted


def exact_drift(reference: Array, candidate: Array) -> Drift:
    """Return the drift of two whole tensors of one shape. Equal infinities, and NaN in the same places, are equal."""
    p, d = to_float64(reference).reshape(-1), to_float64(candidate).reshape(-1)
    alike = (p == d) | (np.isnan(p) & np.isnan(d))
    if not (np.isfinite(p) & np.isfinite(d) | alike).all():
        return Drift(math.inf, "payload", math.inf, math.inf)
    finite = np.isfinite(p)
    with np.errstate(over="ignore"):  # ratio knows
        gaps: Float64 = np.where(alike, 0.0, np.where(finite, d, 0.0) - np.where(finite, p, 0.0))
    worst = int(np.abs(gaps).argmax()) if gaps.size else 0
    largest = float(np.abs(gaps[worst])) if gaps.size else 0.0
    scale = float(np.abs(p[finite]).max()) if finite.any() else 0.0
    with np.errstate(invalid="ignore"):
        distance = l2_norm(gaps)
    return Drift(
        ratio(distance, l2_norm(p[finite])),
        "payload",
        max_abs=largest,
        ulp=ratio(largest, _ulp(scale, reference.dtype)),
        worst=tuple(int(i) for i in np.unravel_index(worst, reference.shape)) if gaps.size else None,
    )


def ratio(distance: float, size: float) -> float:
    """Return distance/size, with 0/0 = 0 and x/0 = inf; a distance beyond float64, which comes as NaN, is inf too."""
    if distance == 0.0:
        return 0.0
    return distance / size if size > 0.0 and not math.isnan(distance) else math.inf


def _same_dtype(left: Record, right: Record) -> bool:
    return left.dtype is None or right.dtype is None or left.dtype == right.dtype


def _finite_alike(left: Record, right: Record) -> bool:
    mine, theirs = (left.nan_count, left.inf_count), (right.nan_count, right.inf_count)
    return mine == theirs or None in mine or None in theirs


@lru_cache(maxsize=1 << 14)  # a reference is compared with every control
def _ulp(value: float, dtype: np.dtype[Any]) -> float:
    if dtype.kind in "iub":
        return 1.0
    nearest = np.abs(np.asarray(value).astype(dtype))
    # Towards zero at the largest finite value of the dtype, where there is none above.
    with np.errstate(over="ignore"):
        edges = [np.nextafter(nearest, np.asarray(end, dtype=dtype)) for end in (np.inf, 0.0)]
    gaps = (abs(float(edge.astype(np.float64) - nearest.astype(np.float64))) for edge in edges)
    return next((gap for gap in gaps if math.isfinite(gap)), 0.0)
