"""Large traces are judged from the pairs that answer for all others: both ways give the same verdict and figures."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from driftprobe import quick as quick_module
from driftprobe.fingerprint import Array
from driftprobe.judgement import Judgement, Status, TraceJudgement, Verdict
from driftprobe.load import load_traces
from driftprobe.quick import Quick, load_quickly
from driftprobe.result import analyze
from driftprobe.scan import BUILT, read_columns
from driftprobe.thin import thin
from driftprobe.trace import Record, Trace
from driftprobe.trace_file import TraceWriter
from make_trace import Change, Site, both, drifting, scaled, toy, unchanged, without

pytestmark = pytest.mark.skipif(not BUILT, reason="driftprobe._scan is not built here: it needs a C compiler")
FIGURES = {field.name for field in fields(TraceJudgement)} - {"cells", "aligned_cells", "rows", "left_out", "ladder"}
"""All that a judgement holds but what it lists pair by pair."""
SLOW = settings(max_examples=int(os.environ.get("DRIFTPROBE_EXAMPLES", "20")), deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


def written(folder: Path, *traces: Trace, spoil: Callable[[Record], Record] = lambda r: r) -> Path:
    """A folder with these traces, without payloads."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jsonl"):
        old.unlink()
    for trace in traces:
        with TraceWriter(folder / trace.path, trace.header) as writer:
            for record in trace.records:
                writer.record(spoil(record))
            for event in trace.events:
                writer.event(event)
    return folder


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_module.Quick.__init__, "__defaults__", (0,))


def assert_equal(folder: Path, *, reports: bool = False) -> tuple[Judgement, int]:
    """Both ways agree; returns the judgement, and of how many traces the records were not looked at."""
    whole, thinned = analyze(folder), analyze(folder, whole=False)
    assert thinned.judgement.verdict is whole.judgement.verdict
    for name in ("reason", "limits", "impact", "first_failure"):
        assert getattr(thinned.judgement, name) == getattr(whole.judgement, name), name
    for name, mode in whole.judgement.modes.items():
        other = thinned.judgement.modes[name]
        for figure in (
            "verdict",
            "reason",
            "kv",
            "attention",
            "impact",
            "limits",
            "first_failure",
            "pairs",
            "unpaired",
        ):
            assert getattr(other, figure) == getattr(mode, figure), figure
        assert [other.count(s) for s in Status] == [mode.count(s) for s in Status]
        for ours, theirs in zip(other.prompts, mode.prompts, strict=True):
            for figure in FIGURES:
                assert getattr(ours, figure) == getattr(theirs, figure), figure
            if theirs.ladder is not None and ours.ladder is not None:
                assert (ours.ladder.outcome, ours.ladder.slopes) == (theirs.ladder.outcome, theirs.ladder.slopes)
                assert (ours.ladder.noise, ours.ladder.unit) == (theirs.ladder.noise, theirs.ladder.unit)
    assert not reports or thinned.reports() == whole.reports()
    prompts = [item for mode in thinned.judgement.modes.values() for item in mode.prompts]
    return thinned.judgement, sum(item.left_out is not None for item in prompts)


def jittered(size: float, arms: tuple[str, ...], share: float) -> Change:
    """Every record of some arms is off by its own error, up to a size; a share of them not at all."""

    def change(site: Site, array: Array) -> Array:
        rng = np.random.default_rng(
            [len(site.arm), *map(ord, site.arm + site.tensor), site.step, (site.layer or 0) + 1]
        )
        if site.arm not in arms or site.tensor == "embed" or rng.random() < share:
            return array
        return scaled(array, size * rng.random())

    return change


ARMS = ("P'", "D'", "E1", "E7", "N1")
TAPS = ("x_in", "q_proj", "k_cache", "v_cache", "attn_scores", "attn_probs", "x_out")


@SLOW
@given(
    sizes=st.lists(
        st.sampled_from([0.0, 1e-9, 1e-7, 1e-6, 1e-5, 1e-3]), min_size=len(ARMS) + 2, max_size=len(ARMS) + 2
    ),
    share=st.sampled_from([0.0, 0.5, 0.95]),
    steps=st.integers(1, 4),
    layers=st.integers(1, 3),
    mode=st.sampled_from(["as_designed", "kv_aligned"]),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_both_ways_agree_on_any_drift(tmp_path, sizes, share, steps, layers, mode, dtype):
    changes = [jittered(size, (arm,), share) for arm, size in zip(("D", "A", *ARMS), sizes, strict=True)]
    trace, _ = toy(both(*changes), arms=ARMS, steps=steps, layers=layers, mode=mode, dtype=np.dtype(dtype),
                   taps=TAPS)  # fmt: skip
    assert_equal(written(tmp_path / "t", trace))


LEFT_OUT = {
    "a tap of decode": (without(arm="D", tensor="q_proj"), unchanged),
    "an arm's step": (without(arm="E1", step=1), unchanged),
    "a control's tap": (without(arm="P'", tensor="x_out"), unchanged),
    "a tap everywhere": (without(tensor="attn_probs"), unchanged),
    "a failure": (drifting(1e-2, start=(1, "q_rope")), unchanged),
    "a failing control": (drifting(1e-2, arms=("E7",)), unchanged),
    "a wild repetition": (drifting(1e-2, arms=("D'",)), unchanged),
    "a late failure": (drifting(1e-2, arms=("D",), start=(1, "mlp_out"), step=1), unchanged),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_both_ways_agree_where_something_is_amiss(tmp_path, name):
    change, more = LEFT_OUT[name]
    trace, _ = toy(both(change, more), steps=2, mode="kv_aligned")
    assert_equal(written(tmp_path, trace))


SPOILED: dict[str, Callable[[Record], Record]] = {
    "another token": lambda r: replace(r, token_id=9) if r.arm == "D" and r.step == 1 else r,
    "no token": lambda r: replace(r, token_id=None, pos_id=None),
    "no position": lambda r: replace(r, logical_tok_idx=None, phase=r.phase),
    "a token here and there": lambda r: replace(r, token_id=None) if r.tensor == "q_proj" else r,
    "no sketch": lambda r: replace(r, sketch=None),
    "no sketch at one tap": lambda r: replace(r, sketch=None) if r.tensor == "q_proj" else r,
    "no sketch on one side": lambda r: replace(r, sketch=None) if r.arm == "D" else r,
    "norms of one kind": lambda r: replace(r, sketch=None, l2=None),
    "hashes alone": lambda r: replace(r, sketch=None, l2=None, abs_sum=None, min=None, max=None, mean=None),
    "another dtype": lambda r: replace(r, dtype="bfloat16") if r.tensor == "k_proj" and r.arm == "D" else r,
    "no dtype": lambda r: replace(r, dtype=None),
    "another shape": lambda r: replace(r, shape=(2, 64)) if r.tensor == "v_proj" and r.arm == "D" else r,
    "NaN": lambda r: replace(r, nan_count=3, nz_count=1) if r.tensor == "x_mid" else r,
    "masks": lambda r: replace(r, inf_count=3, nz_count=1) if r.tensor == "attn_scores" else r,
    "other masks": lambda r: replace(r, inf_count=3, nz_count=1) if (r.tensor, r.arm) == ("attn_scores", "D") else r,
    "a rank of its own": lambda r: replace(r, order=5) if r.tensor == "q_proj" else r,
    "an arm of no name": lambda r: replace(r, arm="X") if r.arm == "E7" else r,
    "recomputed scores": lambda r: replace(r, source="recomputed") if r.tensor == "attn_scores" else r,
    "equal hashes, other rows": lambda r: replace(r, rows=tuple(f"0x{i:016x}" for i in range(len(r.rows or ()))))
    if r.rows and r.arm == "D" else r,
    "a name that reads like a shape": lambda r: replace(r, source="[1,x]"),
    "the same key": lambda r: replace(r, logical_tok_idx=11),
    "no size": lambda r: replace(r, l2=0.0) if r.tensor == "q_proj" else r,
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_both_ways_agree_on_what_is_unusual(tmp_path, name):
    trace, _ = toy(jittered(1e-6, ("D", "A", "E1"), 0.3), steps=2, mode="kv_aligned")
    assert_equal(written(tmp_path, trace, spoil=SPOILED[name]))


@pytest.mark.parametrize("size", [0.0, 1e-7])
def test_a_quiet_trace_is_judged_from_few_of_its_pairs(tmp_path, size):
    trace, _ = toy(jittered(size, ("D", "D'", "A", "E1", "N1"), 0.2), arms=ARMS, steps=8, mode="kv_aligned")
    found, thinned = assert_equal(written(tmp_path, trace))
    assert thinned == 1
    assert found.verdict is (Verdict.STRUCTURAL_DRIFT if size else Verdict.NO_DRIFT)
    (judged,) = found.modes["kv_aligned"].prompts
    assert judged.left_out is not None
    assert len(judged.cells) + judged.left_out.pairs == found.modes["kv_aligned"].pairs
    assert len(judged.cells) < judged.left_out.pairs / 2


def test_a_trace_that_fails_keeps_all_its_pairs(tmp_path):
    quiet, _ = toy(jittered(1e-7, ("D",), 0.2), steps=2, prompt="quiet")
    failing, _ = toy(drifting(1e-2), steps=2, prompt="failing")
    found, thinned = assert_equal(written(tmp_path, quiet, failing), reports=True)
    assert (found.verdict, thinned) == (Verdict.MISMATCH, 1)


@pytest.mark.parametrize("base", [1e-7, 1e-2])
@pytest.mark.parametrize("above", [0.0, 1e-2])
def test_a_run_and_its_rung_are_both_thinned_or_none(tmp_path, base, above):
    run, _ = toy(drifting(base), arms=ARMS, steps=2)
    rung, _ = toy(drifting(above), arms=ARMS, steps=2, dtype=np.float64)
    rung = replace(rung, header=replace(rung.header, rung="float64"), path="p0_as_designed_float64.jsonl")
    folder = written(tmp_path, run, rung)
    assert_equal(folder)
    quick = Quick(0)
    traces = load_quickly(folder, None, quick)
    assert len(quick.ready) == (2 if base < 1e-3 and not above else 0)
    assert [bool(trace.records) for trace in traces] == [not quick.ready] * 2


def test_a_small_trace_is_not_thinned(tmp_path):
    trace, _ = toy()
    quick = Quick(1 << 30)
    assert load_quickly(written(tmp_path, trace), None, quick) == load_traces(tmp_path)
    assert not quick.ready


@pytest.mark.parametrize("more", [{"order": 5}, {"payload": "payloads/x.safetensors#n"}])
def test_what_a_row_has_no_place_for_is_never_thinned(more, tmp_path):
    trace, _ = toy(steps=2)
    (path,) = written(tmp_path, trace, spoil=lambda r: replace(r, **more) if r.tensor == "k_cache" else r).iterdir()
    columns = read_columns(path)
    assert columns is not None and columns.odd
    assert thin(columns) is None
