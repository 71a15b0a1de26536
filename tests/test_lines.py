"""Lines that the core writes: byte for byte those that the record itself is written as."""

from __future__ import annotations

import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftprobe import lines
from driftprobe.engines.base import Tapped
from driftprobe.fingerprint import DTYPES, Array, fields_and_rows
from driftprobe.lines import Extra, LineMaker
from driftprobe.plan import Phase, Read
from driftprobe.taps import CACHE_TAPS
from driftprobe.trace import CONSTANTS, Record, Top
from driftprobe.trace_file import line_of

pytestmark = pytest.mark.skipif(not lines.BUILT, reason="the core is not built here, or has no integers of 128 bits")
READ = Read("D", Phase.DECODE, 3, 2)
TOKENS = (5, 6, 7)


def slow(item: Tapped, extra: Extra, size: int) -> bytes:
    found, rows = fields_and_rows(item.array, size, rows=item.tensor in CACHE_TAPS)
    read = item.read
    record = Record(
        prompt='p"é', phase=read.phase_name, layer=item.layer, tensor=item.tensor, arm=read.arm, step=read.step,
        token_id=TOKENS[read.position], logical_tok_idx=read.position, pos_id=item.pos_id, **found, rows=rows,
        row_start=item.row_start, source=item.source, top=extra.top, payload=extra.payload,
    )  # fmt: skip
    return line_of(record, size).raw


def fast(item: Tapped, extra: Extra, size: int) -> bytes:
    maker = LineMaker('p"é', TOKENS, size)
    assert maker.takes(item)
    return maker.lines([item], [extra])()[0].raw


def tapped(array: Array, tensor: str = "x_out", layer: int | None = 4) -> Tapped:
    return Tapped(READ, layer, tensor, array, 9, 3, "captured")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tensor", ["x_out", "k_cache"])
def test_a_line_is_the_records_own(dtype: str, tensor: str) -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 7), (5, 3, 4), (1, 0), (0, 3)):
        array = (rng.normal(size=shape) * 3).astype(DTYPES[dtype])
        for each in (array, array.T if tensor == "x_out" else array[::-1], np.asfortranarray(array)):
            item = tapped(each, tensor)
            for extra in (lines.NOTHING, Extra(Top(ids=(1,), values=(0.5,), logsumexp=1e-7), "f#n")):
                assert fast(item, extra, 8) == slow(item, extra, 8)


@given(st.lists(st.floats(width=64), min_size=1, max_size=8), st.sampled_from([1, 3, 64]))
@settings(max_examples=300, deadline=None)
def test_any_numbers_are_written_as_the_record_writes_them(values: list[float], size: int) -> None:
    item = tapped(np.array([values]))
    assert fast(item, lines.NOTHING, size) == slow(item, lines.NOTHING, size)


@given(st.integers(0, 2**64 - 1))
@settings(max_examples=3000, deadline=None)
def test_the_shortest_text_of_a_double_is_msgspecs(bits: int) -> None:
    value = struct.unpack("<d", struct.pack("<Q", bits))[0]
    if np.isfinite(value):
        raw = fast(tapped(np.array([[value]])), lines.NOTHING, 1)
        assert b'"sketch":[%s]' % msgspec.json.encode(_sketched(raw)) in raw
        assert _sketched(raw) in (value, -value)


def _sketched(raw: bytes) -> float:
    return float(msgspec.json.decode(raw)["sketch"][0])


def test_what_has_something_wrong_with_it_is_left_to_those_who_say_what() -> None:
    maker = LineMaker("p", TOKENS, 8)
    array = np.ones((1, 3))
    assert maker.takes(tapped(array))
    assert not maker.takes(tapped(array, "logits"))  # of a layer
    assert not maker.takes(tapped(array)._replace(row_start=-1))
    assert not maker.takes(tapped(array)._replace(read=replace(READ, arm="")))
    assert not maker.takes(tapped(array)._replace(read=replace(READ, arm=CONSTANTS)))  # those have a phase of their own
    assert not maker.takes(tapped(array, layer=-1))


def test_a_dtype_that_the_format_lacks_is_refused_as_ever() -> None:
    maker, item = LineMaker("p", TOKENS, 8), tapped(np.ones((1, 3), dtype=np.complex128))
    assert maker.takes(item)
    with pytest.raises(KeyError):
        maker.lines([item], [lines.NOTHING])()


def test_many_steps_do_not_fill_memory_with_text() -> None:
    maker, array = LineMaker("p", tuple(range(1000)), 8), np.ones((1, 3))
    for step in range(500):
        item = Tapped(Read("D", Phase.DECODE, step, step), 0, "x_out", array, step)
        assert maker.takes(item)
        maker.lines([item], [lines.NOTHING])()
    assert len(maker._heads) <= 65


def test_a_trace_is_the_same_with_and_without_the_cores_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    import models
    from driftprobe.engines.hf import HFEngine
    from test_capture_cost import captured, everything

    subject = HFEngine(models.build("llama"))
    captured(subject, tmp_path / "fast")
    monkeypatch.setattr(lines, "BUILT", False)
    captured(subject, tmp_path / "slow")
    assert everything(tmp_path / "fast") == everything(tmp_path / "slow")


def test_two_threads_may_ask_for_lines_of_two_reads() -> None:
    """The model's thread prepares what is begun ahead, the writer's the rest."""
    maker, items = LineMaker("p", tuple(range(1000)), 8), [tapped(np.ones((1, 3)) * n) for n in range(2)]
    reads = [Read("D", Phase.DECODE, 3, 2), Read("P", Phase.PREFILL_LAST, 3, 7)]
    items = [item._replace(read=read) for item, read in zip(items, reads, strict=True)]
    alone = [maker.lines([item], [lines.NOTHING])()[0] for item in items]

    def ask(which: int) -> set[tuple[bytes, object]]:
        made = (maker.lines([items[which]] * 60, [lines.NOTHING] * 60)() for _ in range(300))
        return {(line.raw, line.key) for several in made for line in several}

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(ask, range(2)))
    finally:
        sys.setswitchinterval(before)
    assert found == [{(line.raw, line.key)} for line in alone]
