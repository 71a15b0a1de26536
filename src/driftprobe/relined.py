"""Columns as lines again: byte for byte what `trace.encode_line` makes of their records, without making the records.

A line's fields are read from the columns many rows at a time, which takes a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET

from driftprobe.columns import FLOATS, INTEGERS, NONE, WORDS, Array, Columns, axes_of
from driftprobe.trace import Record

_PLAIN = [name for name in Record.__dataclass_fields__ if name not in {"top", "order", "payload"}]
"""The fields that a row of columns can hold, in the order of a line."""
_Line = msgspec.defstruct("_Line", [(name, Any) for name in _PLAIN], tag_field="type", tag="record", gc=False)
"""A line; a field that is UNSET is left out."""
_encode = msgspec.json.Encoder().encode_lines


def joined_lines(columns: Columns, which: Sequence[int] | Array) -> bytes:
    """Return the lines of records, one behind another, each with its newline. None may be of `columns.odd`."""
    if not len(which):
        return b""
    fields = _fields(columns, np.asarray(which, dtype=np.int64))
    return _encode(list(map(_Line, *(fields[name] for name in _PLAIN))))


def split(lines: bytes) -> list[bytes]:
    """Return each of joined lines, with its newline: JSON has no line break but those between lines."""
    return lines.splitlines(keepends=True)


def _fields(columns: Columns, at: Array) -> dict[str, list[Any]]:
    """Return a list for each field, with an entry for each row `at`."""
    rows, words = columns.rows, columns.words
    found: dict[str, list[Any]] = {}
    for name in INTEGERS:
        values = rows[name][at]
        found[name] = _without(values.tolist(), values == NONE)
    for name in FLOATS:
        values = rows[name][at]
        found[name] = _without(values.tolist(), np.isnan(values))
    for name in WORDS:
        found[name] = [UNSET if number < 0 else words[number] for number in rows[name][at].tolist()]
    found["shape"] = [text if text is UNSET else axes_of(text) for text in found["shape"]]
    found["source"] = ["captured" if word is UNSET else word for word in found["source"]]
    found["layer"] = [None if layer < 0 else layer for layer in rows["layer"][at].tolist()]
    found["hash"] = _hex(rows["hash"][at])
    numbers = rows["sums"][at]
    found["sketch"] = _without(columns.sums[numbers].tolist() if len(columns.sums) else [UNSET] * len(at), numbers < 0)
    found["rows"] = _row_hashes(columns, at)
    return found


def _without(values: list[Any], missing: Array) -> list[Any]:
    """Return values with UNSET in place of those that are missing."""
    for index in np.flatnonzero(missing).tolist():
        values[index] = UNSET
    return values


def _row_hashes(columns: Columns, at: Array) -> list[Any]:
    counts, starts = columns.rows["rows"][at], columns.rows["rows_at"][at]
    found: list[Any] = [UNSET] * len(at)
    for index in np.flatnonzero(counts >= 0).tolist():
        start = int(starts[index])
        found[index] = _hex(columns.hashes[start : start + int(counts[index])])
    return found


def _hex(hashes: Array) -> list[str]:
    digits = hashes.astype(">u8").tobytes().hex()
    return ["0x" + digits[start : start + 16] for start in range(0, len(digits), 16)]
