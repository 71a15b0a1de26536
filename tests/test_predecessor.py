"""What the predecessor got wrong, item by item, from files as it wrote them to the verdict and the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import make_trace
from driftprobe.compare import NoPayloads
from driftprobe.diagnose import diagnose
from driftprobe.judgement import Judgement, Reading, Status, Verdict
from driftprobe.load import load_traces
from driftprobe.report import render_all
from driftprobe.verdict import judge, judge_trace
from make_trace import Site, both, drifting, scaled, toy

Body = dict[str, object]
LAYERS = (0, 1, 2, 4, 8)
TENSORS = ("q_proj", "k_proj", "v_proj", "k_cache", "v_cache", "attn_scores", "attn_probs", "attn_out", "x_out")
PLACES = [(layer, tensor) for layer in LAYERS for tensor in TENSORS] + [
    (-1, "embed"),
    (-1, "final_norm"),
    (-1, "logits"),
]


def lines(changed: Callable[[int, str], bool] = lambda _layer, _tensor: False, **more: object) -> list[Body]:
    """One phase's 48 records, as the predecessor wrote them; the places named have another hash."""
    return [
        {"prompt": "p0_short", "layer": layer, "tensor": tensor, "hash": f"{layer}{tensor}{changed(layer, tensor)}"}
        | more
        for layer, tensor in PLACES
    ]


def analyzed(folder: Path, prefill: list[Body], decode: list[Body]) -> Judgement:
    make_trace.put(folder / "p0_short_trace.jsonl", *prefill)
    make_trace.put(folder / "p0_short_decode_trace.jsonl", *decode)
    return diagnose(judge(load_traces(folder), NoPayloads()))


def test_there_are_48_pairs(tmp_path):
    assert len(analyzed(tmp_path, lines(), lines()).modes["as_designed"].cells) == 48


def test_a_decode_file_is_not_read_as_prefill(tmp_path):
    """Its pattern for prefill files, *_trace.jsonl, also matched *_decode_trace.jsonl: decode was its own partner."""
    make_trace.put(tmp_path / "p0_short_decode_trace.jsonl", *lines())
    found = judge(load_traces(tmp_path), NoPayloads())
    assert found.verdict is Verdict.NOT_AVAILABLE
    assert found.modes["as_designed"].cells == ()


def test_with_every_pair_missing_the_verdict_is_not_a_pass(tmp_path):
    decode = [body | {"tensor": f"decode_{body['tensor']}"} for body in lines()]
    found = analyzed(tmp_path, lines(), decode)
    assert found.verdict is Verdict.NOT_AVAILABLE
    assert found.modes["as_designed"].unpaired == 96


def test_one_missing_pair_is_no_pass_either(tmp_path):
    assert analyzed(tmp_path, lines(), lines()[1:]).verdict is Verdict.NOT_AVAILABLE


def test_k_is_not_aligned_because_its_hash_is_vs():
    """K's rows equal V's in both phases, and decode's K is not prefill's: nothing is aligned about that."""

    def k_is_v(site: Site, array: np.ndarray) -> np.ndarray:
        if site.tensor in {"k_cache", "v_cache"}:
            array = make_trace.toy_values(Site("P", site.step, site.layer, "v_cache"), array.dtype)
            return array * np.float32(2) if site.arm in {"D", "D'"} else array
        return array

    kv = judge([toy(both(k_is_v, drifting(0.1, start=(0, "attn_scores"), caches=False)))[0]], NoPayloads()).modes
    assert kv["as_designed"].kv.kv_aligned is False
    assert kv["as_designed"].kv.k_hash_consistent is False


def test_k_and_v_of_two_hashes_are_aligned_where_each_is_prefills_own():
    kv = judge([toy()[0]], NoPayloads()).modes["as_designed"].kv
    assert (kv.k_hash_consistent, kv.v_hash_consistent, kv.kv_aligned) == (True, True, True)


def test_structural_drift_is_a_verdict_that_is_given():
    found = diagnose(judge([toy(drifting(1e-7, ("D", "D'")))[0]], NoPayloads()))
    assert found.verdict is Verdict.STRUCTURAL_DRIFT
    assert "**STRUCTURAL_DRIFT**" in render_all(found, [toy()[0]])["B3_66_V2_FINAL_REPORT.md"]


@pytest.mark.parametrize("mode", ["as_designed", "kv_aligned"])
def test_the_first_failure_is_the_first_layer_not_the_first_kind_of_tensor(mode):
    """q_proj of layer 1 comes first in the alphabet of its list, mlp_out of layer 0 in the model."""
    found = judge([toy(drifting(0.1, ("D", "D'", "A"), (0, "mlp_out")), mode=mode)[0]], NoPayloads())
    failing = {(c.layer, c.tensor) for c in found.modes[mode].cells if c.status is Status.FAIL}
    assert {(0, "mlp_out"), (1, "q_proj")} <= failing
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.tensor) == (0, "mlp_out")


@pytest.mark.parametrize("counts", [False, True])
def test_sums_70_apart_upstream_of_equal_logits_are_a_fault_of_the_harness(tmp_path, counts):
    """They cannot be benign: a drift of that size would have reached the logits."""
    known = {"nz_count": 64} if counts else {}
    off = lambda layer, _tensor: 0 <= layer < 8  # noqa: E731
    prefill = lines(abs_sum=100.0, **known)
    decode = [body | {"abs_sum": 170.0 if off(body["layer"], "") else 100.0} for body in lines(off, **known)]
    found = analyzed(tmp_path, prefill, decode)
    assert found.verdict is Verdict.NOT_AVAILABLE
    (judged,) = found.modes["as_designed"].prompts
    shut = [gate for gate in judged.gates if not gate.passed]
    assert [gate.name for gate in shut] == ["plausible"]
    assert "bit-equal" in judged.reason
    assert judged.reading is Reading.NONE


def test_a_healthy_engine_whose_hashes_differ_is_not_failed_with_sketches():
    """42 of 48 pairs differ, each by a rounding error."""
    untouched = {(None, "embed"), (0, "q_proj"), (0, "k_proj"), (0, "v_proj"), (0, "k_cache"), (0, "v_cache")}

    def rounded(site: Site, array: np.ndarray) -> np.ndarray:
        same = (site.layer, site.tensor) in untouched or site.arm not in {"D", "D'"}
        return array if same else scaled(array, 1.2e-7)

    trace, _ = toy(rounded, layers=5, taps=TENSORS)
    found = judge_trace(trace, NoPayloads())
    different = [cell for cell in found.cells if not cell.drift.equal]
    assert (len(different), len(found.cells)) == (42, 48)
    assert found.verdict is Verdict.STRUCTURAL_DRIFT
    assert found.first_failure is None


def test_a_healthy_engine_whose_hashes_differ_cannot_be_told_by_hashes_alone(tmp_path):
    same = {(-1, "embed"), (0, "q_proj"), (0, "k_proj"), (0, "v_proj"), (0, "k_cache"), (0, "v_cache")}
    found = analyzed(tmp_path, lines(), lines(lambda layer, tensor: (layer, tensor) not in same))
    mode = found.modes["as_designed"]
    assert (mode.count(Status.UNKNOWN), mode.count(Status.PASS), mode.count(Status.FAIL)) == (42, 6, 0)
    assert found.verdict is Verdict.NOT_AVAILABLE
    assert "42 of 48 pairs differ by an amount that the trace cannot tell" in found.reason


def test_all_hashes_equal_is_no_drift(tmp_path):
    assert analyzed(tmp_path, lines(), lines()).verdict is Verdict.NO_DRIFT


def test_positions_on_one_side_alone_still_make_pairs(tmp_path):
    found = analyzed(tmp_path, lines(logical_tok_idx=1, token_id=7), lines())
    assert found.verdict is Verdict.NO_DRIFT
    assert found.modes["as_designed"].unpaired == 0
