"""A constant along a row of scores is nothing to softmax, and nothing to a verdict; one score of many is."""

from __future__ import annotations

import numpy as np
import pytest

from driftprobe.compare import NoPayloads, exact_drift, without_shift
from driftprobe.fingerprint import Array
from driftprobe.judgement import Verdict
from driftprobe.verdict import judge
from make_trace import Change, Site, both, drifting, toy

HEADS = np.array([[[0.3], [-7.0]]], dtype=np.float32)
"""A shift for each of two heads."""


def shifted(*arms: str, layer: int = 1) -> Change:
    """Scores of some arms are off by a constant in each row."""

    def change(site: Site, array: Array) -> Array:
        hit = (site.layer, site.tensor) == (layer, "attn_scores") and site.arm in arms
        return (array + HEADS).astype(array.dtype) if hit else array

    return change


def one_score(*arms: str) -> Change:
    """One score of one head is off by one."""

    def change(site: Site, array: Array) -> Array:
        if (site.layer, site.tensor) != (1, "attn_scores") or site.arm not in arms:
            return array
        changed = array.copy()
        changed[0, 1, 5] += 1
        return changed

    return change


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("arms", [("D", "D'", "A"), ("E1",), ("D", "D'", "A", "E1")])
def test_a_shift_is_no_mismatch(arms, whole):
    trace, arrays = toy(shifted(*arms), mode="kv_aligned")
    found = judge([trace], arrays if whole else NoPayloads())
    assert found.verdict in {Verdict.STRUCTURAL_DRIFT, Verdict.NO_DRIFT}, found.reason
    floors = [c.floor.value for c in found.modes["kv_aligned"].cells if c.tensor == "attn_scores"]
    assert max(floors) < 1e-5, "a shift must not raise the floor over a bug"


def test_one_score_of_many_still_is():
    trace, arrays = toy(both(shifted("D", "D'"), one_score("D", "D'")))
    found = judge([trace], arrays)
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None and found.first_failure.tensor == "attn_scores"


@pytest.mark.parametrize("whole", [True, False])
def test_scores_whose_probabilities_differ_too_fail(whole):
    trace, arrays = toy(drifting(0.1, start=(1, "attn_scores")))
    found = judge([trace], arrays if whole else NoPayloads())
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None and found.first_failure.tensor == "attn_scores"


def test_the_shift_is_taken_row_by_row_over_finite_keys():
    p = np.array([[[1.0, 2.0, -np.inf], [3.0, -np.inf, -np.inf]]])
    d = p + np.array([[[10.0], [-4.0]]])
    assert exact_drift(p, without_shift(p, d)).value == 0.0
    leak = d.copy()
    leak[0, 1, 2] = 0.0
    assert exact_drift(p, without_shift(p, leak)).value == np.inf
    assert without_shift(p, d[:, :1]) is not None


def test_alibi_counted_from_the_end_of_the_call():
    """MPT's scores of one token are shifted by a constant in a longer prefill."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if not hasattr(transformers, "MptForCausalLM"):
        pytest.skip("no MPT in this transformers")
    import driftprobe
    from models import SPREAD, tokens

    torch.manual_seed(0)
    model = transformers.MptForCausalLM(
        transformers.MptConfig(d_model=64, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=128, vocab_size=160)
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, SPREAD)
    for payload in ("failing", "none"):
        found = driftprobe.probe(model, {"a": tokens(20)}, payload=payload)
        assert found.verdict in {Verdict.STRUCTURAL_DRIFT, Verdict.NO_DRIFT}, found.reason
        assert found.judgement.ladders
