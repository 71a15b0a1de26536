"""Impact on the logits: KL, the largest difference, the chosen token, and what kind of flip it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from driftprobe.compare import NoPayloads, drift_between
from driftprobe.floor import Floor
from driftprobe.impact import RMS_TO_MAX, measure_impact, rounding_of_a_logit, worst_impact
from driftprobe.judgement import Cell, Impact, Status
from make_trace import Arrays, Site, toy_record

FLOOR = Floor(1e-3, "test")


def cell(p: object, d: object) -> tuple[Cell, Arrays]:
    """A pair of logits as a cell, with its whole tensors."""
    arrays = [np.asarray(x, np.float32).reshape(1, -1) for x in (p, d)]
    left, right = (toy_record(Site(arm, 0, None, "logits"), a) for arm, a in zip("PD", arrays, strict=True))
    whole = Arrays({left.key: arrays[0], right.key: arrays[1]})
    drift = drift_between(left, right, NoPayloads())
    return Cell("p0", 0, None, "logits", drift, FLOOR, Status.PASS, left, right), whole


def impact(p: object, d: object, whole: bool = True) -> Impact:
    item, arrays = cell(p, d)
    found = measure_impact([item], arrays if whole else NoPayloads())
    assert found is not None
    return found


def test_kl_by_hand():
    p, d = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    found = impact(p, d)
    assert found.kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), rel=1e-6)
    assert found.max_abs_dlogit == pytest.approx(math.log(2), rel=1e-6)
    assert found.margin == pytest.approx(math.log(2), rel=1e-6)


@given(hnp.arrays(np.float32, 9, elements=st.floats(-50, 50, width=32)), st.floats(-5, 5, width=32))
def test_kl_is_never_negative_and_does_not_see_a_constant(p, shift):
    assert impact(p, p[::-1].copy()).kl >= 0
    assert impact(p, p + np.float32(shift)).kl == pytest.approx(0, abs=1e-5)


def test_no_flip():
    found = impact([3, 1, 0], [2.5, 1, 0])
    assert (found.top1_agree, found.flip) == (True, "none")


def test_the_margin_decides_between_a_tie_and_a_confident_flip():
    rounding = rounding_of_a_logit(cell([3, 3, 0], [3, 3, 0])[0])
    assert rounding == pytest.approx(2 * RMS_TO_MAX * FLOOR.value * math.sqrt(18 / 3))
    near, far = rounding * 0.9, rounding * 1.1
    assert impact([3 + near, 3, 0], [3, 3 + near, 0]).flip == "tie flip"
    assert impact([3 + far, 3, 0], [3, 3 + far, 0]).flip == "confident flip"


def test_the_heads_of_the_logits_do_where_there_are_no_payloads():
    found = impact([5, 1, 0, 0, 0], [1, 5, 0, 0, 0], whole=False)
    assert (found.kl, found.top1_agree, found.margin, found.flip) == (None, False, 4.0, "confident flip")
    assert found.max_abs_dlogit == 4.0


def test_equal_logits_need_nothing_more():
    found = impact([5, 1, 0], [5, 1, 0], whole=False)
    assert (found.kl, found.max_abs_dlogit, found.top1_agree, found.flip) == (0.0, 0.0, True, "none")


def test_a_flip_of_logits_of_unknown_size_is_not_called_confident():
    item, _ = cell([5, 1, 0], [1, 5, 0])
    from dataclasses import replace

    bare = replace(item, reference=replace(item.reference, l2=None))
    found = measure_impact([bare], NoPayloads())
    assert found is not None
    assert (found.top1_agree, found.flip) == (False, "unknown")


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_a_finding_not_a_crash(odd):
    found = impact([1, 2, 3], [1, odd, 3])
    assert (found.kl, found.max_abs_dlogit, found.top1_agree, found.flip) == (None, math.inf, None, "unknown")


def test_no_logits_no_impact():
    assert measure_impact([], NoPayloads()) is None


def test_a_flip_is_worse_than_a_large_difference():
    small_flip = Impact(0.1, 0.1, False, 0.0, "tie flip")
    large = Impact(1.0, 9.0, True, 2.0, "none")
    sure = Impact(0.2, 0.2, False, 1.0, "confident flip")
    assert worst_impact([large, None, small_flip]) == small_flip
    assert worst_impact([small_flip, sure, large]) == sure
    assert worst_impact([None]) is None
