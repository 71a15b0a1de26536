"""The local test: what an op with equal inputs may differ by, and what it may not; and the matched filters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from driftprobe.compare import NoPayloads, pair
from driftprobe.fingerprint import Array
from driftprobe.judgement import Status, TraceJudgement, Verdict
from driftprobe.local import LOCAL_LIMIT, Ground, bench, own_rounding
from driftprobe.matched import MIN_Z, match_filters
from driftprobe.verdict import judge_trace
from make_trace import Change, Site, both, drifting, rotated, scaled, toy, unchanged

BF16 = np.dtype(ml_dtypes.bfloat16)
FACTS = {"accumulate": "float32"}
U = 2.0**-8


def at(
    tensor: str, change: Callable[[Array], Array], layer: int | None = 0, arms: tuple[str, ...] = ("D", "D'")
) -> Change:
    """Arms hold another tensor at one tap of step 0, and nothing else changes."""

    def changed(site: Site, array: Array) -> Array:
        here = site.arm in arms and (site.layer, site.tensor, site.step) == (layer, tensor, 0)
        return change(array) if here else array

    return changed


def behind(tensor: str, size: float = 1e-3) -> Change:
    """What follows a tap in layer 0 differs too, as it does in a real engine; far under any floor."""

    def changed(site: Site, array: Array) -> Array:
        here = site.arm in {"D", "D'"} and site.layer == 0 and site.tensor == tensor
        return added(size)(array) if here else array

    return changed


def one_rounding(array: Array) -> Array:
    """Every second element one unit in the last place away, up or down: two kernels that round a sum differently."""
    raw = array.view(np.int16).copy()
    flat = raw.reshape(-1)
    flat[::4] += 1
    flat[2::4] -= 1
    return raw.view(BF16)


def added(size: float) -> Callable[[Array], Array]:
    """An error of the same size in every element, large or small: a bias, other weights."""

    def change(array: Array) -> Array:
        noise = np.random.default_rng(5).standard_normal(array.shape) * size
        return (array.astype(np.float64) + noise).astype(array.dtype)

    return change


def times(factor: float) -> Callable[[Array], Array]:
    """Every element scaled before it is rounded: what was lost in the first rounding is drawn anew."""

    def change(array: Array) -> Array:
        values = array.astype(np.float64)
        lost = np.random.default_rng(7).uniform(-0.5, 0.5, array.shape) * 2.0 ** (np.floor(np.log2(np.abs(values))) - 7)
        return ((values + lost) * factor).astype(array.dtype)

    return change


def judged(change: Change, **more: object) -> TraceJudgement:
    trace, arrays = toy(change, dtype=BF16, facts=dict(FACTS), **more)  # type: ignore[arg-type]
    return judge_trace(trace, arrays)


@pytest.mark.parametrize("tensor", ["q_proj", "attn_norm", "attn_out", "ffn_norm", "mlp_out", "x_mid"])
def test_one_rounding_an_element_is_no_failure(tensor):
    found = judged(both(at(tensor, one_rounding), behind("x_out")))
    assert found.verdict is Verdict.STRUCTURAL_DRIFT, found.reason
    cell = next(c for c in found.cells if (c.layer, c.tensor) == (0, tensor))
    assert cell.local is not None
    assert 0 < cell.local.excess < LOCAL_LIMIT


@pytest.mark.parametrize("tensor", ["q_proj", "k_proj", "attn_norm", "attn_out", "ffn_norm"])
def test_an_error_in_small_elements_too_is_a_failure_below_the_floor(tensor):
    found = judged(both(at(tensor, added(U)), behind("x_out")))
    assert found.verdict is Verdict.MISMATCH
    first = found.first_failure
    assert first is not None
    assert (first.layer, first.tensor) == (0, tensor)
    assert first.excess < 1, "the floor alone does not see it"
    assert first.local is not None
    assert first.local.excess > LOCAL_LIMIT
    assert "its own rounding is exceeded" in found.reason


def test_the_floor_is_named_where_the_floor_tells():
    first = judged(drifting(0.5, start=(0, "q_proj"))).first_failure
    assert first is not None
    assert first.excess > 4
    assert first.local is None


def test_an_op_whose_inputs_differ_is_left_to_the_floor():
    found = judged(both(at("attn_norm", one_rounding), at("q_proj", added(U)), behind("x_out")))
    assert found.verdict is Verdict.STRUCTURAL_DRIFT
    assert next(c for c in found.cells if (c.layer, c.tensor) == (0, "q_proj")).local is None


@pytest.mark.parametrize(("facts", "dtype"), [({}, BF16), (FACTS, np.float32)])
def test_no_local_test_where_the_rounding_is_not_known(facts, dtype):
    """Sums kept in nobody knows what, or as coarse as what is stored."""
    trace, arrays = toy(
        at("q_proj", times(1 + 1e-6) if dtype == np.float32 else added(U)), dtype=dtype, facts=dict(facts)
    )
    pairs = pair(trace, "P", "D", arrays).matched
    on = bench(trace, pairs, arrays)
    tested = next(p for p in pairs if (p.reference.layer, p.reference.tensor) == (0, "q_proj"))
    assert not tested.drift.equal
    assert own_rounding(tested, on) is None


def test_no_local_test_without_whole_tensors():
    trace, _ = toy(at("q_proj", added(U)), dtype=BF16, facts=dict(FACTS))
    assert judge_trace(trace, NoPayloads()).verdict is Verdict.STRUCTURAL_DRIFT


def test_a_declared_cast_makes_the_op_coarser():
    change = both(at("attn_scores", times(1.0)), at("q_proj", added(2 * U)), behind("x_out"))
    assert judged(change).verdict is Verdict.MISMATCH
    trace, arrays = toy(change, dtype=BF16, facts={**FACTS, "casts": {"matmul": "float8_e5m2"}})
    assert judge_trace(trace, arrays).verdict is Verdict.STRUCTURAL_DRIFT


def test_a_longer_prefill_with_an_op_that_differs_is_guilty():
    found = judged(at("q_proj", added(U), arms=("E7",)))
    assert found.verdict is Verdict.MISMATCH
    first = found.first_failure
    assert first is not None
    assert (first.phase, first.arm, first.layer, first.tensor) == ("prefill_ext", "E7", 0, "q_proj")
    assert first.local is not None


@pytest.mark.parametrize(
    ("tensor", "cause"),
    [
        ("attn_scores", "score_scale"),
        ("k_cache", "cache_scale"),
        ("v_cache", "cache_scale"),
        ("attn_norm", "norm_epsilon"),
    ],
)
@pytest.mark.parametrize("factor", [1.004, 0.996])
def test_a_scale_below_the_floor_is_found_by_its_direction(tensor, cause, factor):
    found = judged(both(at(tensor, times(factor)), behind("x_out")))
    assert found.verdict is Verdict.MISMATCH, found.reason
    (match,) = found.matches
    assert (match.tensor, match.layer, match.cause) == (tensor, 0, cause)
    assert match.share == pytest.approx(factor - 1, rel=0.25)
    assert abs(match.z) > MIN_Z
    assert found.first_failure is not None
    assert found.first_failure.match == match
    assert "standard errors" in found.reason


def test_the_pool_finds_what_one_layer_cannot():
    one = judged(both(at("attn_scores", times(1.00105), 0), behind("x_out")))
    assert not one.matches
    change = both(*(at("attn_scores", times(1.00105), layer) for layer in range(8)), behind("x_out"))
    many = judged(change, layers=8)
    assert [m.tensor for m in many.matches] == ["attn_scores"]
    assert len(many.matches[0].places) == 8


def test_roundings_without_a_direction_are_no_match():
    rng = np.random.default_rng(3)

    def shaken(array: Array) -> Array:
        return (array.astype(np.float64) * (1 + U * rng.uniform(-1, 1, array.shape))).astype(array.dtype)

    change = both(
        *(at(tensor, shaken, layer) for layer in range(4) for tensor in ("attn_scores", "k_cache", "v_cache"))
    )
    found = judged(change, layers=4)
    assert not found.matches
    assert found.verdict is Verdict.STRUCTURAL_DRIFT


def test_the_first_tap_that_moves_is_named_and_not_one_that_only_rounds():
    change = both(at("attn_scores", one_rounding, 0), at("attn_scores", times(1.01), 1), behind("x_out"))
    found = judged(change, layers=3)
    assert [m.layer for m in found.matches] == [1]


def test_no_filter_in_a_fine_dtype():
    trace, arrays = toy(at("attn_scores", times(1.01)), facts=dict(FACTS))
    pairs = pair(trace, "P", "D", arrays).matched
    assert match_filters(pairs, bench(trace, pairs, arrays)) == ()
    coarse = replace(trace.header.engine, dtype="bfloat16")
    assert match_filters(pairs, replace(bench(trace, pairs, arrays), facts=coarse))


def first_layer(tensor: str, change: Callable[[Array], Array]) -> TraceJudgement:
    return judged(both(at(tensor, change), behind("x_out")))


@pytest.mark.parametrize("tensor", ["k_cache", "v_cache"])
def test_rows_of_the_first_layer_may_differ_by_a_rounding_and_by_no_more(tensor):
    """Rows that lost bits under the floor of bfloat16, and rows that two kernels have rounded differently."""
    coarse = first_layer(tensor, added(6 * U))
    assert coarse.verdict is Verdict.MISMATCH
    assert coarse.first_failure is not None
    assert (coarse.first_failure.layer, coarse.first_failure.tensor) == (0, tensor)
    assert coarse.first_failure.excess < 4
    assert first_layer(tensor, one_rounding).verdict is Verdict.STRUCTURAL_DRIFT


def test_rows_of_later_layers_and_of_a_declared_cache_are_left_to_the_floor():
    to_fp8 = lambda array: array.astype(ml_dtypes.float8_e4m3fn).astype(array.dtype)  # noqa: E731
    change = both(at("k_cache", to_fp8, 1), behind("x_out"))
    assert not [c for c in judged(change).cells if c.local is not None and c.tensor == "k_cache"]
    trace, arrays = toy(both(at("k_cache", to_fp8), behind("x_out")), dtype=BF16,
                        facts={**FACTS, "casts": {"k_cache": "float8_e4m3fn"}})  # fmt: skip
    assert judge_trace(trace, arrays).verdict is Verdict.STRUCTURAL_DRIFT


def test_one_head_that_is_scaled_is_named_with_its_factor():
    def one_head(array: Array) -> Array:
        changed = array.copy()
        changed[:, 1] = times(1.006)(array[:, 1])
        return changed

    found = judged(both(at("v_cache", one_head, 1), behind("x_out")))
    (match,) = found.matches
    assert (match.cause, match.parameters["head"]) == ("cache_head_scale", 1)
    assert match.parameters["factor"] == pytest.approx(1.006, abs=1e-3)


def test_few_elements_that_are_far_off_are_not_lost_among_many_that_are_equal():
    def one_element(array: Array) -> Array:
        changed = array.copy()
        changed.reshape(-1)[3] = (float(changed.reshape(-1)[3]) * 1.08).__float__()
        return changed

    found = judged(both(at("q_proj", one_element), behind("x_out")))
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert found.first_failure.excess < 1


@pytest.mark.parametrize("tensor", ["attn_scores", "attn_ctx"])
def test_shapes_that_do_not_go_together_are_left_to_the_floor(tensor):
    """The toy's scores are over no keys of its own: no rounding is known, and nothing fails for it."""
    found = judged(both(at(tensor, one_rounding), behind("x_out")))
    assert next(c for c in found.cells if (c.layer, c.tensor) == (0, tensor)).local is None


def test_the_smallest_numbers_of_float16_may_be_off_by_one_of_them():
    half = np.dtype(np.float16)

    def tiny(site: Site, array: Array) -> Array:
        if site.tensor != "attn_probs" or site.layer != 0:
            return array
        probs = np.full(array.shape, 2.0**-24, half)
        probs.reshape(-1)[0] = 1.0
        if site.arm in {"D", "D'"}:
            probs.reshape(-1)[1] = 2.0**-23
        return probs

    trace, arrays = toy(both(tiny, behind("x_out")), dtype=half, facts=dict(FACTS))
    assert judge_trace(trace, arrays).verdict is Verdict.STRUCTURAL_DRIFT


def test_a_norm_that_gives_nothing_is_no_epsilon():
    found = judged(both(at("attn_norm", lambda array: array * 0), drifting(0.5, start=(0, "q_proj"))))
    assert found.verdict is Verdict.MISMATCH
    assert "norm_epsilon" not in {match.cause for match in found.matches}


def test_a_declared_cache_may_lean_as_its_grid_does():
    """Rounding to few steps takes small elements to zero: all of them towards it, and no scale is wrong."""

    def to_int8(array: Array) -> Array:
        values = array.astype(np.float64)
        step = np.abs(values).max(axis=-1, keepdims=True) / 60
        return (np.trunc(values / step) * step).astype(array.dtype)

    change = both(*(at("k_cache", to_int8, layer) for layer in range(4)), behind("x_out"))
    trace, arrays = toy(change, layers=4, dtype=BF16, facts={**FACTS, "casts": {"k_cache": "int8"}})
    assert not judge_trace(trace, arrays).matches
    undeclared, more = toy(change, layers=4, dtype=BF16, facts=dict(FACTS))
    assert judge_trace(undeclared, more).verdict is Verdict.MISMATCH


@pytest.mark.parametrize(("size", "leans"), [(4.0073, True), (3.995, True), (1.001, True), (4.1, False), (5.7, False)])
def test_a_norm_whose_factor_is_nearly_a_power_of_two_rounds_all_one_way_and_is_not_filtered(size, leans):
    """x / 4.0073 in bfloat16 is x / 4 for every x: the rounding itself moves all elements by one share."""
    from types import SimpleNamespace

    from driftprobe.matched import _leans

    x = np.random.default_rng(0).normal(size=(1, 64)).astype(ml_dtypes.bfloat16).astype(np.float64)
    x = x / np.sqrt(np.square(x).mean()) * size
    constants = {"ffn_norm.eps": np.zeros(1), "ffn_norm.centred": np.zeros(1)}
    on = SimpleNamespace(constant=lambda _, name: constants[name], facts=SimpleNamespace(dtype="bfloat16"))
    assert bool(_leans(x, (0, 0, "ffn_norm"), on).any()) is leans


ROUNDED_WEIGHTS = {"casts": {"q_proj": "bfloat16"}}
"""An engine in float32 whose products round what they are given: llama.cpp with a file of BF16."""


def of_rotation(
    q_proj: float, q_rope: float, facts: dict[str, object], layer: int = 0, rotation: Change = rotated
) -> TraceJudgement:
    """Judge an engine in float32 whose query is off by one share before its rotation and another behind it."""
    wrong = both(at("q_proj", lambda array: scaled(array, q_proj), layer),
                 at("q_rope", lambda array: scaled(array, q_rope), layer))  # fmt: skip
    trace, arrays = toy(both(rotation, wrong, behind("x_out")), facts=dict(facts))
    return judge_trace(trace, arrays)


def test_a_rotation_keeps_distances_behind_a_cast_that_hides_it():
    found = of_rotation(1e-7, 0.1, ROUNDED_WEIGHTS)
    first = found.first_failure
    assert first is not None
    assert (first.layer, first.tensor, first.local and first.local.ground) == (0, "q_rope", Ground.ROTATION)
    assert first.excess < 4
    assert "under the limit of" in found.reason
    assert "a rotation keeps distances" in found.reason


@pytest.mark.parametrize(("q_proj", "q_rope"), [(0.05, 0.05), (0.05, 0.1), (0.0, 1e-6)])
def test_a_rotation_may_pass_its_inputs_difference_on_and_round(q_proj, q_rope):
    assert of_rotation(q_proj, q_rope, ROUNDED_WEIGHTS).verdict is Verdict.STRUCTURAL_DRIFT


@pytest.mark.parametrize("casts", [{}, {"q_proj": "bfloat16", "q_rope": "bfloat16"}])
def test_a_rotation_is_left_to_the_floor_where_that_is_its_own(casts):
    """Without a coarser cast the floor is fine; one that is declared of the rotation itself is its own rounding."""
    found = of_rotation(1e-7, 0.01, {"casts": casts})
    cell = next(c for c in found.cells if (c.layer, c.tensor) == (0, "q_rope"))
    assert cell.local is None if not casts else cell.local is not None and cell.local.excess < LOCAL_LIMIT
    assert cell.status is (Status.PASS if casts else Status.FAIL)


def test_where_something_stands_between_a_projection_and_its_rotation_distances_tell_nothing():
    """The toy's own q_rope has nothing to do with its q_proj: a norm that nobody recorded, say."""
    found = of_rotation(1e-7, 0.1, ROUNDED_WEIGHTS, rotation=unchanged)
    assert next(c for c in found.cells if (c.layer, c.tensor) == (0, "q_rope")).local is None
    assert found.verdict is Verdict.STRUCTURAL_DRIFT
