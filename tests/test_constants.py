"""Constants of the model: arm W in the trace, and that nothing but a diagnosis sees them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import make_trace
from driftprobe import constants as module
from driftprobe.constants import add_constants, constant_record
from driftprobe.engines.base import Constant
from driftprobe.errors import TraceError
from driftprobe.judgement import Verdict
from driftprobe.payload import Payloads, write_payloads
from driftprobe.prune import prune_payloads
from driftprobe.trace import Record, Trace
from driftprobe.trace_file import TraceWriter, read_trace
from driftprobe.validate import validate
from driftprobe.verdict import judge_trace
from make_trace import Change, drifting, toy, unchanged

TAPS = ("x_in", "q_proj", "x_out")
EPS = Constant(0, "attn_norm.eps", np.array([1e-6]))
MATRIX = Constant(1, "q_proj.weight", np.arange(12, dtype=np.float32).reshape(3, 4))


def written(folder: Path, change: Change = unchanged) -> Trace:
    """A trace on disk with one constant in it."""
    trace, _ = toy(change, taps=TAPS)
    record = constant_record(EPS, trace.header, trace.path.removesuffix(".jsonl"))
    assert record.payload is not None
    file, _, name = record.payload.partition("#")
    write_payloads(folder / file, {name: EPS.array})
    with TraceWriter(folder / trace.path, trace.header) as writer:
        for line in (*trace.records, record):
            writer.record(line)
    return read_trace(folder / trace.path)


def constants(trace: Trace) -> dict[str, Record]:
    return {record.tensor: record for record in trace.records if record.arm == "W"}


@pytest.mark.parametrize("change", [unchanged, drifting(0.1)])
def test_no_gate_and_no_warning_counts_a_constant(tmp_path: Path, change: Change) -> None:
    bare, trace = toy(change, taps=TAPS)[0], written(tmp_path, change)
    assert judge_trace(trace, Payloads(tmp_path)).gates == judge_trace(bare, Payloads(tmp_path)).gates
    assert not judge_trace(trace, Payloads(tmp_path)).unpaired
    report = validate(tmp_path)
    assert report.valid, report.render()
    assert "attn_norm.eps" not in report.render() and "arm W" not in report.render()


@pytest.mark.parametrize(
    "wrong", [{"arm": "D"}, {"phase": "decode0"}, {"step": 1}, {"logical_tok_idx": 3}, {"tensor": "q_proj"}]
)
def test_a_constant_that_is_none_is_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    record = replace(constant_record(EPS, make_trace.header(), "t"), **wrong)
    allowed = pytest.raises(TraceError, match="a constant that is none")
    with TraceWriter(tmp_path / "t.jsonl", make_trace.header()) as writer, allowed:
        writer.record(record)


def test_matrices_are_added_beside_the_constants_that_are_there(tmp_path: Path) -> None:
    trace = written(tmp_path)
    assert add_constants(trace, [EPS, MATRIX], tmp_path) == (1, [])
    again = read_trace(tmp_path / trace.path)
    found = constants(again)
    payloads = Payloads(tmp_path)
    assert set(found) == {"attn_norm.eps", "q_proj.weight"}
    for constant in (EPS, MATRIX):
        np.testing.assert_array_equal(payloads.get(found[constant.name]), constant.array)
    assert len(again.records) == len(trace.records) + 1
    assert not again.damage and validate(tmp_path).valid


def test_a_matrix_beyond_the_budget_is_left_out_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUDGET", 50)
    _, (line,) = add_constants(written(tmp_path), [MATRIX, replace(MATRIX, name="k_proj.weight")], tmp_path)
    assert "k_proj.weight of layer 1" in line and "48 bytes" in line
    assert set(constants(read_trace(tmp_path / "p0_as_designed.jsonl"))) == {"attn_norm.eps", "q_proj.weight"}


def test_an_incomplete_trace_is_given_no_constants(tmp_path: Path) -> None:
    trace = replace(written(tmp_path), damage="cut")
    before = (tmp_path / trace.path).read_bytes()
    assert add_constants(trace, [MATRIX], tmp_path) == (0, [])
    assert (tmp_path / trace.path).read_bytes() == before


@pytest.mark.parametrize(("change", "kept"), [(unchanged, False), (drifting(0.1), True)])
def test_pruning_keeps_constants_where_something_failed(tmp_path: Path, change: Change, kept: bool) -> None:
    trace = written(tmp_path, change)
    judged = judge_trace(trace, Payloads(tmp_path))
    assert (judged.verdict is Verdict.MISMATCH) is kept
    prune_payloads(trace, judged, tmp_path)
    record = constants(read_trace(tmp_path / trace.path))["attn_norm.eps"]
    assert (Payloads(tmp_path).get(record) is not None) is kept
