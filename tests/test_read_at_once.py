"""A trace that is read at once is the one that its lines give one by one, and anything amiss is left to them."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from driftprobe.load import load_traces, read_at_once
from driftprobe.pack import pack_folder
from driftprobe.scan import BUILT, _Pages
from driftprobe.trace import Record, Top
from driftprobe.trace_file import TraceWriter, read_trace, scan
from make_trace import both, drifting, put, rows, toy, write
from test_quick import SPOILED, jittered, written

Spoil = Callable[[bytes], bytes]
pytestmark = pytest.mark.skipif(not BUILT, reason="driftprobe._scan is not built here: it needs a C compiler")


@pytest.mark.parametrize("name", SPOILED)
def test_it_is_the_trace_that_its_lines_give(name: str, tmp_path: Path) -> None:
    trace, _ = toy(both(jittered(1e-6, ("D",), 0.3), drifting(1e-2, start=(1, "q_rope"))), steps=2, mode="kv_aligned")
    (path,) = written(tmp_path, trace, spoil=SPOILED[name]).iterdir()
    at_once, by_lines = read_at_once(path), read_trace(path)
    assert at_once == by_lines
    assert at_once is not None
    assert list(map(hash, at_once.records)) == list(map(hash, by_lines.records))
    assert [repr(record) for record in at_once.records] == [repr(record) for record in by_lines.records]  # −0.0 too


def more(record: Record) -> Record:
    """A record with what a row has no place for."""
    if record.tensor == "x_out":
        return replace(record, top=Top(ids=(3, 1), values=(2.0, -1.0), logsumexp=2.5))
    return replace(record, payload=f"payloads/x.safetensors#{record.tensor}") if record.rows else record


def test_tops_and_the_payloads_of_caches_are_there(tmp_path: Path) -> None:
    trace, _ = toy(steps=2)
    (path,) = written(tmp_path, trace, spoil=more).iterdir()
    at_once = read_at_once(path)
    assert at_once is not None and at_once == read_trace(path)
    assert any(record.top is not None for record in at_once.records)
    assert any(record.payload is not None and record.rows for record in at_once.records)


def test_a_key_that_is_there_twice_is_left_to_the_lines(tmp_path: Path) -> None:
    trace, _ = toy(steps=1)
    twice = [*trace.records, replace(trace.records[5], hash="0x" + "0" * 16)]
    path = tmp_path / trace.path
    with TraceWriter(path, trace.header) as writer:
        for record in twice:
            writer._checks._keys.clear()  # a writer that does not look
            writer.record(record)
    assert read_at_once(path) is None
    with pytest.raises(Exception, match="duplicated key"):
        load_traces(tmp_path)


def closed(path: Path, lines: list[bytes]) -> Path:
    """Write a trace whose footer fits its lines, whatever they are."""
    body = b"".join(lines)
    counts = {
        f"{kind}s": sum(f'"type":"{kind}"'.encode() in line[:40] for line in lines) for kind in ("record", "event")
    }
    footer = {"type": "footer", **counts, "sha256": hashlib.sha256(body).hexdigest()}
    path.write_bytes(body + json.dumps(footer, separators=(",", ":")).encode() + b"\n")
    return path


SHAPE = re.compile(rb'"shape":[^]]*],')
CONSTANT = (b'{"type":"record","prompt":"p0","phase":"constant","layer":0,"tensor":"%s",'
            b'"hash":"0x1111111111111111","arm":"%s"}\n')  # fmt: skip


def guess(word: bytes) -> Spoil:
    """A shape that is read behind a word that looks like one: `source` stands before it."""
    return lambda line: SHAPE.sub(
        b'"source":"' + word + b'","shape":' + word + b",", line.replace(b',"source":"captured"', b"")
    )


HOSTILE: dict[str, tuple[Spoil, tuple[bytes, ...]]] = {
    **{f"a word for a shape: {word.decode()}": (guess(word), ())
       for word in (b"[ 4 ", b"[9", b"[01]", b"[1_0]", b"[1.5]", b"[6,x]", b"[")},
    "an axis beyond 64 bits": (lambda line: SHAPE.sub(b'"shape":[9999999999999999999],', line), ()),
    "an axis of 18 digits": (lambda line: SHAPE.sub(b'"shape":[999999999999999999],', line), ()),
    "a negative axis": (lambda line: SHAPE.sub(b'"shape":[-4],', line), ()),
    "constants": (lambda line: line, (CONSTANT % (b"q_proj.weight", b"W"),)),
    "a constant of another arm behind one that is one": (
        lambda line: line, (CONSTANT % (b"q_proj.weight", b"W"), CONSTANT % (b"q_proj.weight", b"P"))),
}  # fmt: skip


READ_AT_ONCE = {"constants", "an axis of 18 digits", "an axis beyond 64 bits"}
"""What breaks no MUST."""


@pytest.mark.parametrize("which", HOSTILE)
def test_what_is_hostile_is_read_as_its_lines_are_or_left_to_them(which: str, tmp_path: Path) -> None:
    spoil, more = HOSTILE[which]
    lines = write(tmp_path).read_bytes().splitlines(keepends=True)[:-1]
    at = next(i for i, line in enumerate(lines) if b'"shape"' in line)
    spoiled = spoil(lines[at])
    assert spoiled != lines[at] or more
    path = closed(next(tmp_path.iterdir()), [*lines[:at], spoiled, *lines[at + 1 :], *more])
    at_once, by_lines = read_at_once(path), scan(path)
    if at_once is not None:
        assert not by_lines.problems
        assert repr(at_once) == repr(by_lines.trace(path.name))
    assert (at_once is None) == (which not in READ_AT_ONCE)


@pytest.mark.parametrize("amiss", ["no end", "a changed line", "a stranger's"])
def test_anything_amiss_is_left_to_the_lines(amiss: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    lines = rows(path)
    if amiss == "no end":
        put(path, *lines[:-1])
    elif amiss == "a changed line":
        lines[3]["nz_count"] = 1
        put(path, *lines)
    else:
        path.write_text(json.dumps({"prompt": "p", "phase": "decode", "layer": 0, "tensor": "q_proj", "hash": "0x1"}))
    assert read_at_once(path) is None


def test_a_packed_trace_is_held_to_its_digest_line_by_line(tmp_path: Path) -> None:
    pytest.importorskip("polars")
    path = write(tmp_path)
    before = load_traces(tmp_path)
    pack_folder(tmp_path)
    assert read_at_once(path.with_suffix(".parquet")) is None
    assert load_traces(tmp_path) == before


def test_memory_of_rows_is_given_back_in_whole_pages_and_no_others() -> None:
    pages = _Pages(1000)
    rows = pages.rows
    rows["step"] = np.arange(1, 1001)
    part = rows[301:700]
    pages.give_back(part)
    kept = rows["step"] == np.arange(1, 1001)
    assert kept[:301].all() and kept[700:].all()
    gone = int((~kept).sum())
    assert gone == 0 if pages._memory is None else gone * rows.itemsize >= part.nbytes - 2 * mmap.PAGESIZE - 512
