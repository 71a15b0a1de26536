"""The matched filters: one tap alone under noisy layers, rows that repeat from step to step, and longer prefills."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from driftprobe.fingerprint import Array
from driftprobe.judgement import Verdict
from driftprobe.matched import LEAST_SHARE, MIN_Z, _clearest, _Projection
from make_trace import Change, Site, both
from test_local import U, at, behind, judged, one_rounding, times

LAYERS = 6


def noisy_rows(tensor: str, size: float) -> Change:
    """Rows of all layers but the first are off by noise that has come down to them, without a direction."""
    rng = np.random.default_rng(11)

    def changed(site: Site, array: Array) -> Array:
        if site.arm not in {"D", "D'"} or site.tensor != tensor or not site.layer:
            return array
        return (array.astype(np.float64) + size * rng.standard_normal(array.shape)).astype(array.dtype)

    return changed


def test_one_tap_is_found_where_noise_of_the_others_buries_it_in_the_pool():
    change = both(at("v_cache", times(1.006)), noisy_rows("v_cache", 0.05), behind("x_out"))
    found = judged(change, layers=LAYERS)
    (match,) = found.matches
    assert (match.layer, match.tensor, match.cause) == (0, "v_cache", "cache_scale")
    assert match.places == ((0, 0, "v_cache"),)
    assert found.verdict is Verdict.MISMATCH


@pytest.mark.parametrize(("looks", "found"), [(2, True), (1000, False)])
def test_a_tap_alone_must_be_clearer_the_more_taps_there_are(looks, found):
    """34 elements move one way and 2 the other: 5.3 standard errors, which one of a thousand taps has by chance."""
    on = SimpleNamespace(roundoff=lambda _: U, facts=SimpleNamespace(dtype="bfloat16"))
    lean = _Projection((0, 0, "v_cache"), np.repeat([1.0, -1.0], [34, 2]), 32 / 0.01)
    noise = _Projection((0, 1, "v_cache"), np.tile([900.0, -900.0], 20), 1e6)
    match = _clearest("v_cache", "all", [lean, noise], looks, on)
    assert (match is not None) is found
    if match is not None:
        assert match[1].places == ((0, 0, "v_cache"),)


def test_rows_that_repeat_from_step_to_step_are_no_new_evidence():
    """The same rows at four steps: pooled they would double their standard errors."""
    signs = np.where(np.random.default_rng(4).permutation(640) < 320 + 36, 1.0, -1.0)  # 2.8 standard errors, once

    def lean(site: Site, array: Array) -> Array:
        if (site.arm, site.tensor) != ("D", "v_cache"):
            return array
        values = array.astype(np.float64).reshape(-1)
        values[: signs.size] *= 1 + 4 * U * signs
        return values.reshape(array.shape).astype(array.dtype)

    assert not judged(lean, layers=1, steps=4).matches


@pytest.mark.parametrize("factor", [1 + 2.5 * U, 1 - 2.5 * U])
@pytest.mark.parametrize("arms", [("D", "D'"), ("E7",)])
def test_a_branch_that_is_a_little_too_large_is_found_in_decode_and_in_a_longer_prefill(factor, arms):
    found = judged(at("mlp_out", times(factor), arms=arms))
    assert found.verdict is Verdict.MISMATCH, found.reason
    first = found.first_failure
    assert first is not None
    assert (first.layer, first.tensor, first.arm) == (0, "mlp_out", arms[0])
    assert first.excess < 1, "the floor alone does not see it"


def test_what_the_rounding_of_one_hidden_unit_can_do_is_no_match():
    """A unit that outweighs the others moves the whole result along itself as it is rounded."""
    found = judged(both(at("mlp_out", times(1 + (LEAST_SHARE["mlp_out"] - 0.3) * U)), behind("x_out")))
    assert not found.matches
    assert found.verdict is Verdict.STRUCTURAL_DRIFT


def test_a_branch_with_other_inputs_is_left_to_the_floor():
    change = both(at("ffn_norm", one_rounding), at("mlp_out", times(1 + 2.5 * U)), behind("x_out"))
    assert "mlp_out" not in {match.tensor for match in judged(change).matches}


@pytest.mark.parametrize("tensor", ["attn_scores", "v_cache", "k_cache"])
def test_a_scale_in_longer_prefills_alone_is_found_and_their_controls_make_no_floor(tensor):
    found = judged(at(tensor, times(1.006), arms=("E7",)))
    assert found.verdict is Verdict.MISMATCH, found.reason
    first = found.first_failure
    assert first is not None
    assert (first.phase, first.tensor) == ("prefill_ext", tensor)
    assert first.local is not None or (first.match is not None and abs(first.match.z) > MIN_Z)
    assert not [c for c in found.cells if c.floor.source == "arm E7"]


@pytest.mark.parametrize(("tensor", "found"), [("attn_norm", False), ("v_cache", True)])
def test_a_norm_alone_tells_nothing(tensor, found):
    """`benign:reversed_keys/mistral/bfloat16/eager/n64/k1/s0`: one of many norms stood 0.2 % high, 5.3 errors clear."""
    on = SimpleNamespace(
        roundoff=lambda _: U, facts=SimpleNamespace(dtype="bfloat16"), pairs={}, reference=lambda *_: None,
        constant=lambda *_: None,
    )  # fmt: skip
    lean = _Projection((0, 0, tensor), np.ones(64), 64 / 0.01)
    noise = _Projection((0, 1, tensor), np.tile([900.0, -900.0], 20), 1e6)
    assert (_clearest(tensor, "all", [lean, noise], 2, on) is not None) is found
