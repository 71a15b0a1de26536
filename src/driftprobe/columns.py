"""The records of one trace as columns: a row for each, in NumPy, a thousandth of the work of an object for each.

A row is what `trace.Record` holds; names stand once in `words`. Pure data: scan.py reads it from JSON Lines, packed.py
from Parquet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from driftprobe.trace import CONSTANTS, Event, Header, Record, Trace
from driftprobe.trace_checks import CONSTANT_PHASE, record_faults

NONE = int(np.iinfo(np.int64).min)
"""An integer that a record leaves out; a float is NaN then, a word, a sketch or rows are -1."""
INTEGERS = ("step", "token_id", "logical_tok_idx", "pos_id", "nz_count", "nan_count", "inf_count", "row_start")
FLOATS = ("abs_sum", "min", "max", "mean", "l2")
WORDS = ("phase", "arm", "tensor", "dtype", "shape", "source", "prompt")
FIELDS = tuple(field.name for field in fields(Record) if field.name not in {"top", "order", "payload"})
"""What a row has a place for, in the order of a line."""
KEY = ("arm", "phase", "step", "layer", "tensor", "logical_tok_idx")
"""What makes a record unique in its file (trace.Record.key)."""
ROW = np.dtype(
    [("at", "<i8"), *((name, "<i8") for name in INTEGERS), ("rows_at", "<i8"), ("hash", "<u8"),
     *((name, "<f8") for name in FLOATS),
     *((name, "<i4") for name in ("length", "layer", *WORDS, "sums", "rows", "taken"))]
)  # fmt: skip
"""One record: the layout of `row` in _scan.c."""
Array = npt.NDArray[Any]
MAX_STEPS = 1 << 20


Done = Callable[[Array], None]
"""Takes rows that nobody reads any more."""


class Rows:
    """Rows of ROW as columns that each lie in one piece: a column is made when it is first asked for."""

    def __init__(
        self, length: int, load: Callable[[str], Array], structured: Array | None = None, done: Done | None = None
    ) -> None:
        self._length, self._load, self._structured, self._done = length, load, structured, done
        self._columns: dict[str, Array] = {}

    @classmethod
    def of_structured(cls, rows: Array, done: Done | None = None) -> Rows:
        """Return the rows that the scanner wrote; `done` is told each part of them that is not needed any more."""
        return cls(len(rows), lambda _name: np.zeros(0), rows, done)

    @classmethod
    def of_columns(cls, columns: dict[str, Array]) -> Rows:
        """Return rows from their columns, which are not copied."""
        found = cls(len(columns["hash"]), columns.__getitem__)
        found._columns = columns
        return found

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, name: str) -> Array:
        """Return a column."""
        if self._structured is not None:
            self._columns, self._structured = _turned(self._structured, self._done), None
        found = self._columns.get(name)
        if found is None:
            found = self._columns[name] = self._load(name)
        return found

    def part(self, which: slice | Array) -> Rows:
        """Return some of the rows: a slice, or those of indices or of a mask."""
        if isinstance(which, slice):
            count = len(range(*which.indices(self._length)))
        else:
            count = int(which.sum()) if which.dtype == np.bool_ else len(which)
        return Rows(count, lambda name: np.ascontiguousarray(self[name][which]))

    def put(self, index: int, row: Any) -> None:
        """Write one row; where the scanner wrote the rows, before any column is asked for."""
        if self._structured is not None:
            self._structured[index] = row
            return
        for name in ROW.names or ():
            column = self._columns[name] = np.require(self[name], requirements="W")
            column[index] = row[name]

    def with_another(self, **values: int) -> Rows:
        """Return these rows and one of zeros but for these values, behind them."""
        more = np.zeros((), ROW)
        for name, value in values.items():
            more[name] = value
        return Rows.of_columns({name: np.append(self[name], more[name]) for name in ROW.names or ()})


BLOCK = 2048
"""Rows that are turned into columns at a time: so many stay in the cache, and memory is read once."""


def _turned(rows: Array, done: Done | None) -> dict[str, Array]:
    """Return the columns of rows, which are given back as they are turned: both at once would be twice the memory."""
    found = _room_for_columns(len(rows))
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        for name, column in found.items():
            column[start : start + BLOCK] = block[name]
        if done is not None:
            done(block)
    return found


def _room_for_columns(count: int) -> dict[str, Array]:
    """Return columns in one piece of memory: a large one goes back to the system, small ones are kept for reuse."""
    sizes = {name: -(-count * ROW[name].itemsize // 64) * 64 for name in ROW.names or ()}
    memory = np.empty(sum(sizes.values()), np.uint8)
    ends = np.cumsum(list(sizes.values())).tolist()
    return {name: memory[end - size : end].view(ROW[name])[:count]
            for (name, size), end in zip(sizes.items(), ends, strict=True)}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """One whole trace, every line of it checked."""

    header: Header
    rows: Rows
    """A row of ROW for each record, in the order of the file; sorted by key where it was packed."""
    sums: npt.NDArray[np.float64]
    """Sketches `[sketches, sums]`."""
    hashes: npt.NDArray[np.uint64]
    """Row hashes of all caches, one after another."""
    words: list[str]
    events: tuple[Event, ...]
    name: str
    """Name of the file, without its folder."""
    odd: dict[int, Record] = field(default_factory=dict)
    """Row -> the record itself, where it holds more than a row can."""

    def trace(self) -> Trace | None:
        """Return the trace that a reader of lines makes of a file of lines; None where two records have one key."""
        rows, count = self.rows, len(self.rows)
        keys = zip(*(rows[name].tolist() for name in KEY), strict=True)
        if len(set(keys)) != count:
            return None
        return Trace(self.header, tuple(self.records(range(count))), self.events, self.name)

    def record(self, index: int) -> Record:
        """Return one record as the object that a reader of lines makes."""
        return self.records([index])[0]

    def records(self, which: Sequence[int]) -> list[Record]:
        """Return several records; a tenth of the time that it takes one by one."""
        found: list[Record] = []
        for start in range(0, len(which), BLOCK):
            block = which[start : start + BLOCK]
            made = _records(self.fields(block, None), len(block))
            found += [self.odd.get(index, record) for index, record in zip(block, made, strict=True)]
        return found

    def fields(self, which: Sequence[int] | Array, missing: Any) -> dict[str, list[Any]]:
        """Return the fields of records that a row has a place for, in the order of a line: an entry for each of them.

        `missing` stands where a record leaves a field out. Sketches and row hashes are lists. What `odd` holds is not
        among them.
        """
        at = np.asarray(which, dtype=np.int64)
        found = {name: self._integers(name, at, missing) for name in INTEGERS}
        found |= {name: self._floats(name, at, missing) for name in FLOATS}
        found |= {name: self._words(name, at, missing) for name in WORDS}
        found["shape"] = [text if text is missing else axes_of(text) for text in found["shape"]]
        found["source"] = ["captured" if word is missing else word for word in found["source"]]
        found["layer"] = [None if layer < 0 else layer for layer in self.rows["layer"][at].tolist()]
        found["hash"] = in_hex(self.rows["hash"][at])
        found["sketch"] = self._sketches(self.rows["sums"][at], missing)
        found["rows"] = self._hashes_of_rows(at, missing)
        return {name: found[name] for name in FIELDS}

    def _integers(self, name: str, at: Array, missing: Any) -> list[Any]:
        values = self.rows[name][at]
        return _with(missing, values.tolist(), values == NONE)

    def _floats(self, name: str, at: Array, missing: Any) -> list[Any]:
        values = self.rows[name][at]
        return _with(missing, values.tolist(), np.isnan(values))

    def _words(self, name: str, at: Array, missing: Any) -> list[Any]:
        return [missing if number < 0 else self.words[number] for number in self.rows[name][at].tolist()]

    def _sketches(self, numbers: Array, missing: Any) -> list[Any]:
        if (numbers >= 0).all():
            return list(self.sums[numbers].tolist())
        found = [missing] * len(numbers)
        here = np.flatnonzero(numbers >= 0)
        for index, sketch in zip(here.tolist(), self.sums[numbers[here]].tolist(), strict=True):
            found[index] = sketch
        return found

    def _hashes_of_rows(self, at: Array, missing: Any) -> list[Any]:
        found = [missing] * len(at)
        for index in np.flatnonzero(self.rows["rows"][at] >= 0).tolist():
            found[index] = in_hex(self.row_hashes(int(at[index])))
        return found

    def row_hashes(self, index: int) -> npt.NDArray[np.uint64]:
        """Return the row hashes of one cache record."""
        start, count = int(self.rows["rows_at"][index]), int(self.rows["rows"][index])
        return self.hashes[start : start + max(count, 0)]

    def number_of(self, word: str) -> int:
        """Return the number of a word, or -2 where no record has it."""
        return self.words.index(word) if word in self.words else -2


def _records(fields: dict[str, list[Any]], count: int) -> list[Record]:
    """Return records of these fields, put in field by field for all at once and past `__init__`, which is slower."""
    for name in ("sketch", "rows"):
        fields[name] = [None if value is None else tuple(value) for value in fields[name]]
    made = list(map(object.__new__, repeat(Record, count)))
    for name in Record.__slots__:
        deque(map(getattr(Record, name).__set__, made, fields.get(name, repeat(None))), maxlen=0)
    return made


def _with(missing: Any, values: list[Any], where: Array) -> list[Any]:
    """Return values with `missing` in some places."""
    for index in np.flatnonzero(where).tolist():
        values[index] = missing
    return values


def in_hex(hashes: Array) -> list[str]:
    """Return hashes as records carry them."""
    digits = hashes.astype(">u8").tobytes().hex()
    return ["0x" + digits[start : start + 16] for start in range(0, len(digits), 16)]


@lru_cache(maxsize=4096)
def axes_of(text: str) -> tuple[int, ...]:
    """Return the shape that stands in a record as `[1,32,128]`."""
    return tuple(int(axis) for axis in text.strip("[]").split(",") if axis.strip())


def breaks_a_must(columns: Columns) -> bool:
    """Whether some record breaks a MUST that a line shows by itself, or its key may be another's.

    The rules are those of `record_faults`. Each is a comparison, so that the records that stand furthest out on one of
    its sides answer for all: they are looked at one by one, with one of every combination of names.
    """
    rows = columns.rows
    if not len(rows):
        return True
    prompts = np.unique(rows["prompt"])
    if [columns.words[i] for i in prompts] != [columns.header.prompt]:
        return True
    if rows["step"].min() < 0 or rows["step"].max() >= MAX_STEPS:
        return True
    size = columns.header.sketch_size
    suspects = {*_extremes(columns), *_of_each_name(columns), *columns.odd}
    arm, phase = columns.number_of(CONSTANTS), columns.number_of(CONSTANT_PHASE)
    constants = np.flatnonzero((rows["arm"] == arm) | (rows["phase"] == phase))
    suspects.update(constants.tolist())
    return any(record_faults(record, size) for record in columns.records(sorted(suspects)))


def _extremes(columns: Columns) -> list[int]:
    rows, found = columns.rows, []
    for name in ("step", "logical_tok_idx", "nz_count", "nan_count", "inf_count", "row_start"):
        found.append(int(known(rows[name]).argmin()))
    for name in ("abs_sum", "l2"):
        found.append(int(np.nan_to_num(rows[name]).argmin()))
    found.append(int(np.nan_to_num(rows["min"] - rows["max"], nan=-1.0).argmax()))
    shapes = rows["shape"]
    counted = known(rows["nz_count"]) + known(rows["nan_count"]) + known(rows["inf_count"])
    over, first = np.full(len(rows), -1, dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    for shape in np.unique(shapes[shapes >= 0]).tolist():
        axes, here = axes_of(columns.words[shape]), shapes == shape
        elements = 1
        for axis in axes:
            elements = min(elements * axis, 1 << 62)
        over[here] = counted[here] - elements
        first[here] = min(axes[0], 1 << 62) if axes else -1
    found.append(int(over.argmax()))
    wrong = (rows["rows"] >= 0) & ((shapes < 0) | (rows["rows"] != first)) & (shapes >= 0)
    return [*found, int(wrong.argmax())]


def _of_each_name(columns: Columns) -> list[int]:
    """Return one row of every combination of names that a rule looks at together."""
    rows, count = columns.rows, len(columns.words)
    tensors = (rows["tensor"].astype(np.int64) * 2 + (rows["layer"] >= 0)) * 2 + (rows["rows"] >= 0)
    found = first_of(tensors, 4 * count)
    found += first_of(rows["dtype"].astype(np.int64) + 1, count + 1)
    found += first_of(rows["arm"].astype(np.int64), count)
    changes = np.flatnonzero(np.diff(rows["step"]) | np.diff(rows["phase"])) + 1
    phases = np.unique(rows["phase"][[0, *changes]].astype(np.int64) * MAX_STEPS + rows["step"][[0, *changes]])
    for both in phases.tolist():  # a phase and its step: one row of each
        phase, step = divmod(both, MAX_STEPS)
        at = changes[(rows["phase"][changes] == phase) & (rows["step"][changes] == step)][:1].tolist()
        found += at or [0]
    return found


def known(values: Array) -> Array:
    """Return integers, with 0 for those that were left out."""
    values = np.ascontiguousarray(values)
    return np.where(values == NONE, 0, values) if values.min(initial=0) == NONE else values


def first_of(keys: Array, count: int) -> list[int]:
    """Return the index of the first element of each key, of keys below `count`."""
    first = np.full(count, -1, dtype=np.int64)
    first[keys[::-1]] = np.arange(len(keys) - 1, -1, -1)
    return [int(at) for at in first[first >= 0]]
