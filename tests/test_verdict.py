"""judge(): which of the four verdicts, the first failure, the 2×2 reading, guilty controls, the detection limit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftprobe.compare import NoPayloads
from driftprobe.floor import BOUND_WITHOUT_NOISE, LIMIT, SUM_BOUND
from driftprobe.judgement import Reading, Status, TraceJudgement, Verdict
from driftprobe.trace import Trace
from driftprobe.verdict import judge, judge_trace
from make_trace import Change, bare, both, drifting, toy, unchanged, without

D = ("D", "D'")
NONE = NoPayloads()


def judged(change: Change = unchanged, **more: object) -> TraceJudgement:
    return judge_trace(toy(change, **more)[0], NONE)  # type: ignore[arg-type]


def first(found: TraceJudgement) -> tuple[int, int | None, str, str]:
    failure = found.first_failure
    assert failure is not None, found.reason
    return (failure.step, failure.layer, failure.tensor, failure.phase)


def stripped(trace: Trace, **fields: object) -> Trace:
    """The same trace with less evidence in every record."""
    return replace(trace, records=tuple(replace(r, **fields) for r in trace.records))


HASHED = {"sketch": None, "l2": None, "abs_sum": None}


# ---- the four verdicts


def test_equal_bits_are_no_drift():
    found = judged()
    assert found.verdict is Verdict.NO_DRIFT
    assert found.first_failure is None
    assert {cell.status for cell in found.cells} == {Status.PASS}


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_drift_within_the_limit_is_structural(share):
    found = judged(drifting(share * LIMIT * (BOUND_WITHOUT_NOISE + SUM_BOUND) * 2**-24 * 0.7, D))
    assert found.verdict is Verdict.STRUCTURAL_DRIFT
    assert "largest excess" in found.reason
    assert found.first_failure is None


def test_drift_beyond_the_limit_is_a_mismatch_with_its_figures():
    found = judged(drifting(0.01, D, (1, "q_rope")))
    assert found.verdict is Verdict.MISMATCH
    assert first(found) == (0, 1, "q_rope", "decode0")
    failure = found.first_failure
    assert failure is not None
    assert failure.excess == pytest.approx(failure.drift / failure.floor)
    for word in ("decode0", "layer 1 q_rope", "prompt p0", "step 0", f"{failure.drift:.2e}", f"{failure.floor:.2e}"):
        assert word in found.reason


def test_differences_of_unknown_size_cannot_be_told():
    found = judge_trace(stripped(toy(drifting(0.01, D), arms=())[0], **HASHED), NONE)
    assert found.verdict is Verdict.NOT_AVAILABLE
    assert "cannot tell" in found.reason
    assert found.first_failure is None


def test_equal_hashes_alone_are_enough_for_no_drift():
    assert judge_trace(bare(toy()[0]), NONE).verdict is Verdict.NO_DRIFT


@settings(max_examples=25, deadline=None)
@given(order=st.randoms(use_true_random=False), size=st.sampled_from([0.0, 1e-7, 1e-3, 0.5]), layer=st.integers(0, 1))
def test_the_order_of_records_does_not_matter(order, size, layer):
    trace, whole = toy(drifting(size, D, (layer, "q_rope")), mode="kv_aligned", taps=("q_proj", "q_rope", "k_cache"))
    records = list(trace.records)
    order.shuffle(records)
    a, b = (judge_trace(t, whole) for t in (trace, replace(trace, records=tuple(records))))
    assert (a.verdict, a.reason, a.gates, a.cells, a.failures, a.reading) == (
        b.verdict, b.reason, b.gates, b.cells, b.failures, b.reading)  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(dtype=st.sampled_from(["float32", "float16", "float64"]), steps=st.integers(1, 2), layers=st.integers(1, 3))
def test_an_engine_that_is_compared_with_itself_has_no_drift(dtype, steps, layers):
    found = judged(dtype=dtype, steps=steps, layers=layers, mode="kv_aligned")
    assert found.verdict is Verdict.NO_DRIFT
    assert {cell.drift.value for cell in found.cells} == {0.0}


@settings(max_examples=25, deadline=None)
@given(size=st.floats(1e-9, 10), kept=st.sets(st.sampled_from(["nz_count", "abs_sum", "shape", "l2"])))
def test_less_evidence_never_makes_a_mismatch(size, kept):
    """What whole tensors call arithmetic, norms may leave open but not call a bug."""
    trace, whole = toy(drifting(size, D), arms=(), taps=("x_in", "q_proj"), layers=1)
    if judge_trace(trace, whole).verdict is not Verdict.MISMATCH:
        less = stripped(
            trace, sketch=None, **{n: None for n in ("nz_count", "abs_sum", "shape", "l2") if n not in kept}
        )
        assert judge_trace(less, NONE).verdict is not Verdict.MISMATCH


# ---- norms alone: a bound


def test_norms_that_prove_a_drift_beyond_the_limit_are_a_mismatch():
    trace = stripped(toy(drifting(0.5, D), arms=())[0], sketch=None)
    found = judge_trace(trace, NONE)
    assert found.verdict is Verdict.MISMATCH
    assert {cell.drift.rung for cell in found.cells if not cell.drift.equal} == {"moments"}


def test_a_stranger_whose_tensor_is_gone_is_told_by_its_sum_alone():
    gone = lambda site, array: array * 0 if site.arm == "D" and site.order >= (0, (1, 0, 9)) else array  # noqa: E731
    found = judge_trace(bare(toy(gone)[0], "abs_sum"), NONE)
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert found.first_failure.drift == 1.0


def test_a_strangers_sum_without_a_size_calls_no_mismatch():
    doubled = bare(toy(drifting(2.0, D))[0], "abs_sum")
    found = judge_trace(doubled, NONE)
    assert found.verdict is Verdict.NOT_AVAILABLE
    assert max(cell.drift.value or 0 for cell in found.cells) == pytest.approx(2, rel=1e-3)


def test_a_strangers_sum_with_counts_can():
    """Three times the 1-norm over 128 elements is a drift of at least 2/√256 = 0.125 …; ten times is 0.56."""
    found = judge_trace(bare(toy(drifting(9.0, D))[0], "abs_sum", "nz_count"), NONE)
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert found.first_failure.drift == pytest.approx(9 / math.sqrt(256), rel=1e-3)


def test_equal_norms_of_unequal_tensors_prove_nothing():
    flipped = lambda site, array: -array if site.arm == "D" and site.tensor != "embed" else array  # noqa: E731
    assert judge_trace(bare(toy(flipped)[0], "abs_sum", "nz_count"), NONE).verdict is Verdict.NOT_AVAILABLE


# ---- the first failure


def test_layer_comes_before_op():
    """Layer 0's last op fails before layer 1's first, whatever their kinds."""
    found = judged(both(drifting(0.1, D, (0, "mlp_out"))))
    assert first(found)[1:3] == (0, "mlp_out")
    assert [f.layer for f in found.failures if f.layer is not None] == sorted(
        f.layer for f in found.failures if f.layer is not None
    )


def test_the_earliest_step_comes_first():
    """Step 0 fails in layer 1 alone, step 1 from layer 0 on: step 0's failure is what step 1 was fed with."""
    found = judged(both(drifting(0.1, D, (1, "q_proj"))), steps=2)
    assert first(found) == (0, 1, "q_proj", "decode0")
    assert {f.step for f in found.failures} == {0, 1}


def test_the_first_failure_of_a_mode_is_the_earliest_of_its_prompts():
    late, _ = toy(drifting(0.1, D, (0, "q_proj"), step=1), steps=2, prompt="late")
    early, _ = toy(drifting(0.1, D, (1, "q_proj")), steps=2, prompt="early")
    mode = judge([late, early], NONE).modes["as_designed"]
    assert mode.first_failure is not None
    assert (mode.first_failure.prompt, mode.first_failure.step, mode.first_failure.layer) == ("early", 0, 1)


def test_of_prompts_that_fail_alike_the_longest_is_shown():
    traces = []
    for prompt, length in (("short", 2), ("long", 9)):
        trace, _ = toy(drifting(0.1, D, (0, "q_proj")), prompt=prompt)
        traces.append(replace(trace, header=replace(trace.header, prompt_len=length)))
    failure = judge(traces, NONE).first_failure
    assert failure is not None
    assert failure.prompt == "long"


# ---- guilty controls


def test_a_control_that_rounding_cannot_explain_is_a_mismatch_of_its_own():
    found = judged(drifting(0.1, ("E7",), (1, "attn_ctx")))
    assert found.verdict is Verdict.MISMATCH
    assert first(found) == (0, 1, "attn_ctx", "prefill_ext")
    assert "prefill_ext differs from prefill_last" in found.reason
    assert {cell.status for cell in found.cells} == {Status.PASS}


def test_a_guilty_control_does_not_hide_decodes_failure():
    """With E's drift as a floor, decode's drift of half its size would pass."""
    change = both(drifting(0.1, ("E1", "E7"), (0, "attn_ctx")), drifting(0.05, D, (0, "attn_ctx")))
    found = judged(change)
    assert first(found) == (0, 0, "attn_ctx", "decode0")
    assert {failure.phase for failure in found.failures} == {"decode0", "prefill_ext"}


@pytest.mark.parametrize(
    ("e_starts", "d_starts", "phase"), [(0, 1, "prefill_ext"), (1, 0, "decode0"), (1, 1, "decode0")]
)
def test_of_decode_and_control_the_earlier_tap_comes_first(e_starts, d_starts, phase):
    found = judged(both(drifting(0.1, ("E1",), (e_starts, "q_proj")), drifting(0.1, D, (d_starts, "q_proj"))))
    assert first(found) == (0, min(e_starts, d_starts), "q_proj", phase)


def test_a_guilty_control_is_a_finding_also_where_the_alignment_fails():
    change = both(drifting(0.1, ("E1",), (1, "q_proj")), drifting(0.1, ("A",), (0, "q_proj")))
    found = judged(change, mode="kv_aligned")
    assert found.verdict is Verdict.MISMATCH
    assert first(found)[3] == "prefill_ext"


def test_a_control_within_rounding_is_no_finding():
    assert judged(drifting(1e-7, ("E1",))).verdict is Verdict.NO_DRIFT


# ---- the 2×2 reading


@pytest.mark.parametrize(
    ("arms", "reading", "verdict"),
    [
        ((), Reading.H0, Verdict.NO_DRIFT),
        (("D", "D'"), Reading.CONTENTS, Verdict.MISMATCH),
        (("D", "D'", "A"), Reading.COMPUTATION, Verdict.MISMATCH),
        (("A",), Reading.HARNESS, Verdict.NOT_AVAILABLE),
    ],
)
def test_the_two_by_two_table(arms, reading, verdict):
    found = judged(drifting(0.1, arms, (1, "q_rope")), mode="kv_aligned")
    assert (found.reading, found.verdict) == (reading, verdict)
    assert (reading.words in found.reason) == (reading is Reading.HARNESS)


def test_without_arm_a_nothing_is_read():
    assert judged(drifting(0.1, D)).reading is Reading.NONE


def test_a_shut_gate_leaves_nothing_to_read():
    found = judged(both(drifting(0.1, ("D", "D'", "A")), without(arm="E1")), mode="kv_aligned")
    assert found.verdict is Verdict.NOT_AVAILABLE
    assert found.reading is Reading.NONE


def test_an_aligned_arm_of_unknown_drift_is_not_read_as_agreeing():
    """Decode has lost a tensor, which its sum proves; arm A differs by an amount that nobody knows."""
    gone = lambda site, array: array * 0 if site.arm in D and site.order >= (0, (1, 0, 9)) else array  # noqa: E731
    trace, _ = toy(both(gone, drifting(1e-7, ("A",))), mode="kv_aligned")
    found = judge_trace(stripped(trace, sketch=None, l2=None, shape=None, nz_count=None), NONE)
    assert found.verdict is Verdict.MISMATCH
    assert found.reading is Reading.NONE


# ---- over modes and prompts


def test_the_gravest_verdict_wins():
    clean, broken, odd = (toy(c, prompt=n)[0] for n, c in (
        ("a", unchanged), ("b", drifting(0.1, D)), ("c", without(arm="E1"))))  # fmt: skip
    assert judge([clean, odd], NONE).verdict is Verdict.NOT_AVAILABLE
    assert judge([odd, broken, clean], NONE).verdict is Verdict.MISMATCH
    assert judge([clean, toy(drifting(1e-7, D), prompt="d")[0]], NONE).verdict is Verdict.STRUCTURAL_DRIFT
    assert judge([], NONE).verdict is Verdict.NOT_AVAILABLE


def test_modes_are_judged_apart():
    found = judge([toy(drifting(0.1, D))[0], toy(mode="kv_aligned")[0]], NONE)
    assert {name: mode.verdict for name, mode in found.modes.items()} == {
        "as_designed": Verdict.MISMATCH, "kv_aligned": Verdict.NO_DRIFT}  # fmt: skip
    assert found.first_failure is not None


@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_verdict_is_never_tested_for_truth(verdict):
    with pytest.raises(TypeError):
        bool(verdict)


# ---- limits, attention


def test_the_detection_limit_holds_what_it_says():
    """A drift just under it passes, one above it fails, at the tap that it names."""
    limits = judged().limits
    assert limits is not None
    assert limits.smallest_at == "layer 0 x_in of p0"
    assert limits.largest_at == "final_norm of p0"
    at_tap = ((0, "x_in"), limits.smallest), ((None, "final_norm"), limits.largest)
    for (layer, tensor), limit in at_tap:
        for factor, status in ((0.6, Status.PASS), (1.6, Status.FAIL)):
            hit = drifting(factor * limit, D, (layer, tensor))
            (cell,) = [c for c in judged(hit, dtype="float32").cells if (c.layer, c.tensor) == (layer, tensor)]
            assert cell.status is status


def test_every_verdict_that_compared_something_has_its_limit():
    for change in (unchanged, drifting(1e-7, D), drifting(0.1, D), drifting(0.1, ("A",))):
        assert judged(change, mode="kv_aligned").limits is not None
    assert judged(without(arm="D")).limits is None


def test_attention_statistics_leave_masked_scores_out():
    def masked(site, array):
        if site.tensor != "attn_scores":
            return array
        array = np.arange(8, dtype=np.float32).reshape(1, 2, 4) - (2 if site.arm == "D" else 0)
        array[0, 0, 0] = -np.inf
        return array

    attention = judge([toy(masked)[0]], NONE).modes["as_designed"].attention
    assert attention.pre_softmax_prefill is not None
    assert attention.pre_softmax_decode is not None
    prefill, decode = attention.pre_softmax_prefill, attention.pre_softmax_decode
    assert (prefill.min, prefill.max, prefill.mean) == (1.0, 7.0, 4.0)
    assert (decode.min, decode.max, decode.mean) == (-1.0, 5.0, 2.0)


def test_a_control_of_unknown_drift_is_not_listed_as_zero():
    only = lambda site, array: None if site.arm == "E1" and site.tensor != "x_in" else array  # noqa: E731
    trace, _ = toy(both(drifting(0.1, ("E1",)), only), arms=("E1", "E7"))
    assert judge_trace(stripped(trace, **HASHED), NONE).controls == {"E7": 0.0}


def test_hashes_alone_have_no_detection_limit():
    assert judge_trace(bare(toy()[0]), NONE).limits is None


@pytest.mark.parametrize("arm", ["P@chunks", "D@threads"])
def test_a_knob_that_changes_more_than_rounding_is_a_finding(arm):
    trace, _ = toy(drifting(0.1, (arm,), (1, "attn_ctx")), arms=("P'", "D'", "E1", arm))
    found = judge_trace(trace, NoPayloads())
    assert found.verdict is Verdict.MISMATCH
    first = found.first_failure
    assert first is not None
    assert (first.arm, first.layer, first.tensor, first.of_control) == (arm, 1, "attn_ctx", True)


def test_a_knob_that_rounds_differently_raises_the_floor():
    trace, _ = toy(drifting(5e-7, ("P@chunks",), (1, "attn_ctx")), arms=("P'", "D'", "E1", "P@chunks"))
    found = judge_trace(trace, NoPayloads())
    assert found.verdict is Verdict.NO_DRIFT
    assert found.controls["P@chunks"] > 0
