"""The floor: measured by the controls, pooled over neighbours, never below rounding, never raised by a guilty arm."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from driftprobe.compare import NoPayloads, pair
from driftprobe.fingerprint import UNIT_ROUNDOFF
from driftprobe.floor import (
    BOUND_WITH_NOISE,
    BOUND_WITHOUT_NOISE,
    LIMIT,
    NEIGHBOURS,
    SUM_BOUND,
    UNKNOWN_DTYPE,
    UNRELATED,
    Floors,
    innocent,
    is_control,
    measure_floors,
    multiple_without_noise,
)
from driftprobe.impact import RMS_TO_MAX
from driftprobe.plan import EXTENSIONS, NOISE_ARMS
from driftprobe.trace import Trace
from make_trace import CONTROLS, Change, bare, both, drifting, toy, unchanged

U = UNIT_ROUNDOFF["float32"]
NOISE = (*CONTROLS, "N1", "N2")


def floors_of(change: Change = unchanged, **more: object) -> Floors:
    trace, _ = toy(change, **more)  # type: ignore[arg-type]
    return of_trace(trace)


def of_trace(trace: Trace) -> Floors:
    none = NoPayloads()
    arms = {record.arm for record in trace.records if is_control(record.arm)}
    controls = {arm: pair(trace, arm[:-1] if "'" in arm else "P", arm, none).matched for arm in sorted(arms)}
    return measure_floors(trace.header, pair(trace, "P", "D", none).matched, controls)


def one_tap(arm: str, layer: int, tensor: str, size: float) -> Change:
    """An arm is off at one tap alone."""
    hit = drifting(size, (arm,), (layer, tensor))
    return lambda site, array: hit(site, array) if (site.layer, site.tensor) == (layer, tensor) else array


# ---- the bound


@pytest.mark.parametrize(("layer", "tensor", "depth"), [(0, "x_in", 0), (3, "x_in", 3), (None, "embed", 0)])
def test_without_noise_arms_the_bound_grows_with_the_root_of_the_depth(layer, tensor, depth):
    floor = floors_of(layers=4).by_place[(layer, tensor)]
    assert floor.value == pytest.approx((BOUND_WITHOUT_NOISE + SUM_BOUND) * math.sqrt(1 + depth) * U)
    assert floor.source.endswith("u of float32")


def test_the_output_is_as_deep_as_all_layers_also_where_the_header_does_not_count_them():
    expected = (BOUND_WITHOUT_NOISE + SUM_BOUND) * math.sqrt(1 + 4) * U
    assert floors_of(layers=4).by_place[(None, "logits")].value == pytest.approx(expected)
    assert floors_of(layers=4, facts={"layers": 0}).by_place[(None, "logits")].value == pytest.approx(expected)


def test_with_noise_arms_the_bound_is_the_same_at_every_depth():
    floors = floors_of(layers=4, arms=NOISE)
    assert {floor.value for floor in floors.by_place.values()} == {BOUND_WITH_NOISE * U}


def test_the_limit_is_a_multiple_of_the_floor():
    floor = floors_of().by_place[(0, "x_in")]
    assert floor.limit == LIMIT * floor.value


# ---- the coarsest dtype


def test_the_models_own_dtype_sets_the_bound():
    coarse = BOUND_WITHOUT_NOISE * UNIT_ROUNDOFF["float16"] + SUM_BOUND * U  # sums stay in float32
    assert floors_of(dtype="float16").by_place[(0, "x_in")].value == pytest.approx(coarse)
    fine = (BOUND_WITHOUT_NOISE + SUM_BOUND) * UNIT_ROUNDOFF["float64"]  # and here in float64
    assert floors_of(dtype="float64").by_place[(0, "x_in")].value == pytest.approx(fine)


def test_a_declared_cast_counts_everywhere():
    floors = floors_of(facts={"casts": {"matmul": "bfloat16"}})
    assert {f.source.split(" of ")[1] for f in floors.by_place.values()} == {"bfloat16"}


def test_a_cast_at_a_tap_counts_from_there_on():
    floors = floors_of(facts={"casts": {"k_cache": "float8_e4m3fn"}})
    assert floors.by_place[(0, "k_rope")].source.endswith("of float32")
    for where in ((0, "k_cache"), (0, "attn_ctx"), (1, "x_in"), (None, "logits")):
        assert "float8_e4m3fn (cast at layer 0 k_cache)" in floors.by_place[where].source


def test_an_integer_grid_counts_as_half_of_its_step_where_it_is_declared():
    floors = floors_of(facts={"casts": {"k_cache": "int8"}}, arms=NOISE)
    assert floors.by_place[(0, "k_rope")].source.endswith("of float32")
    assert floors.by_place[(0, "attn_ctx")].value == BOUND_WITH_NOISE * 0.5 / 127


def test_an_integer_tensor_that_was_recorded_is_no_cast():
    def whole(site, array):
        return array.astype("int8") if site.tensor == "k_cache" else array

    assert floors_of(whole).by_place[(0, "attn_ctx")].source.endswith("of float32")


def test_the_caches_own_dtype_counts_without_a_declaration():
    def halved(site, array):
        return array.astype("float16") if site.tensor in {"k_cache", "v_cache"} else array

    floors = floors_of(halved)
    assert floors.by_place[(0, "q_proj")].source.endswith("of float32")
    assert "float16 (recorded at layer 0 k_cache)" in floors.by_place[(0, "attn_scores")].source


def test_a_finer_tensor_does_not_lower_the_bound():
    floors = floors_of(lambda site, array: array.astype("float64") if site.tensor == "attn_scores" else array)
    assert floors.by_place[(0, "attn_scores")].source.endswith("of float32")


def test_a_dtype_that_nobody_says_is_assumed_to_be_coarse():
    trace, _ = toy()
    floor = of_trace(bare(trace)).by_place[(0, "x_in")]
    assert floor.value == multiple_without_noise(UNKNOWN_DTYPE, 0) * UNIT_ROUNDOFF[UNKNOWN_DTYPE]
    assert "assumed" in floor.source


# ---- the controls


@pytest.mark.parametrize("arm", ["P'", "D'", "E1", "E7"])
def test_an_innocent_control_raises_the_floor_to_its_drift(arm):
    size = 2 * (BOUND_WITHOUT_NOISE + SUM_BOUND) * U
    floor = floors_of(one_tap(arm, 0, "q_proj", size)).by_place[(0, "q_proj")]
    assert floor.value == pytest.approx(size, rel=0.4)
    assert floor.source == f"arm {arm}"


def test_the_floor_is_pooled_over_neighbouring_layers_and_no_further():
    size = 3 * (BOUND_WITHOUT_NOISE + SUM_BOUND) * U * math.sqrt(5)
    floors = floors_of(one_tap("E1", 4, "q_proj", size), layers=9).by_place
    raised = {layer for layer in range(9) if floors[(layer, "q_proj")].source == "arm E1"}
    assert raised == set(range(4 - NEIGHBOURS, 4 + NEIGHBOURS + 1))
    assert floors[(4, "k_proj")].source != "arm E1"


def test_a_neighbour_behind_a_coarser_cast_raises_no_floor_before_it():
    """Layer 1 is behind the cast in layer 0's attention, and its noise is the cast's; layer 0's projections are not."""
    noisy = both(one_tap("N1", 1, "q_proj", 5e-3), one_tap("N1", 2, "attn_ctx", 1e-2))
    floors = floors_of(noisy, arms=NOISE, layers=4, facts={"casts": {"attn_scores": "float16"}}).by_place
    assert floors[(0, "q_proj")].source.endswith("of float32")
    assert [floors[(layer, "q_proj")].source for layer in (1, 2)] == ["arm N1", "arm N1"]
    assert [floors[(layer, "attn_ctx")].source for layer in (1, 2, 3)] == ["arm N1", "arm N1", "arm N1"]


def test_noise_raises_the_bound_as_well_as_the_floor():
    floors = floors_of(one_tap("N1", 0, "q_proj", 1e-3), arms=NOISE)
    assert floors.by_place[(0, "q_proj")].value == pytest.approx(1e-3, rel=0.3)
    assert floors.bounds[(0, "q_proj")].source == "arm N1"


@pytest.mark.parametrize(("noise", "value"), [(0.2, 0.2), (0.3, UNRELATED), (1.0, UNRELATED), (2.0, 2.0)])
def test_where_rounding_may_change_the_whole_tensor_two_unrelated_ones_are_the_floor(noise, value):
    floor = floors_of(one_tap("N1", 0, "q_proj", noise), arms=NOISE).by_place[(0, "q_proj")]
    assert floor.value == (value if value == UNRELATED else pytest.approx(value, rel=0.3))  # a sketch measures it
    assert ("unrelated" in floor.source) is (value == UNRELATED)


def test_a_control_that_rounding_cannot_explain_raises_no_floor_anywhere():
    """Not at its worst tap, nor where its fault has shrunk to a size that rounding would explain."""
    guilty = both(one_tap("E1", 0, "attn_scores", 0.1), one_tap("E1", 1, "q_proj", 100 * U))
    floors = floors_of(guilty)
    assert {floor.source for floor in floors.by_place.values() if floor.source.startswith("arm")} == set()
    assert floors_of(one_tap("E1", 1, "q_proj", 100 * U)).by_place[(1, "q_proj")].source == "arm E1"


def test_innocence_is_judged_by_the_bound_not_by_the_floor():
    trace, _ = toy(one_tap("E1", 0, "q_proj", 0.1))
    floors = of_trace(trace)
    pairs = pair(trace, "P", "E1", NoPayloads()).matched
    assert [(p.reference.layer, p.reference.tensor) for p in pairs if not innocent(p, floors)] == [(0, "q_proj")]


def test_a_control_that_is_not_finite_raises_no_floor():
    floors = floors_of(lambda site, array: array * math.nan if site.arm == "N1" else array, arms=NOISE)
    assert all(math.isfinite(floor.value) for floor in floors.by_place.values())


def test_a_control_whose_drift_is_not_told_is_not_held_against_it():
    trace, _ = toy(one_tap("E1", 0, "q_proj", 0.1))
    hashed = tuple(replace(r, sketch=None, l2=None, abs_sum=None) for r in trace.records)
    floors = of_trace(replace(trace, records=hashed))
    pairs = pair(replace(trace, records=hashed), "P", "E1", NoPayloads()).matched
    assert all(innocent(p, floors) for p in pairs)


@pytest.mark.parametrize(("arm", "control"), [("P'", True), ("D'", True), ("E31", True), ("N2", True), ("P", False),
                                              ("A", False), ("B", False), ("East", False), ("N", False)])  # fmt: skip
def test_what_a_control_is(arm, control):
    assert is_control(arm) is control


# ---- the doc


def test_the_page_names_the_constants_as_they_are():
    page = (Path(__file__).parents[1] / "docs" / "how-it-decides.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| (\S+) \|$", page, flags=re.MULTILINE))
    constants = {"LIMIT": LIMIT, "BOUND_WITH_NOISE": BOUND_WITH_NOISE, "BOUND_WITHOUT_NOISE": BOUND_WITHOUT_NOISE,
                 "SUM_BOUND": SUM_BOUND, "NEIGHBOURS": NEIGHBOURS}  # fmt: skip
    assert table == {name: f"{value:g}" for name, value in constants.items()} | {"UNKNOWN_DTYPE": UNKNOWN_DTYPE}
    assert f"`RMS_TO_MAX` ({RMS_TO_MAX:g})" in page
    assert ", ".join(f"E{m}" for m in EXTENSIONS) in page
    assert ", ".join(f"N{i + 1}" for i in range(NOISE_ARMS)) in page
