"""explain(): what is no number has no prediction, and of predictions that leave nothing the simplest is told."""

from __future__ import annotations

import numpy as np
import pytest

from driftprobe.diagnose import diagnose
from driftprobe.explain import PERFECT, _rank
from driftprobe.fingerprint import Array
from driftprobe.hypotheses import Prediction
from driftprobe.judgement import Diagnosis, Verdict
from driftprobe.verdict import judge
from make_trace import Site, toy


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("tensor", ["q_rope", "k_cache", "attn_norm", "logits"])
def test_a_tensor_with_nan_or_infinity_is_a_mismatch_without_a_cause(odd, tensor):
    def broken(site: Site, array: Array) -> Array:
        if site.arm in {"D", "D'", "A"} and site.tensor == tensor and site.layer in (0, None):
            array = array.copy()
            array.reshape(-1)[0] = odd
        return array

    trace, arrays = toy(broken, mode="kv_aligned")
    found = diagnose(judge([trace], arrays), [trace], arrays)
    assert found.verdict in {Verdict.MISMATCH, Verdict.NOT_AVAILABLE}
    first = found.first_failure
    assert first is None or first.diagnosis is None


def test_of_two_perfect_predictions_the_one_that_fits_fewer_numbers_is_told():
    def ranked(residual: float, explained: float, fitted: int) -> tuple[bool, float, int, float]:
        prediction = Prediction("cache_zero", {}, 0, "k_cache", np.zeros(64), fitted)
        return _rank(prediction, Diagnosis("cache_zero", {}, 0, "k_cache", residual, explained))

    assert ranked(2e-16, 1.0, 0) < ranked(0.0, 1.0, 32)
    assert ranked(1e-3, 1.0 - 1e-2, 1) < ranked(2e-3, 1.0 - 2e-2, 0), "under noise the smaller residual decides"
    assert ranked(1.0, 1.0 - PERFECT / 2, 64) > ranked(1.0, 0.99, 0), "a free number for every element comes last"
