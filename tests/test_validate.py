"""validate(): every problem with its line, and what evidence a valid trace lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import make_trace
from driftprobe.errors import TraceError
from driftprobe.payload import write_payloads
from driftprobe.trace import Header, Record
from driftprobe.trace_file import Problem, TraceWriter
from driftprobe.validate import validate


def rewrite(folder: Path, change: Callable[[Record], Record | None], header: Header | None = None) -> Path:
    """The healthy trace with its records changed, or left out where `change` gives None."""
    path = folder / "p0_as_designed.jsonl"
    with TraceWriter(path, header or make_trace.header()) as writer:
        for arm in make_trace.ARMS:
            for layer, tensor in make_trace.TAPS:
                record = change(make_trace.record(arm, layer, tensor))
                if record is not None:
                    writer.record(record)
    return path


def warned(folder: Path, what: str) -> Problem:
    """The one warning of this kind; the trace itself is valid."""
    report = validate(folder)
    assert report.valid, report.render()
    (found,) = [warning for warning in report.warnings if warning.what == what]
    assert all([found.measured, found.allowed, found.mend])
    return found


def test_a_healthy_trace_has_nothing_to_mend(tmp_path):
    make_trace.write(tmp_path)
    make_trace.write(tmp_path, mode="kv_aligned")
    report = validate(tmp_path)
    assert report.valid
    assert report.render() == f"{tmp_path}: 2 files, 40 records, 0 problems, 0 warnings"


def test_every_problem_of_every_file_is_listed_with_its_line(tmp_path):
    for prompt in ("p0", "p1"):
        path = make_trace.write(tmp_path, prompt)
        bodies = make_trace.rows(path)[:-1]
        bodies[2]["hash"] = ""
        bodies[6]["shape"] = [0]
        make_trace.put(path, *bodies[:10], "{", *bodies[10:])
    report = validate(tmp_path)
    assert not report.valid
    places = [(p.file, p.line, p.what) for p in report.problems]
    assert places == [
        (f"{prompt}_as_designed.jsonl", line, what)
        for prompt in ("p0", "p1")
        for line, what in ((3, "empty name"), (7, "shape disagrees with the counts"), (11, "invalid JSON"))
    ]
    text = report.render()
    assert "p0_as_designed.jsonl, line 7: problem: shape disagrees with the counts\n  measured: shape [0]" in text
    assert text.endswith("2 files, 40 records, 6 problems, 2 warnings")


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(TraceError, match="no such folder"):
        validate(tmp_path / "nowhere")


def test_an_incomplete_trace_is_a_warning(tmp_path):
    path = make_trace.write(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    assert "is cut" in warned(tmp_path, "the trace is incomplete").measured


def test_promised_taps_that_never_appear_are_named_with_their_arm(tmp_path):
    rewrite(tmp_path, lambda r: None if r.tensor == "k_cache" and r.arm in ("D", "E1") else r)
    found = warned(tmp_path, "a promised tap never appears")
    assert found.measured == "arm D: layer 0 k_cache; arm E1: layer 0 k_cache"


def test_a_promised_tap_outside_the_layers_is_missed_as_well(tmp_path):
    rewrite(tmp_path, lambda r: None if r.tensor == "logits" and r.arm == "D" else r)
    assert warned(tmp_path, "a promised tap never appears").measured == "arm D: logits"


def test_a_layer_that_never_appears_is_named(tmp_path):
    rewrite(tmp_path, lambda r: r, replace(make_trace.header(), taps={"q_proj": (0, 5)}))
    assert "arm D: layer 5 q_proj;" in warned(tmp_path, "a promised tap never appears").measured


def test_a_planned_read_without_records_is_named(tmp_path):
    rewrite(tmp_path, lambda r: None if r.arm == "E1" else r, replace(make_trace.header(), taps={}))
    found = warned(tmp_path, "a planned read has no record")
    assert found.measured == "arm E1, prefill_ext, step 0, position 3"


def test_a_read_at_another_position_is_not_the_planned_one(tmp_path):
    rewrite(tmp_path, lambda r: replace(r, logical_tok_idx=4) if r.arm == "D" else r)
    assert "arm D" in warned(tmp_path, "a planned read has no record").measured


def test_records_that_say_no_position_answer_the_plan(tmp_path):
    rewrite(tmp_path, lambda r: replace(r, logical_tok_idx=None))
    assert validate(tmp_path).warnings == ()


def test_unknown_tensor_names_are_listed(tmp_path):
    rewrite(tmp_path, lambda r: replace(r, tensor="q_porj") if r.tensor == "q_proj" else r)
    assert warned(tmp_path, "unknown tensor names").measured == "'q_porj'"


def test_a_missing_embed_is_a_warning(tmp_path):
    rewrite(tmp_path, lambda r: None if r.tensor == "embed" and r.arm != "P" else r)
    assert warned(tmp_path, "no embed").measured == "arms without it: D, P', D', E1"


def test_no_control_arms_is_a_warning(tmp_path):
    reads = tuple(read for read in make_trace.header().reads if read.arm in ("P", "D"))
    rewrite(tmp_path, lambda r: r if r.arm in ("P", "D") else None, replace(make_trace.header(), reads=reads))
    assert warned(tmp_path, "no control arms").measured == "arms P, D"


def test_no_sketch_is_a_warning(tmp_path):
    rewrite(tmp_path, lambda r: replace(r, sketch=None))
    assert "20 of 20 records" in warned(tmp_path, "no sketch").measured


def test_hashes_of_another_kind_are_a_warning(tmp_path):
    rewrite(tmp_path, lambda r: replace(r, hash="md5:77") if r.tensor == "logits" else r)
    assert warned(tmp_path, "hashes of another kind").measured == "5 records, the first 'md5:77'"


def with_payload(record: Record) -> Record:
    return replace(record, payload="payloads/x.safetensors#q") if record.tensor == "q_proj" else record


def test_payloads_are_checked_against_their_records(tmp_path):
    rewrite(tmp_path, with_payload)
    array = make_trace.values(0, "q_proj")
    write_payloads(tmp_path / "payloads" / "x.safetensors", {"q": array})
    assert validate(tmp_path).render().endswith("0 problems, 0 warnings")
    write_payloads(tmp_path / "payloads" / "x.safetensors", {"q": array + np.float32(1e-3)})
    report = validate(tmp_path)
    assert [(p.line, p.what) for p in report.problems] == [
        (line, "payload does not hash to its record") for line in (3, 7, 11, 15, 19)
    ]


def test_a_missing_payload_file_is_a_problem_of_each_record(tmp_path):
    rewrite(tmp_path, with_payload)
    report = validate(tmp_path)
    assert [p.what for p in report.problems] == ["payload file cannot be read"] * 5
    assert "payloads/x.safetensors#q" in report.problems[0].measured


def test_payloads_of_an_artifacts_folder_are_found(tmp_path):
    rewrite(tmp_path / "traces", with_payload)
    array = make_trace.values(0, "q_proj")
    write_payloads(tmp_path / "traces" / "payloads" / "x.safetensors", {"q": array})
    assert validate(tmp_path).valid


def test_a_strangers_trace_is_valid_and_told_what_it_lacks(tmp_path):
    for ending in ("trace", "decode_trace"):
        make_trace.put(tmp_path / f"p0_{ending}.jsonl", {"layer": None, "tensor": "embed", "hash": "17"})
    report = validate(tmp_path)
    assert report.valid
    assert [w.what for w in report.warnings] == ["no sketch", "a stranger's trace"]
    assert report.warnings[0].file == "p0_decode_trace.jsonl, p0_trace.jsonl"
    assert report.render().endswith("2 files, 2 records, 0 problems, 2 warnings")


def test_every_problem_of_a_strangers_trace_is_listed(tmp_path):
    good = {"layer": 0, "tensor": "q_proj", "hash": "17"}
    make_trace.put(tmp_path / "p0_trace.jsonl", good, "{", good | {"hash": 1}, good, good | {"layer": 1})
    places = [(p.line, p.what) for p in validate(tmp_path).problems]
    assert places == [(2, "invalid JSON"), (3, "record does not fit the schema"), (4, "duplicated key")]


def test_one_file_is_a_file_and_two_are_files(tmp_path):
    make_trace.put(tmp_path / "p0_trace.jsonl", "{", {"layer": 0, "tensor": "q_proj", "hash": "17"})
    assert "1 file, 1 record, 1 problem, " in validate(tmp_path).render()
