"""Lines that stand as our own writers write them: read as any other reader reads them, or left to it."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import make_trace
from driftprobe.trace import Record, Top, encode_line
from driftprobe.trace_checks import json_object
from driftprobe.written import reader_of

READ = reader_of(Record, "record")
WHOLE = Record(
    prompt="p", phase="decode3", layer=2, tensor="k_cache", hash="0x1", arm="D", step=3, token_id=7, logical_tok_idx=9,
    pos_id=9, dtype="float32", shape=(2, 3), nz_count=6, abs_sum=1e-300, min=-1.5, max=2.0, mean=0.1, l2=1e300,
    nan_count=0, inf_count=0, sketch=(1.0, -2.5e-7), row_start=0, source="captured",
    top=Top(ids=(1,), values=(0.5,), logsumexp=1e-7), order=4, payload="payloads/p.D.safetensors#decode3.3.2.k_cache",
)  # fmt: skip


def slow(raw: bytes) -> Record:
    return msgspec.convert(json_object(raw), Record)


def test_what_we_write_is_read_here() -> None:
    for record in (WHOLE, *make_trace.toy()[0].records):
        raw = encode_line("record", record)
        assert slow(raw) == record
        assert READ(raw) == (record if record.rows is None else None)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=9), st.text())
@settings(max_examples=500, deadline=None)
def test_any_numbers_and_names_are_read_alike(values: list[float], name: str) -> None:
    raw = encode_line("record", replace(WHOLE, sketch=tuple(values), min=values[0], source=name))
    found = READ(raw)
    if found is None:
        assert set(name) & set('"\\') or not name.isprintable()
    else:
        assert found == slow(raw)


RAW = encode_line("record", WHOLE)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"step":3', b'"step":3,"step":3'),
        (b'"step":3', b'"step":3,"arm":"D"'),
        (b'"layer":2', b'"layer": 2'),
        (b'"arm":"D"', b'"\\u0061rm":"D"'),
        (b'"arm":"D"', b'"arm":"\\ud800"'),
        (b'"arm":"D"', b'"arm":"\xff"'),
        (b'"arm":"D"', b'"arm":1'),
        (b"1e300", b"1e999"),
        (b"1e300", b"NaN"),
        (b"-1.5", b"-01.5"),
        (b"[2,3]", b"[2,[3]]"),
        (b',"row_start":0', b',"rows":["0x2"],"row_start":0'),
        (b',"row_start":0', b',"rows":["0x2]","row_start":0,"source":"c"]'),
        (b"1e300", b"1" * 50),
        (b'"ids":[1]', b'"ids":[1],"ids":[1]'),
        (b'"type":"record",', b""),
        (b'"type":"record"', b'"type":"event"'),
        (b"}\n", b"}"),
        (b"}\n", b"}{}\n"),
        (b"}\n", b',"more":1}\n'),
    ],
)
def test_any_other_line_is_left_to_the_other_reader(before: bytes, after: bytes) -> None:
    assert RAW.count(before) >= 1
    assert READ(RAW.replace(before, after, 1)) is None


@given(st.data())
@settings(max_examples=2000, deadline=None)
def test_a_line_that_was_changed_is_read_as_the_other_reader_reads_it(data: st.DataObject) -> None:
    """Whatever bytes are put in, cut out or exchanged: what is understood here is what is understood there."""
    at = data.draw(st.integers(0, len(RAW)))
    put = data.draw(st.sampled_from([b"", b'"', b",", b"[", b"]", b"{", b"}", b"1", b"e", b"-", b"null", b"\\", b" ",
                                     b'"step":3,', b'"rows":[],', b"\n", b"."]))  # fmt: skip
    raw = RAW[:at] + put + RAW[at + data.draw(st.integers(0, 12)) :]
    found = READ(raw)
    if found is not None:
        assert found == slow(raw)
