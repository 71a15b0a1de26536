"""Lines made of columns are, byte for byte, those that the writer makes of their records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftprobe.columns import FLOATS, INTEGERS, NONE, ROW, WORDS, Columns, Rows
from driftprobe.relined import joined_lines, split
from driftprobe.scan import BUILT, read_columns
from driftprobe.trace import Header, encode_line
from make_trace import write

SKETCHES, HASHES = 3, 6
NAMES = ["q_proj", "[]", "[1]", "[1,32,128]", 'é\u2028\u0085 \\"\n', "P'", "captured"]
integers = st.integers(-(2**63) + 1, 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def columns_of_anything(draw: st.DrawFn) -> Columns:
    """Rows that leave out any field, of any numbers."""
    count = draw(st.integers(1, 5))
    rows = np.zeros(count, ROW)
    for row in rows:
        for name in INTEGERS:
            row[name] = NONE if name not in ("step", "row_start") and draw(st.booleans()) else draw(integers)
        for name in FLOATS:
            row[name] = np.nan if draw(st.booleans()) else draw(floats)
        row["hash"], row["layer"] = draw(st.integers(0, 2**64 - 1)), draw(st.integers(-1, 9))
        for name in WORDS:
            row[name] = draw(st.integers(-1 if name in ("dtype", "source") else 0, len(NAMES) - 1))
        row["shape"] = draw(st.integers(-1, 3)) if row["shape"] else -1
        row["shape"] = -1 if row["shape"] == 0 else row["shape"]
        row["sums"], row["rows"] = draw(st.integers(-1, SKETCHES - 1)), draw(st.integers(-1, 2))
        row["rows_at"], row["taken"] = draw(st.integers(0, HASHES - 2)), 1
    sums = np.array([[draw(floats) for _ in range(2)] for _ in range(SKETCHES)])
    hashes = np.array([draw(st.integers(0, 2**64 - 1)) for _ in range(HASHES)], dtype=np.uint64)
    return Columns(Header(prompt="p"), Rows.of_structured(rows), sums, hashes, NAMES, (), "x.jsonl")


@settings(max_examples=100, deadline=None)
@given(columns_of_anything())
def test_any_rows_give_the_lines_of_their_records(columns: Columns) -> None:
    which = list(range(len(columns.rows)))[::-1]
    expected = [encode_line("record", record) for record in columns.records(which)]
    assert split(joined_lines(columns, which)) == expected


def test_no_rows_give_no_lines() -> None:
    none = Columns(Header(prompt="p"), Rows.of_structured(np.zeros(0, ROW)), np.zeros((0, 2)),
                   np.zeros(0, np.uint64), [], (), "x.jsonl")  # fmt: skip
    assert joined_lines(none, []) == b""
    assert split(b"") == []


@pytest.mark.skipif(not BUILT, reason="driftprobe._scan is not built here: it needs a C compiler")
def test_a_trace_gives_its_own_lines(tmp_path: Path) -> None:
    path = write(tmp_path)
    columns = read_columns(path)
    assert columns is not None
    which = [index for index in range(len(columns.rows)) if index not in columns.odd]
    lines = set(path.read_bytes().splitlines(keepends=True))
    assert len(which) == 20
    assert set(split(joined_lines(columns, which))) <= lines
