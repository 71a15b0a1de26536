"""The pairs of a trace that answer for all others: what a judgement of millions of records has to look at.

Floor, limit and verdict ask of the pairs of one arm at one tap only how large their largest drift is. So of each arm
and tap the pair that drifts most is kept, and judged by the rules as they stand (verdict.judge_thinned). Where it
passes, all others do. Where anything is unusual, or anything fails, nothing is thinned and the trace is judged as a
whole. The drift computed here only chooses: pairs that are as large to a relative NEARLY are all kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from driftprobe.columns import NONE, Array, Columns, Rows, axes_of
from driftprobe.compare import SCORES, NoPayloads, Pair, Pairing, drift_between
from driftprobe.floor import is_control, repeated
from driftprobe.judgement import AttentionSums, LeftOut, Sums
from driftprobe.rows import WHOLE_PREFILLS
from driftprobe.taps import CACHE_TAPS, PATHS, execution_order
from driftprobe.trace import CONSTANTS, Record, Trace
from driftprobe.verdict import Pairs

NEARLY = 1e-9
"""Relative distance from the largest drift within which a pair is kept: NumPy's sums differ in their order."""
MAX_CODE = 1 << 22
"""Layers times names, at most: a table has an entry for each."""
BLOCK = 8192
"""Pairs whose sketches are subtracted at a time."""


class _WholeError(Exception):
    """The trace has to be judged as a whole."""


def thin(columns: Columns) -> Pairs | None:
    """Return the pairs that answer for a trace; None where it has to be judged as a whole."""
    try:
        return _Thinning(columns).result()
    except _WholeError:
        return None


@dataclass(frozen=True)
class _Arm:
    """The records of one arm in order of step and execution."""

    keys: Array
    """step · places + the place's rank in order of execution; every one once."""
    at: Array
    """Row of each."""


@dataclass(frozen=True)
class _Pairs:
    """The pairs of two arms, in order of step and execution."""

    keys: Array
    left: Array
    right: Array
    """Rows of reference and candidate."""
    differs: Array
    value: Array
    """About the drift; 0 where the hashes are equal."""


class _Thinning:
    def __init__(self, columns: Columns) -> None:
        self.columns, self.rows = columns, columns.rows
        self.tensors = {
            name: columns.number_of(name) for name in (SCORES, "attn_probs", "embed", "expert_ids", "logits")
        }
        self.caches = [columns.number_of(name) for name in sorted(CACHE_TAPS)]
        self._ask_for_the_usual()
        self.places, self.place_of = self._places()
        self.arms = self._arms()
        self.sketched = True

    def result(self) -> Pairs:
        """Pair every arm, and keep what answers for it."""
        if not {"P", "D"} <= self.arms.keys():
            raise _WholeError
        decode = self._pairs("P", "D", whole=True)
        aligned = self._pairs("P", "A", whole=True) if "A" in self.arms else None
        controls = {arm: self._pairs(repeated(arm), arm) for arm in sorted(self.arms) if is_control(arm)}
        kept = self._kept(decode, all_places=True)
        kept |= self.rows["tensor"][decode.left] == self.tensors["logits"]
        by_arm = {arm: self._pairing(pairs, self._kept_of_control(pairs, decode)) for arm, pairs in controls.items()}
        return Pairs(
            trace=Trace(self.columns.header, (), self.columns.events, self.columns.name),
            decode=self._pairing(decode, kept),
            aligned=self._pairing(aligned, self._kept(aligned, all_places=True)) if aligned else Pairing((), (), ()),
            controls={arm: pairing.matched for arm, pairing in by_arm.items()},
            left_out=self._left_out(decode, kept),
        )  # fmt: skip

    def _ask_for_the_usual(self) -> None:
        """Raise _WholeError for what other rules than the largest drift have a say in."""
        columns, rows = self.columns, self.rows
        arms = {columns.words[i] for i in np.unique(rows["arm"])}
        phases = {columns.words[i] for i in np.unique(rows["phase"])}
        unknown = [arm for arm in arms if arm not in {"P", "D", "A", CONSTANTS} and not is_control(arm)]
        more = any(_holds_more(record) for record in columns.odd.values())
        if columns.header.mode == PATHS or unknown or more or "prefill_row" in phases:
            raise _WholeError
        mine = rows.part(rows["arm"] != columns.number_of(CONSTANTS)) if CONSTANTS in arms else rows
        if (mine["logical_tok_idx"] == NONE).any() or (mine["shape"] < 0).any():
            raise _WholeError
        for name in ("token_id", "pos_id", "nan_count", "inf_count"):
            missing = mine[name] == NONE
            if missing.any() != missing.all():
                raise _WholeError
        if (mine["nan_count"] > 0).any() or ((mine["inf_count"] > 0) & (mine["tensor"] != self.tensors[SCORES])).any():
            raise _WholeError

    def _places(self) -> tuple[list[tuple[int | None, str]], Array]:
        """Return the places in order of execution, and a table from layer · words + tensor to a place's rank."""
        rows, count = self.rows, len(self.columns.words)
        codes = (rows["layer"].astype(np.int64) + 1) * count + rows["tensor"]
        if int(codes.max()) > MAX_CODE:
            raise _WholeError
        seen = np.flatnonzero(np.bincount(codes, minlength=1))
        names = [
            (None if code < count else code // count - 1, self.columns.words[code % count]) for code in seen.tolist()
        ]
        order = sorted(range(len(names)), key=lambda i: execution_order(*names[i]))
        table = np.zeros(int(seen[-1]) + 1, dtype=np.int64)
        table[seen[order]] = np.arange(len(order))
        return [names[i] for i in order], table[codes]

    def _arms(self) -> dict[str, _Arm]:
        """Return every arm; raises _WholeError where a place and step has two records, or a step two phases."""
        found, keys = {}, self.rows["step"] * len(self.places) + self.place_of
        for arm in np.unique(self.rows["arm"]).tolist():
            if self.columns.words[arm] == CONSTANTS:
                continue
            at = np.flatnonzero(self.rows["arm"] == arm)
            mine = keys[at]
            if (np.diff(mine) <= 0).any():
                order = np.argsort(mine, kind="stable")
                at, mine = at[order], mine[order]
                if (np.diff(mine) == 0).any():
                    raise _WholeError
            same_step = np.diff(mine // len(self.places)) == 0
            if (np.diff(self.rows["phase"][at])[same_step] != 0).any():
                raise _WholeError
            found[self.columns.words[arm]] = _Arm(mine, at)
        return found

    def _pairs(self, reference: str, candidate: str, *, whole: bool = False) -> _Pairs:
        """Return the pairs of two arms; raises _WholeError where one is no plain pair, or a `whole` arm lacks one."""
        if reference not in self.arms:
            raise _WholeError
        p, d = self.arms[reference], self.arms[candidate]
        if np.array_equal(p.keys, d.keys):
            keys, left, right = p.keys, p.at, d.at
        else:
            keys, i, j = np.intersect1d(p.keys, d.keys, assume_unique=True, return_indices=True)
            left, right = p.at[i], d.at[j]
            if whole or not len(keys):
                raise _WholeError
        for name in ("shape", "dtype", "token_id", "logical_tok_idx", "pos_id", "inf_count", "row_start"):
            if (self.rows[name][left] != self.rows[name][right]).any():
                raise _WholeError
        if ((self.rows["sums"][left] < 0) != (self.rows["sums"][right] < 0)).any():
            raise _WholeError
        differs = self.rows["hash"][left] != self.rows["hash"][right]
        strict = (self.tensors["embed"], self.tensors["expert_ids"])
        if np.isin(self.rows["tensor"][left[differs]], strict).any():
            raise _WholeError
        value = np.zeros(len(keys))
        value[differs] = self._drifts(left[differs], right[differs])
        return _Pairs(keys, left, right, differs, value)

    def _drifts(self, left: Array, right: Array) -> Array:
        """Return about how far pairs of unequal hashes are apart: by sketches, or by norms where none has a sketch."""
        rows = self.rows
        with_sketch = rows["sums"][left] >= 0
        if not len(left):
            return np.zeros(0)
        if with_sketch.any() != with_sketch.all():
            raise _WholeError
        size = rows["l2"][left]
        if not with_sketch.all():
            self.sketched = False
            with np.errstate(divide="ignore", invalid="ignore"):
                value = np.abs(rows["l2"][right] - size) / size
        else:
            gaps, own = self._gaps(rows["sums"][left], rows["sums"][right])
            with np.errstate(divide="ignore", invalid="ignore"):
                value = gaps / np.where(np.isnan(size), own, size)
        if not np.isfinite(value).all():
            raise _WholeError
        return np.asarray(value)

    def _gaps(self, left: Array, right: Array) -> tuple[Array, Array]:
        """Return the norms of the differences of sketches, and of the references' sketches."""
        gaps, own = np.empty(len(left)), np.empty(len(left))
        for start in range(0, len(left), BLOCK):
            part = slice(start, start + BLOCK)
            p = self.columns.sums[left[part]]
            d = self.columns.sums[right[part]] - p
            gaps[part] = np.sqrt(np.einsum("ij,ij->i", d, d))
            own[part] = np.sqrt(np.einsum("ij,ij->i", p, p))
            if (gaps[part] < 1e-90)[d.any(axis=1)].any():  # squares may have vanished
                raise _WholeError
        return gaps, own

    def _kept(self, pairs: _Pairs, *, all_places: bool) -> Array:
        """Return which pairs answer for their arm: at every place those that drift most, and the first that differs."""
        place = pairs.keys % len(self.places)
        top = np.zeros(len(self.places))
        np.maximum.at(top, place, pairs.value)
        kept = pairs.differs & (pairs.value >= top[place] * (1 - NEARLY))
        if pairs.differs.any():
            kept[pairs.differs.argmax()] = True
        if all_places:
            quiet = np.ones(len(self.places), dtype=bool)
            quiet[place[pairs.differs]] = False
            first = np.full(len(self.places), -1)
            first[place[::-1]] = np.arange(len(place) - 1, -1, -1)
            kept[first[quiet & (first >= 0)]] = True
        return np.asarray(kept)

    def _kept_of_control(self, pairs: _Pairs, decode: _Pairs) -> Array:
        """Return which pairs of a control count: equal ones only show that it was run, or a place that D lacks."""
        kept = self._kept(pairs, all_places=False)
        known = np.unique(decode.keys % len(self.places))
        kept |= ~np.isin(pairs.keys % len(self.places), known)
        kept[0] = True
        kept[(self.rows["tensor"][pairs.left] == self.tensors["embed"]).argmax()] = True
        return kept

    def _pairing(self, pairs: _Pairs, kept: Array) -> Pairing:
        sides = (self.columns.records(side[kept].tolist()) for side in (pairs.left, pairs.right))
        made = [Pair(p, d, drift_between(p, d, NoPayloads())) for p, d in zip(*sides, strict=True)]
        return Pairing(tuple(made), (), ())

    def _left_out(self, decode: _Pairs, kept: Array) -> LeftOut:
        out = ~kept
        untold = 0 if self.sketched else int((decode.differs & out).sum())
        embeds = int((out & (self.rows["tensor"][decode.left] == self.tensors["embed"])).sum())
        return LeftOut(
            passed=int(out.sum()) - untold, unknown=untold, embeds=embeds, seen=self._seen(),
            cache_rows=self._cache_rows(decode, out), attention=self._attention(),
        )  # fmt: skip

    def _seen(self) -> dict[tuple[str, str, int], frozenset[tuple[int | None, str]]]:
        """Return what every arm recorded in every step; steps that are alike share one set."""
        sets: dict[bytes, frozenset[tuple[int | None, str]]] = {}
        found = {}
        for arm, here in self.arms.items():
            steps, starts = np.unique(here.keys // len(self.places), return_index=True)
            for step, mine in zip(steps.tolist(), np.split(np.arange(len(here.keys)), starts[1:]), strict=True):
                ranks = here.keys[mine] % len(self.places)
                code = ranks.tobytes()
                if code not in sets:
                    sets[code] = frozenset(self.places[rank] for rank in ranks.tolist())
                phase = self.columns.words[self.rows["phase"][here.at[mine[0]]]]
                found[(arm, phase, step)] = sets[code]
        return found

    def _cache_rows(self, decode: _Pairs, out: Array) -> dict[str, tuple[int, int]]:
        """Return for K and V how many rows of the pairs left out were compared, and how many are equal (rows.py)."""
        rows, found = self.rows, {}
        prefills = self._prefills()
        for name, number in zip(sorted(CACHE_TAPS), self.caches, strict=True):
            here = np.flatnonzero(out & (rows["tensor"][decode.left] == number) & (rows["layer"][decode.left] >= 0))
            here = here[(rows["rows"][decode.left[here]] > 0) & (rows["rows"][decode.right[here]] > 0)]
            equal = compared = 0
            for index in here.tolist():
                right = int(decode.right[index])
                count = self._before_the_token(right)
                compared += count
                mine = self.columns.row_hashes(right)[:count]
                others = [self.columns.row_hashes(at)[:count] for at in self._same(int(decode.keys[index]), prefills)]
                same = np.zeros(count, dtype=bool)
                for other in others:
                    same[: len(other)] |= mine[: len(other)] == other
                equal += int(same.sum())
            found[name] = (equal, compared)
        return found

    def _before_the_token(self, row: int) -> int:
        """Return how many rows of a cache record stand before the step's own token."""
        start, count = int(self.rows["row_start"][row]), int(self.rows["rows"][row])
        return max(0, min(count, int(self.rows["logical_tok_idx"][row]) - start))

    def _prefills(self) -> list[_Arm]:
        whole = [self.columns.number_of(phase) for phase in WHOLE_PREFILLS]
        return [arm for arm in self.arms.values() if np.isin(self.rows["phase"][arm.at[:1]], whole).all()]

    def _same(self, key: int, arms: Iterable[_Arm]) -> list[int]:
        """Return the rows of arms at one step and place."""
        found = []
        for arm in arms:
            index = int(np.searchsorted(arm.keys, key))
            if index < len(arm.keys) and arm.keys[index] == key:
                found.append(int(arm.at[index]))
        return found

    def _attention(self) -> AttentionSums:
        """Return the sums over scores and probabilities of both phases, over every record (verdict.attention_sums)."""
        rows = self.rows
        sums = {}
        for tensor in (SCORES, "attn_probs"):
            for arm in ("P", "D"):
                at = self.arms[arm].at
                sums[(tensor, arm)] = self._sums(rows.part(at[rows["tensor"][at] == self.tensors[tensor]]))
        source = self.columns.number_of("recomputed")
        scores = (rows["tensor"] == self.tensors[SCORES]) & (rows["source"] == source)
        both = np.isin(rows["arm"], [self.columns.number_of(arm) for arm in ("P", "D")])
        return AttentionSums(sums, recomputed=bool((scores & both).any()))

    def _sums(self, rows: Rows) -> Sums:
        elements = np.array([_elements(word) for word in self.columns.words], dtype=np.float64)
        finite = elements[rows["shape"]] - np.where(rows["nan_count"] == NONE, 0, rows["nan_count"])
        finite -= np.where(rows["inf_count"] == NONE, 0, rows["inf_count"])
        told = ~(np.isnan(rows["min"]) | np.isnan(rows["max"]) | np.isnan(rows["mean"])) & (finite > 0)
        rows, finite = rows.part(told), finite[told]
        if not len(rows):
            return Sums()
        total = math.fsum((rows["mean"] * finite).tolist())
        return Sums(float(rows["min"].min()), float(rows["max"].max()), total, int(finite.sum()))


def _holds_more(record: Record) -> bool:
    """Whether a record says more than its row, that has a say in a judgement."""
    payload = record.payload is not None and record.arm != CONSTANTS
    return payload or record.rows is not None or record.order is not None


def _elements(word: str) -> int:
    try:
        return math.prod(axes_of(word)) if word.startswith("[") and word != "[]" else 0
    except ValueError:  # a name that looks like a shape
        return 0
