"""pair() leaves nothing out, and each rung of evidence says what it can: hash, payload, sketch, moments."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from driftprobe.compare import EQUAL, Drift, NoPayloads, Pair, drift_between, exact_drift, pair, ratio
from driftprobe.fingerprint import Array, fingerprint, l2_norm
from driftprobe.taps import execution_order
from driftprobe.trace import Header, Record, Trace
from make_trace import Arrays, Change, Site, both, drifting, toy, without

FLOATS = st.floats(-1e6, 1e6, width=32)
MOMENTS = ("nz_count", "abs_sum", "l2", "nan_count", "inf_count", "shape", "dtype")


def two(p: Array, d: Array, *kept: str, tensor: str = "x_in") -> tuple[Record, Record]:
    """Records of two tensors with their hashes and the fields named."""
    records = []
    for arm, array in (("P", p), ("D", d)):
        print_of = asdict(fingerprint(np.asarray(array)))
        known = {name: print_of[name] for name in kept}
        records.append(Record(prompt="p", phase="x", layer=0, tensor=tensor, arm=arm, hash=print_of["hash"], **known))
    return records[0], records[1]


def on_rung(rung: str, p: Array, d: Array) -> float | None:
    """The drift as one rung sees it."""
    left, right = two(p, d, *MOMENTS, *(["sketch"] if rung == "sketch" else []))
    whole = Arrays({left.key: np.asarray(p), right.key: np.asarray(d)}) if rung == "payload" else NoPayloads()
    found = drift_between(left, right, whole)
    assert found.rung in {rung, "hash"}
    return found.at_least


def arrays(size: int = 8) -> st.SearchStrategy[Array]:
    return hnp.arrays(np.float32, size, elements=FLOATS)


# ---- pairing


def test_every_record_of_both_sides_is_paired_in_execution_order():
    trace, whole = toy(steps=2)
    found = pair(trace, "P", "D", whole)
    assert len(found.matched) == sum(record.arm == "D" for record in trace.records)
    assert found.unpaired == ()
    order = [(p.reference.step, execution_order(p.reference.layer, p.reference.tensor)) for p in found.matched]
    assert order == sorted(order)


@pytest.mark.parametrize("arm", ["P", "D"])
def test_a_record_without_partner_is_left_over_on_its_side(arm):
    trace, whole = toy(without(arm=arm, layer=1, tensor="q_proj"))
    found = pair(trace, "P", "D", whole)
    left = found.only_candidate if arm == "P" else found.only_reference
    assert [(r.layer, r.tensor) for r in left] == [(1, "q_proj")]
    assert len(found.unpaired) == 1


def test_a_step_that_decode_never_ran_is_left_over():
    trace, whole = toy(without(arm="D", step=1), steps=2)
    found = pair(trace, "P", "D", whole)
    assert {record.step for record in found.matched[0:] for record in (record.reference,)} == {0}
    assert {record.step for record in found.only_reference} == {1}


def test_records_of_two_shapes_are_no_pair():
    trace, whole = toy(lambda site, array: array[:, 1:] if (site.arm, site.tensor) == ("D", "k_cache") else array)
    found = pair(trace, "P", "D", whole)
    assert {record.tensor for record in found.unpaired} == {"k_cache"}
    assert len(found.only_reference) == len(found.only_candidate) == 2


def one_more(*tensors: str, changed: float = 0.0) -> Change:
    """Decode sees a row more than prefill at these taps: of caches on the first axis, of scores on the last."""

    def change(site: Site, array: np.ndarray) -> np.ndarray:
        if site.arm != "D" or site.tensor not in tensors:
            return array
        axis = 0 if site.tensor.endswith("cache") else -1
        return np.concatenate([array + np.float32(changed), np.take(array, [0], axis)], axis)

    return change


EXTENT = ("k_cache", "v_cache", "attn_scores", "attn_probs")


def test_a_row_more_is_a_failure_of_the_scores_and_the_common_rows_are_compared():
    found = {(p.reference.layer, p.reference.tensor): p.drift for p in pairs(one_more(*EXTENT))}
    assert {found[(0, tensor)].value for tensor in ("attn_scores", "attn_probs")} == {math.inf}
    assert found[(0, "k_cache")].equal
    assert found[(0, "v_cache")].equal
    off = {(p.reference.layer, p.reference.tensor): p.drift for p in pairs(one_more(*EXTENT, changed=0.5))}
    assert 0.1 < (off[(0, "k_cache")].value or 0.0) < 1.0
    assert off[(0, "k_cache")].rung == "payload"


def test_a_row_more_that_no_score_shows_is_a_failure_of_the_rows():
    found = {(p.reference.layer, p.reference.tensor): p.drift for p in pairs(one_more("k_cache", "v_cache"))}
    assert found[(1, "k_cache")].value == math.inf
    assert found[(1, "attn_scores")].equal


def test_common_rows_without_payload_are_known_by_their_hashes_alone():
    trace, _ = toy(one_more(*EXTENT, changed=0.5))
    drifts = {p.reference.tensor: p.drift for p in pair(trace, "P", "D", NoPayloads()).matched}
    assert (drifts["k_cache"].value, drifts["k_cache"].rung) == (None, "none")


def pairs(change: Change) -> tuple[Pair, ...]:
    trace, whole = toy(change)
    found = pair(trace, "P", "D", whole)
    assert found.unpaired == ()
    return found.matched


def test_records_of_two_positions_are_no_pair():
    trace, whole = toy()
    moved = tuple(replace(r, logical_tok_idx=9) if r.arm == "D" else r for r in trace.records)
    found = pair(replace(trace, records=moved), "P", "D", whole)
    assert found.matched == ()
    assert len(found.unpaired) == len([r for r in trace.records if r.arm in {"P", "D"}])


@pytest.mark.parametrize("arm", ["P", "D"])
def test_a_record_without_position_is_paired_with_the_one_that_there_is(arm):
    trace, whole = toy()
    some = tuple(replace(r, logical_tok_idx=None) if r.arm == arm else r for r in trace.records)
    found = pair(replace(trace, records=some), "P", "D", whole)
    assert found.unpaired == ()


def test_a_second_record_of_a_place_is_left_over_not_lost():
    trace, whole = toy()
    extra = tuple(replace(r, phase="prefill_ext") for r in trace.records if (r.arm, r.tensor) == ("P", "logits"))
    found = pair(replace(trace, records=trace.records + extra), "P", "D", whole)
    assert [(r.tensor, r.phase) for r in found.only_reference] == [("logits", "prefill_ext")]


def test_k_is_never_compared_with_v():
    trace, whole = toy()
    assert all(p.reference.tensor == p.candidate.tensor for p in pair(trace, "P", "D", whole).matched)


@settings(max_examples=20, deadline=None)
@given(seed=st.randoms(use_true_random=False))
def test_order_of_records_does_not_matter_to_pairs(seed):
    trace, whole = toy(both(drifting(0.01), without(arm="D", layer=0, tensor="x_mid")), layers=1)
    records = list(trace.records)
    seed.shuffle(records)
    assert pair(replace(trace, records=tuple(records)), "P", "D", whole) == pair(trace, "P", "D", whole)


# ---- the metric


@given(p=hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_a_tensor_is_at_no_distance_from_itself(p):
    left, right = two(p, p, *MOMENTS, "sketch")
    assert drift_between(left, right, NoPayloads()) == EQUAL
    assert exact_drift(p, p).value == 0.0


@pytest.mark.parametrize("rung", ["payload", "sketch", "moments"])
@given(p=arrays(), d=arrays())
def test_drift_is_never_negative(rung, p, d):
    assert (on_rung(rung, p, d) or 0.0) >= 0.0


@given(p=arrays(64), d=arrays(64))
def test_a_sketch_with_a_bucket_for_each_element_gives_the_drift_itself(p, d):
    assert on_rung("sketch", p, d) == pytest.approx(on_rung("payload", p, d), rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(100, 20_000), drift=st.sampled_from([1e-6, 1e-3, 0.3]))
def test_payload_and_sketch_agree_within_the_sketchs_error(seed, size, drift):
    rng = np.random.default_rng(seed)
    p = rng.standard_normal(size)
    d = p + drift * rng.standard_normal(size)
    sigma = math.sqrt(2 / 64) / 2  # docs/trace-format.md, section 5: of the norm
    assert on_rung("sketch", p, d) == pytest.approx(on_rung("payload", p, d), rel=6 * sigma)


@given(p=arrays(), d=arrays(), kept=st.sets(st.sampled_from(["nz_count", "abs_sum", "l2", "shape"])))
def test_a_lower_bound_is_one_whatever_the_trace_carries(p, d, kept):
    """So moments can never call a MISMATCH that whole tensors would not."""
    left, right = two(p, d, *sorted(kept))
    bound = drift_between(left, right, NoPayloads()).at_least
    true = exact_drift(p, d).value
    assert true is not None
    assert bound is None or bound <= true * (1 + 1e-6)


def test_a_spike_shows_why_a_ratio_of_1_norms_proves_less():
    """Two tensors a 2-norm distance of 3 % apart, whose 1-norms differ by a factor of 2.9."""
    p = np.array([1.0] + [0.0] * 4096)
    d = np.array([1.0] + [1 / 2176] * 4096)
    left, right = two(p, d, "abs_sum", "shape")
    found = drift_between(left, right, NoPayloads())
    assert found.value == pytest.approx(1.88, abs=0.01)
    assert exact_drift(p, d).value == pytest.approx(0.0294, abs=1e-4)
    assert found.at_least == pytest.approx(0.0294, abs=1e-3)


def test_one_norm_alone_bounds_and_proves_nothing_without_a_size():
    left, right = two(np.ones(4), np.full(4, 3.0), "abs_sum")
    found = drift_between(left, right, NoPayloads())
    assert (found.value, found.at_least, found.lower_bound) == (2.0, 0.0, True)


def test_a_tensor_of_zeros_is_at_distance_one_without_a_size():
    left, right = two(np.ones(4), np.zeros(4), "abs_sum")
    assert drift_between(left, right, NoPayloads()).at_least == 1.0


def test_hashes_alone_say_equal_or_nothing():
    left, right = two(np.ones(3), np.zeros(3))
    assert drift_between(left, right, NoPayloads()).value is None
    assert drift_between(left, left, NoPayloads()) == EQUAL


def test_a_dtype_that_one_side_leaves_out_does_not_spoil_an_equal_hash():
    left, right = two(np.ones(3), np.ones(3), *MOMENTS)
    assert drift_between(replace(left, dtype=None), right, NoPayloads()).equal
    assert not drift_between(replace(left, dtype="int32"), right, NoPayloads()).equal


def test_a_sketch_without_l2_is_still_a_drift():
    p = np.arange(1.0, 65.0)
    left, right = two(p, p * 1.5, "sketch")
    assert drift_between(left, right, NoPayloads()).value == pytest.approx(0.5)


@pytest.mark.parametrize(("distance", "size", "expected"), [(0, 0, 0), (1, 0, math.inf), (1, 4, 0.25)])
def test_ratio(distance, size, expected):
    assert ratio(distance, size) == expected


# ---- NaN and infinity


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("p", "d"), [([1, 2], [NAN, 2]), ([NAN, 2], [1, 2]), ([1, 2], [INF, 2]), ([NAN, 2], [INF, 2]), ([1, NAN], [NAN, 1])]
)
def test_what_is_finite_on_one_side_only_is_infinitely_far(p, d):
    assert exact_drift(np.array(p), np.array(d)).value == INF


@pytest.mark.parametrize(("p", "d"), [([1, 2], [NAN, 2]), ([1, 2], [1, INF]), ([NAN, 1], [INF, 1])])
def test_counts_show_it_without_a_payload(p, d):
    left, right = two(np.array(p, float), np.array(d, float), *MOMENTS)
    found = drift_between(left, right, NoPayloads())
    assert found.value == INF
    assert not found.lower_bound


@pytest.mark.parametrize("odd", [NAN, INF, -INF])
def test_the_same_odd_value_in_the_same_place_is_equal(odd):
    found = exact_drift(np.array([1.0, odd, 3.0]), np.array([1.0, odd, 3.3]))
    assert found.value == pytest.approx(0.3 / math.sqrt(10))
    assert found.worst == (2,)


def test_infinities_of_two_signs_are_infinitely_far():
    assert exact_drift(np.array([1.0, INF]), np.array([1.0, -INF])).value == INF


@pytest.mark.filterwarnings("error")
def test_a_difference_beyond_float64_is_infinite_and_no_pass():
    p, d = np.array([1.7e308, 1.0]), np.array([-1.7e308, 1.0])
    assert exact_drift(p, d).value == INF
    left, right = two(p, d, *MOMENTS, "sketch")
    assert drift_between(left, right, NoPayloads()).value == INF


# ---- max_abs and ulp


@pytest.mark.parametrize(
    ("dtype", "top", "ulp"),
    [
        (np.float32, 1.5, 2.0**-23),
        (np.float16, 1.5, 2.0**-10),
        (ml_dtypes.bfloat16, 1.5, 2.0**-7),
        (np.float16, 65504.0, 32.0),
    ],
)
def test_ulp_is_the_last_place_of_the_references_largest_element(dtype, top, ulp):
    p = np.array([top, 0.25], dtype)
    d = np.array([top - ulp, 0.25], np.float64)
    found = exact_drift(p, d)
    assert (found.max_abs, found.ulp, found.worst) == (ulp, 1.0, (0,))


def alone(reference: Record, candidate: Record) -> Drift:
    """The drift of two records by their sketches as the formula has it, a pair at a time."""
    p, d = np.asarray(reference.sketch), np.asarray(candidate.sketch)
    return Drift(ratio(l2_norm(d - p), l2_norm(p) if reference.l2 is None else reference.l2), "sketch")


anything, sizes = st.floats(allow_nan=False, allow_infinity=False), st.floats(0.0, 1e300)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.lists(anything, min_size=5, max_size=5)] * 2, st.none() | sizes), max_size=5))
def test_many_pairs_are_measured_as_each_alone_to_the_bit(sides):
    places = [{"step": step, "layer": None, "tensor": "logits", "prompt": "p"} for step in range(len(sides))]
    left = [Record(**where, phase="prefill_last", arm="P", hash="0x0", sketch=tuple(p), l2=size)
            for where, (p, _, size) in zip(places, sides, strict=True)]  # fmt: skip
    right = [Record(**where, phase="decode0", arm="D", hash="0x1", sketch=tuple(d))
             for where, (_, d, _) in zip(places, sides, strict=True)]  # fmt: skip
    found = pair(Trace(Header(prompt="p"), (*left, *right)), "P", "D", NoPayloads()).matched
    expected = [repr(alone(p, d)) for p, d in zip(left, right, strict=True)]  # NaN equals NaN
    assert [repr(item.drift) for item in found] == expected
    assert [repr(drift_between(p, d, NoPayloads())) for p, d in zip(left, right, strict=True)] == expected


def test_a_thousand_pairs_are_measured_as_each_alone_to_the_bit():
    rng = np.random.default_rng(7)
    trace = Trace(Header(prompt="p"), tuple(
        Record(prompt="p", phase=phase, arm=arm, step=step, layer=3, tensor="q_proj", hash=f"{arm}{step}",
               sketch=tuple((rng.standard_normal(64) * 10.0 ** rng.integers(-300, 300)).tolist()))
        for arm, phase in (("P", "prefill_last"), ("D", "decode0")) for step in range(1500)
    ))  # fmt: skip
    found = pair(trace, "P", "D", NoPayloads()).matched
    assert len(found) == 1500
    assert [item.drift for item in found] == [alone(item.reference, item.candidate) for item in found]
