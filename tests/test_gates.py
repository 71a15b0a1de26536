"""The gates: each is shut by its own fault, gives N/A with the reason, and lets a healthy trace through."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from driftprobe.compare import NoPayloads
from driftprobe.judgement import TraceJudgement, Verdict
from driftprobe.trace import FAILED, Event, Record, Trace
from driftprobe.verdict import judge_trace
from make_trace import Change, Site, bare, both, drifting, scaled, toy, unchanged, without

ORDER = ["complete", "ran", "compared", "paired", "same token", "aligned", "deterministic", "fired", "read back",
         "finite", "plausible"]  # fmt: skip


def judged(change: Change = unchanged, **more: object) -> TraceJudgement:
    return judge_trace(toy(change, **more)[0], NoPayloads())  # type: ignore[arg-type]


def at(arm: str, layer: int | None, tensor: str, what: Callable[[np.ndarray], object]) -> Change:
    """Something done to the tensors of an arm at one tap."""
    return lambda site, array: what(array) if (site.arm, site.layer, site.tensor) == (arm, layer, tensor) else array


def edited(trace: Trace, wanted: Callable[[Record], bool], **fields: object) -> Trace:
    return replace(trace, records=tuple(replace(r, **fields) if wanted(r) else r for r in trace.records))


def shut(found: TraceJudgement, gate: str, *words: str) -> None:
    """This gate is shut, the verdict is N/A and says so."""
    gates = {g.name: g for g in found.gates}
    assert not gates[gate].passed
    assert found.verdict is Verdict.NOT_AVAILABLE
    assert found.first_failure is None
    first = next(g for g in found.gates if not g.passed)
    assert found.reason == f"gate '{first.name}': {first.detail}"
    for word in words:
        assert word in gates[gate].detail


@pytest.mark.parametrize("mode", ["as_designed", "kv_aligned"])
def test_a_healthy_trace_passes_every_gate_in_order(mode):
    found = judged(mode=mode, steps=2)
    assert [gate.name for gate in found.gates] == ORDER
    assert [gate.name for gate in found.gates if not gate.passed] == []
    assert all(gate.detail for gate in found.gates)


# ---- complete, compared, paired


def test_an_incomplete_trace():
    trace, _ = toy()
    shut(judge_trace(replace(trace, damage="no footer"), NoPayloads()), "complete", "no footer")


def test_an_arm_that_failed():
    trace, _ = toy()
    failed = Event(event=f"{FAILED}exit code 1; its last lines: boom", arm="E7")
    shut(judge_trace(replace(trace, events=(*trace.events, failed)), NoPayloads()), "ran", "arm E7", "boom")


def test_nothing_compared():
    shut(judged(without(arm="D")), "compared", "nothing")


def test_the_embedding_alone_is_no_comparison():
    trace, _ = toy()
    some = replace(bare(trace), records=tuple(r for r in bare(trace).records if r.tensor == "embed"))
    shut(judge_trace(some, NoPayloads()), "compared")


@pytest.mark.parametrize("arm", ["P", "D", "A"])
def test_a_record_without_partner_is_listed(arm):
    found = judged(without(arm=arm, layer=1, tensor="q_proj"), mode="kv_aligned")
    shut(found, "paired", "layer 1 q_proj")
    assert {(r.layer, r.tensor) for r in found.unpaired} == {(1, "q_proj")}


def test_two_shapes_of_a_tensor_are_told_with_their_shapes():
    found = judged(at("D", 0, "k_cache", lambda rows: rows[:, 1:]))
    shut(found, "paired", "layer 0 k_cache (P, step 0, shape [6, 2, 64])", "(D, step 0, shape [6, 1, 64])")


def test_records_of_an_arm_that_nobody_knows_are_left_over():
    trace, _ = toy()
    odd = tuple(replace(r, arm="B") for r in trace.records if r.arm == "D")
    found = judge_trace(replace(trace, records=trace.records + odd), NoPayloads())
    shut(found, "paired")
    assert {record.arm for record in found.unpaired} == {"B"}


# ---- same token, aligned


@pytest.mark.parametrize("arm", ["D", "A", "D'", "E1"])
@pytest.mark.parametrize(("field", "word"), [("token_id", "token 7 and 99"), ("pos_id", "position id 5 and 99")])
def test_another_token_or_position_in_any_arm(arm, field, word):
    trace, _ = toy(mode="kv_aligned")
    odd = edited(trace, lambda r: r.arm == arm, **{field: 99})
    shut(judge_trace(odd, NoPayloads()), "same token", word)


def test_a_side_that_does_not_name_its_token_does_not_disagree():
    trace, _ = toy()
    some = edited(trace, lambda r: r.arm == "P", token_id=None, pos_id=None)
    assert judge_trace(some, NoPayloads()).verdict is Verdict.NO_DRIFT


def test_a_trace_without_tokens_says_that_it_does_not_know():
    trace, _ = toy()
    gates = {g.name: g for g in judge_trace(bare(trace), NoPayloads()).gates}
    assert gates["same token"].passed
    assert "does not name its tokens" in gates["same token"].detail


@pytest.mark.parametrize("arm", ["D", "A", "D'", "P'", "E7"])
def test_another_embedding_in_any_arm(arm):
    found = judged(at(arm, None, "embed", lambda x: scaled(x, 1e-6)), mode="kv_aligned")
    shut(found, "aligned", f"embed of {arm}")


def test_a_trace_without_embed_is_not_held_to_it():
    trace, _ = toy()
    some = replace(bare(trace), records=tuple(r for r in bare(trace).records if r.tensor != "embed"))
    gates = {g.name: g for g in judge_trace(some, NoPayloads()).gates}
    assert gates["aligned"].passed
    assert "no embed tap" in gates["aligned"].detail


# ---- deterministic


@pytest.mark.parametrize("arm", ["P'", "D'"])
def test_a_run_to_run_drift_within_rounding_joins_the_floor(arm):
    found = judged(at(arm, 0, "q_proj", lambda x: scaled(x, 4e-6)))
    gates = {g.name: g for g in found.gates}
    assert gates["deterministic"].passed
    assert "joins the floor" in gates["deterministic"].detail
    assert not found.determinism.equal
    assert found.determinism.largest == pytest.approx(4e-6, rel=0.1)
    assert {c.tensor for c in found.cells if c.floor.source == f"arm {arm}"} == {"q_proj"}


@pytest.mark.parametrize("arm", ["P'", "D'"])
def test_a_run_to_run_drift_beyond_rounding(arm):
    shut(judged(at(arm, 0, "q_proj", lambda x: scaled(x, 0.1))), "deterministic", "layer 0 q_proj", arm)


def test_a_run_to_run_drift_of_unknown_size():
    trace, _ = toy(at("D'", 0, "q_proj", lambda x: scaled(x, 1e-6)))
    hashed = edited(trace, lambda r: True, sketch=None, l2=None, abs_sum=None)
    shut(judge_trace(hashed, NoPayloads()), "deterministic", "cannot tell", "layer 0 q_proj")


def test_an_engine_that_was_run_once_is_not_called_deterministic():
    found = judged(arms=("E1",))
    assert not found.determinism.checked
    assert "not checked" in {g.name: g.detail for g in found.gates}["deterministic"]


# ---- fired, read back


@pytest.mark.parametrize("arm", ["P'", "E7", "A"])
def test_a_planned_tap_that_did_not_fire_in_some_arm(arm):
    shut(
        judged(without(arm=arm, layer=1, tensor="attn_ctx"), mode="kv_aligned"),
        "fired",
        f"layer 1 attn_ctx in arm {arm}",
    )


def test_an_arm_that_never_ran():
    shut(judged(without(arm="E1")), "fired", "in arm E1")


def readback(**measured: int) -> Callable[[Trace], Trace]:
    return lambda trace: replace(trace, events=(Event(event="cache_readback", arm="A", measured=measured),))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (readback(rows=20, different=3), "3 of 20 rows differ"),
        (readback(different=3), "3 of ? rows differ"),
        (readback(rows=20), "not read back"),
        (readback(rows=0, different=0), "not read back"),
        (lambda trace: replace(trace, events=()), "not read back"),
        (lambda trace: replace(trace, events=(), header=replace(trace.header, reads=())), "not read back"),
    ],
)
def test_an_aligned_cache_that_was_not_kept_or_not_checked(spoil, words):
    trace, _ = toy(mode="kv_aligned")
    shut(judge_trace(spoil(trace), NoPayloads()), "read back", words)


# ---- finite


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_the_same_nan_or_infinity_in_both_phases_cannot_be_compared(odd):
    found = judged(lambda site, array: array * odd if site.tensor == "attn_ctx" else array)
    shut(found, "finite", "layer 0 attn_ctx")


def masked(site: Site, array: np.ndarray) -> np.ndarray:
    if site.tensor == "attn_scores":
        array = array.copy()
        array[..., :3] = -np.inf
    return array


def test_masked_scores_are_no_finding():
    assert judged(masked).verdict is Verdict.NO_DRIFT


def test_nan_in_scores_is_one():
    shut(judged(lambda site, array: array * math.nan if site.tensor == "attn_scores" else array), "finite")


def test_nan_on_one_side_is_a_mismatch():
    found = judged(
        lambda site, array: array * math.nan if site.arm[0] == "D" and site.order >= (0, (1, 1, 9)) else array
    )
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert (found.first_failure.drift, found.first_failure.excess) == (math.inf, math.inf)


def test_nan_in_both_phases_behind_a_failure_is_its_consequence():
    broken = both(drifting(0.1), lambda site, array: array * math.nan if site.layer == 1 else array)
    found = judged(broken)
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert found.first_failure.layer == 0


# ---- plausible


def test_a_large_drift_upstream_of_nothing_but_equal_tensors():
    found = judged(at("D", 1, "x_mid", lambda x: scaled(x, 0.5)))
    shut(found, "plausible", "drift of ", " at layer 1 x_mid")


def test_a_large_drift_that_what_reads_it_does_not_show():
    """A tap that takes the wrong tensor, in an engine that rounds differently further on."""
    wrong = both(at("D", 0, "q_proj", lambda x: scaled(x, 0.5)), drifting(1e-7, ("D", "D'"), (1, "x_in")))
    shut(judged(both(wrong, at("D'", 0, "q_proj", lambda x: scaled(x, 0.5)))), "plausible", "layer 0 q_proj")


def test_a_large_drift_that_the_next_layer_does_not_show():
    wrong = at("D", 0, "x_out", lambda x: scaled(x, 0.5))
    shut(judged(both(wrong, at("D", 1, "mlp_out", lambda x: scaled(x, 0.5)))), "plausible", "layer 0 x_out")


def test_a_large_drift_at_the_last_tap_of_all_is_plausible():
    found = judged(drifting(0.1, ("D", "D'"), (None, "logits")))
    assert found.verdict is Verdict.MISMATCH


def test_a_small_drift_may_be_rounded_away():
    found = judged(drifting(1e-7, ("D", "D'"), (0, "q_proj")), taps=("x_in", "q_proj"))
    assert found.verdict is Verdict.STRUCTURAL_DRIFT


@pytest.mark.parametrize("share", [1e-9, 1.0])
def test_a_branch_too_small_for_the_sum_may_differ_without_a_trace(share):
    """mlp_out is 10 % off; where it is 1e-9 of the stream, the sum cannot show that."""
    small: Change = lambda site, array: array * np.float32(share) if site.tensor == "mlp_out" else array  # noqa: E731
    branch = at("D", 1, "mlp_out", lambda x: scaled(x, 0.1))
    found = judged(both(small, branch, at("D'", 1, "mlp_out", lambda x: scaled(x, 0.1))))
    if share == 1.0:
        shut(found, "plausible", "layer 1 mlp_out")
    else:
        assert found.verdict is Verdict.MISMATCH


def reordered(site: Site, array: np.ndarray) -> np.ndarray:
    """Cache rows in another order: scores and probabilities follow them, their weighted sum does not."""
    if site.arm[0] == "D" and site.layer == 1 and site.tensor in {"k_cache", "v_cache"}:
        return array[::-1]
    if site.arm[0] == "D" and site.layer == 1 and site.tensor in {"attn_scores", "attn_probs"}:
        return array[..., ::-1]
    return array


def test_cache_rows_in_another_order_leave_what_follows_as_it_is():
    found = judged(reordered)
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.tensor) == (1, "k_cache")


def test_scores_in_another_order_over_rows_that_are_not():
    found = judged(lambda site, array: array if site.tensor in {"k_cache", "v_cache"} else reordered(site, array))
    shut(found, "plausible", "attn_probs")


def test_a_key_that_one_side_alone_scores_may_weigh_nothing():
    """Its scores differ in shape, which is beyond every limit, and all that follows may be bit-equal."""

    def one_key_more(site, array):
        hit = site.arm in {"D", "D'"} and site.layer == 0 and site.tensor in {"attn_scores", "attn_probs"}
        return np.concatenate([array, np.zeros_like(array[..., :1])], axis=-1) if hit else array

    found = judged(one_key_more)
    assert next(gate for gate in found.gates if gate.name == "plausible").passed


def test_the_page_lists_the_gates_in_their_order():
    page = (Path(__file__).parents[1] / "docs" / "how-it-decides.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \d+ \| ([a-z ]+) \|", page, flags=re.MULTILINE) == ORDER
