"""The K/V row check: which of decode's cache rows are prefill's own, moved, empty, or another layer's.

K is compared with K and V with V. Rows are known by their hashes, so a permutation or a shift is seen as one; where
whole tensors are at hand, a row that rounding has touched is still known by its distance.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from driftprobe.compare import PayloadSource
from driftprobe.fingerprint import DTYPES, Array, Float64, hash_bytes, l2_norm, to_float64
from driftprobe.judgement import Cell, KvIndicators, RowCheck, Status
from driftprobe.local import LOCAL_LIMIT, Ground, Local
from driftprobe.taps import CACHE_TAPS
from driftprobe.trace import Record, Trace

MAX_MATCHED_ROWS = 4096
"""Rows beyond which distances to every other row are not computed (n² of them)."""

OTHERS = 5.0
"""How many times the largest difference of any other row is allowed to a row; beyond LOCAL_LIMIT of that, 7.5 times, it
stands out. Healthy rows differ by more from one another in a coarse dtype, but rows are not picked by that here."""

_Known = dict[tuple[str, int, int], dict[str, set[int]]]
"""(tensor, layer, step) -> row hash -> positions where some prefill arm has it."""
WHOLE_PREFILLS = frozenset({"prefill_last", "prefill_ext"})
"""A prefill in chunks leans on the cache between its calls, as decode does: a wrong cache is wrong in its rows too."""


def check_rows(trace: Trace, cells: Sequence[Cell], payloads: PayloadSource) -> tuple[RowCheck, ...]:
    """Return the row check of every K and V cell, in execution order. Rows of the step's own token are left out.

    A row counts as equal where its hash is that of any prefill arm at this position: a row that a differently shaped
    prefill wrote is no fault.
    """
    known = _known_rows(trace.records)
    cache_cells = [cell for cell in cells if cell.tensor in CACHE_TAPS and cell.layer is not None]
    return tuple(
        _check(cell, known, _numbers(cell, cache_cells, payloads))
        for cell in cache_cells
        if cell.candidate.rows and cell.reference.rows
    )


def kv_indicators(
    rows: Iterable[RowCheck], cells: Iterable[Cell], more: Iterable[tuple[str, int, int]] = ()
) -> KvIndicators:
    """Return the three indicators of the seed report over all rows of a mode.

    `more` are tensor, equal rows and compared rows of cells that others answered for.
    """
    counts = {"k_cache": [0, 0], "v_cache": [0, 0]}
    for tensor, equal, compared in more:
        counts[tensor][0] += equal
        counts[tensor][1] += compared
    for check in rows:
        counts[check.tensor][0] += check.equal
        counts[check.tensor][1] += check.compared
    (k_equal, k_all), (v_equal, v_all) = counts["k_cache"], counts["v_cache"]
    judged = [cell.status for cell in cells if cell.tensor in CACHE_TAPS]
    told = Status.FAIL in judged or (bool(judged) and Status.UNKNOWN not in judged)
    return KvIndicators(
        k_hash_consistent=k_equal == k_all if k_all else None,
        v_hash_consistent=v_equal == v_all if v_all else None,
        kv_aligned=Status.FAIL not in judged if told else None,
        k_rows_equal=k_equal,
        k_rows=k_all,
        v_rows_equal=v_equal,
        v_rows=v_all,
    )


def keys_beside_values(cells: Sequence[Cell], payloads: PayloadSource) -> tuple[Cell, ...]:
    """Return cells with each K cell failed that passes its limit, where the rows that V fails in stand out.

    A wrong row is wrong in K and V alike, and one of many may be too small a part of K for the limit of a coarse dtype.
    Which rows are looked at is told by V, so that no row is picked for being the largest.
    """
    values = {(c.step, c.layer): c for c in cells if c.tensor == "v_cache" and c.status is Status.FAIL}
    return tuple(_beside(cell, values.get((cell.step, cell.layer)), payloads) for cell in cells)


def _beside(cell: Cell, value: Cell | None, payloads: PayloadSource) -> Cell:
    if value is None or cell.tensor != "k_cache" or cell.status is not Status.PASS or cell.drift.equal:
        return cell
    keys, values = (_row_drifts(c, payloads) for c in (cell, value))
    if keys is None or values is None or keys.shape != values.shape:
        return cell
    wrong = values > value.floor.limit
    if not wrong.any() or wrong.all():
        return cell
    excess = float(keys[wrong].min()) / max(OTHERS * float(keys[~wrong].max()), cell.floor.value)
    return (
        replace(cell, status=Status.FAIL, local=Local(excess, ("v_cache",), Ground.VALUES))
        if excess > LOCAL_LIMIT
        else cell
    )


def _row_drifts(cell: Cell, payloads: PayloadSource) -> Float64 | None:
    """Return how far each cached row before the step's own is from prefill's, relative to it `[S]`."""
    mine, theirs = (payloads.get(record) for record in (cell.reference, cell.candidate))
    token, start = cell.candidate.logical_tok_idx, cell.candidate.row_start
    if mine is None or theirs is None or token is None or start != cell.reference.row_start:
        return None
    if mine.shape != theirs.shape:
        return None
    p, d = (_flat(array)[: token - start] for array in (mine, theirs))
    if not len(p) or not (np.isfinite(p).all() and np.isfinite(d).all()):
        return None
    sizes = np.sqrt(np.square(p).sum(axis=1))
    gaps = np.sqrt(np.square(d - p).sum(axis=1))
    drifts: Float64 = np.divide(gaps, sizes, out=np.where(gaps > 0, np.inf, 0.0), where=sizes > 0)
    return drifts


def rows_by_position(record: Record) -> dict[int, str]:
    """Return position -> row hash of a K/V record."""
    return {record.row_start + i: row for i, row in enumerate(record.rows or ())}


def rows_as_numbers(record: Record, payloads: PayloadSource) -> dict[int, Float64] | None:
    """Return position -> row of a K/V record, flat, or None without its whole tensor."""
    array = payloads.get(record)
    if array is None:
        return None
    flat = _flat(array)
    return {record.row_start + i: row for i, row in enumerate(flat)}


def _flat(array: Array) -> Float64:
    """Return rows `[S, G, D]` as `[S, G·D]`; a cache may hold none."""
    return to_float64(array).reshape(len(array), prod(array.shape[1:]))


def zero_row_hash(record: Record) -> str | None:
    """Return the hash that an all-zero row of this record has, or None where its dtype or shape is unknown."""
    if record.dtype not in DTYPES or not record.shape:
        return None
    return hash_bytes(bytes(prod(record.shape[1:]) * DTYPES[record.dtype].itemsize))


def _known_rows(records: Iterable[Record]) -> _Known:
    known: _Known = defaultdict(lambda: defaultdict(set))
    for record in records:
        if record.phase in WHOLE_PREFILLS and record.rows and record.layer is not None:
            for position, row in rows_by_position(record).items():
                known[(record.tensor, record.layer, record.step)][row].add(position)
    return known


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The rows of one cell as numbers, and prefill's of every layer, `[S, G·D]` each."""

    candidate: Float64
    candidate_start: int
    prefill: dict[int, tuple[int, Float64]]
    """Layer -> (position of the first row, rows)."""
    tolerance: float
    """Relative distance within which two rows are the same row, rounded differently."""

    def same(self, position: int, layer: int) -> bool:
        """Whether prefill's row of the same position in a layer is this candidate row."""
        start, rows = self.prefill.get(layer, (0, np.empty((0, 0))))
        row = self.candidate[position - self.candidate_start]
        if not 0 <= position - start < len(rows) or rows.shape[1:] != row.shape:
            return False
        size = l2_norm(rows[position - start])
        return size > 0 and l2_norm(rows[position - start] - row) <= self.tolerance * size

    def near(self, position: int, layer: int) -> list[int]:
        """Return the positions whose prefill row in a layer is this candidate row, nearest first."""
        start, rows = self.prefill.get(layer, (0, np.empty((0, 0))))
        row = self.candidate[position - self.candidate_start]
        if rows.shape[1:] != row.shape or not 0 < len(rows) <= MAX_MATCHED_ROWS:
            return []
        gaps = np.sqrt(np.square(rows - row).sum(axis=1))
        sizes = np.sqrt(np.square(rows).sum(axis=1))
        order = np.argsort(gaps, kind="stable")
        return [start + int(i) for i in order if sizes[i] > 0 and gaps[i] <= self.tolerance * sizes[i]]


def _numbers(cell: Cell, cells: Sequence[Cell], payloads: PayloadSource) -> _Numbers | None:
    array = payloads.get(cell.candidate)
    if array is None or cell.drift.equal:
        return None
    prefill = {}
    for other in cells:
        if (other.tensor, other.step, other.layer is None) == (cell.tensor, cell.step, False):
            rows = payloads.get(other.reference)
            if rows is not None and other.layer is not None:
                prefill[other.layer] = (other.reference.row_start, _flat(rows))
    return _Numbers(_flat(array), cell.candidate.row_start, prefill, cell.floor.limit)


def _check(cell: Cell, known: _Known, numbers: _Numbers | None) -> RowCheck:
    layer = cell.layer if cell.layer is not None else 0
    reference, candidate = rows_by_position(cell.reference), rows_by_position(cell.candidate)
    token = cell.candidate.logical_tok_idx
    shared = [p for p in sorted(reference.keys() & candidate.keys()) if token is None or p < token]
    own, zero = known[(cell.tensor, layer, cell.step)], zero_row_hash(cell.candidate)
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    sources: dict[int, set[int]] = {}
    for position in shared:
        row = candidate[position]
        equal = row == reference[position] or position in own.get(row, ())
        near = numbers.near(position, layer) if numbers and not equal else []
        if equal:
            kind, source = "equal", position
        elif position in near or cell.status is Status.PASS:
            kind, source = "within", position
        elif row == zero:
            kind, source = "zero", position
        elif row in own or near:
            kind, source = "moved", position
            sources[position] = own.get(row) or set(near)
        else:
            other = _other_layer(row, position, layer, cell, known, numbers)
            kind, source = ("changed", position) if other is None else ("other_layer", other)
        found[kind].append((position, source))
    return RowCheck(
        prompt=cell.prompt,
        step=cell.step,
        layer=layer,
        tensor=cell.tensor,
        compared=len(shared),
        equal=len(found["equal"]),
        within=len(found["within"]),
        moved=_agreeing(sources),
        zero=tuple(position for position, _ in found["zero"]),
        other_layer=tuple(found["other_layer"]),
        changed=tuple(position for position, _ in found["changed"]),
    )


def _agreeing(sources: dict[int, set[int]]) -> tuple[tuple[int, int], ...]:
    """Return (position, source) of each moved row; of several equal rows the one that as many others are as far from.

    The same token gives the same row at many positions where no position is in it (V of the first layer).
    """
    votes = Counter(position - source for position, several in sources.items() for source in several)
    return tuple(
        (position, min(several, key=lambda source: (-votes[position - source], abs(position - source), source)))
        for position, several in sources.items()
    )


def _other_layer(
    row: str, position: int, layer: int, cell: Cell, known: _Known, numbers: _Numbers | None
) -> int | None:
    """Return the layer whose prefill row of the same position this row is, or None."""
    by_hash = (
        other
        for (tensor, other, step), rows in known.items()
        if tensor == cell.tensor and step == cell.step and other != layer and position in rows.get(row, ())
    )
    found = next(by_hash, None)
    if found is not None or numbers is None:
        return found
    return next((other for other in numbers.prefill if other != layer and numbers.same(position, other)), None)
