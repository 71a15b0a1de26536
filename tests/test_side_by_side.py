"""driftprobe compare: two runs on the same tokens, prefill with prefill and decode with decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from driftprobe.api import analyze, compare
from driftprobe.cli import group
from driftprobe.errors import UsageError
from driftprobe.judgement import Verdict
from driftprobe.payload import payload_file, write_payloads
from driftprobe.trace import Trace, TraceWriter
from make_trace import Change, drifting, toy, unchanged


def put(folder: Path, change: Change = unchanged, *, payload: bool = False, edit=lambda trace: trace, **more) -> Path:
    """Write one side's run into a folder."""
    from dataclasses import replace

    trace, arrays = toy(change, **more)
    trace = edit(trace)
    kept = {}
    with TraceWriter(folder / "traces" / trace.path, trace.header) as writer:
        for record in trace.records:
            if payload and record.arm in ("P", "D"):
                name = ".".join(map(str, record.key))
                kept.setdefault(record.arm, {})[name] = arrays.get(record)
                stem = trace.path.removesuffix(".jsonl")
                record = replace(record, payload=f"{payload_file(stem, record.arm)}#{name}")  # noqa: PLW2901
            writer.record(record)
        for event in trace.events:
            writer.event(event)
    for arm, arrays_ in kept.items():
        write_payloads(folder / "traces" / payload_file(trace.path.removesuffix(".jsonl"), arm), arrays_)
    return folder


def compared(tmp_path: Path, left: Path, right: Path):
    return compare(left, right, tmp_path / "out", date="d")


def rounded(site, array):
    """Another engine's rounding: every element off by half a unit of float32, in a way of its own."""
    noise = np.random.default_rng(7 + len(site.tensor) + (site.layer or 0)).choice([-1, 1], array.shape)
    return (array * (1 + noise * np.float32(2**-24))).astype(array.dtype) if site.tensor != "embed" else array


def test_the_same_run_twice_is_no_drift(tmp_path):
    result, left_out = compared(tmp_path, put(tmp_path / "a"), put(tmp_path / "b"))
    assert result.verdict is Verdict.NO_DRIFT
    assert left_out == []
    assert [t.header.prompt for t in result.traces] == ["p0.decode", "p0.prefill"]


def test_another_engines_rounding_is_structural(tmp_path):
    result, _ = compared(tmp_path, put(tmp_path / "a"), put(tmp_path / "b", rounded))
    assert result.verdict is Verdict.STRUCTURAL_DRIFT


@pytest.mark.parametrize("payload", [False, True])
def test_a_fault_in_one_engines_decode_is_found_there_and_prefill_passes(tmp_path, payload):
    right = put(tmp_path / "b", drifting(0.1, start=(1, "q_rope")), payload=payload)
    result, _ = compared(tmp_path, put(tmp_path / "a", payload=payload), right)
    assert result.verdict is Verdict.MISMATCH
    first = result.first_failure
    assert first is not None
    assert (first.prompt, first.layer, first.tensor) == ("p0.decode", 1, "q_rope")
    verdicts = {judged.prompt: judged.verdict for mode in result.judgement.modes.values() for judged in mode.prompts}
    assert verdicts == {"p0.decode": Verdict.MISMATCH, "p0.prefill": Verdict.NO_DRIFT}


def test_a_fault_in_both_phases_of_one_engine_is_found_though_its_own_run_is_clean(tmp_path):
    """What a run of one engine cannot see: prefill and decode that are wrong alike."""
    every = ("P", "D", "P'", "D'", "E1", "E7", "E31", "N1", "N2", "A")
    right = put(tmp_path / "b", drifting(0.01, arms=every, start=(1, "attn_out")))
    assert analyze(right).verdict is Verdict.NO_DRIFT
    result, _ = compared(tmp_path, put(tmp_path / "a"), right)
    assert result.verdict is Verdict.MISMATCH
    assert result.first_failure is not None
    assert result.first_failure.tensor == "attn_out"


def test_other_tokens_are_not_compared_and_it_says_where(tmp_path):
    from dataclasses import replace

    def tokens(*ids: int):
        return lambda trace: replace(trace, header=replace(trace.header, token_ids=ids))

    left, right = put(tmp_path / "a", edit=tokens(*range(40))), put(tmp_path / "b", edit=tokens(0, 1, 9, *range(3, 40)))
    with pytest.raises(UsageError, match="token 2 and token 9 at position 2"):
        compared(tmp_path, left, right)
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_one_side_lacks_is_told(tmp_path):
    left, right = put(tmp_path / "a"), put(tmp_path / "b")
    put(right, prompt="extra")
    _, left_out = compared(tmp_path, left, right)
    assert len(left_out) == 1
    assert left_out[0].startswith("prompt extra: only ")


def test_a_tap_that_one_engine_lacks_is_left_out_and_listed(tmp_path):
    taps = ("attn_norm", "q_proj", "k_cache", "attn_out", "x_out")
    left, right = put(tmp_path / "a", taps=taps), put(tmp_path / "b", taps=taps[1:])
    result, _ = compared(tmp_path, left, right)
    assert result.verdict is Verdict.NO_DRIFT
    report = result.reports()["B3_66_V2_FINAL_REPORT.md"]
    assert "only the reference has this tap" in report
    assert "attn_norm" in report


def test_the_side_with_noise_arms_is_the_reference(tmp_path):
    left, right = put(tmp_path / "a", arms=("P'", "D'", "E1")), put(tmp_path / "b", arms=("P'", "D'", "E1", "N1", "N2"))
    result, _ = compared(tmp_path, left, right)
    assert result.traces[0].header.labels["reference"].endswith("/b")
    prefill: Trace = next(t for t in result.traces if t.header.prompt == "p0.prefill")
    assert {r.arm for r in prefill.records} == {"P", "D", "P'", "D'", "E1", "D@E1", "N1", "N2"}


def test_the_command_prints_both_sides_and_the_verdict(tmp_path):
    left, right = put(tmp_path / "a"), put(tmp_path / "b", drifting(0.1, start=(0, "q_proj")))
    done = CliRunner().invoke(group, ["compare", str(left), str(right), "--out", str(tmp_path / "o"), "--date", "d"])
    assert "verdict: MISMATCH" in done.output
    assert "reference: " in done.output
    assert done.exit_code == 1
    assert (tmp_path / "o/d/compare/B3_66_V2_FINAL_REPORT.md").is_file()
