"""The row check: each row of decode's cache is prefill's own, rounded, moved, empty, another layer's, or unknown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from driftprobe.compare import NoPayloads, PayloadSource
from driftprobe.diagnose import diagnose
from driftprobe.judgement import RowCheck, Status
from driftprobe.local import Ground
from driftprobe.rows import kv_indicators, rows_as_numbers, zero_row_hash
from driftprobe.trace import Trace
from driftprobe.verdict import judge, judge_trace
from make_trace import LENGTH, Arrays, Change, Site, scaled, toy, toy_values, unchanged

FLOAT = np.dtype(np.float32)


def on_cache(tensor: str, layer: int, change: Change) -> Change:
    """What decode's arms hold in one cache tap."""

    def changed(site: Site, array: np.ndarray) -> np.ndarray | None:
        mine = site.arm[0] in "DA" and (site.layer, site.tensor) == (layer, tensor)
        return change(site, array.copy()) if mine else array

    return changed


def checked(change: Change, tensor: str = "k_cache", layer: int = 1, whole: bool = False, **more: object) -> RowCheck:
    trace, arrays = toy(on_cache(tensor, layer, change), **more)  # type: ignore[arg-type]
    return of_trace(trace, arrays if whole else NoPayloads(), tensor, layer)


def of_trace(trace: Trace, payloads: PayloadSource, tensor: str, layer: int, step: int = 0) -> RowCheck:
    rows = judge_trace(trace, payloads).rows
    return next(r for r in rows if (r.tensor, r.layer, r.step) == (tensor, layer, step))


def rolled(_site: Site, rows: np.ndarray) -> np.ndarray:
    """One slot too far; slot 0 stays empty; the step's own row is where it belongs."""
    rows[1:LENGTH] = rows[: LENGTH - 1].copy()
    rows[0] = 0
    return rows


def swapped(_site: Site, rows: np.ndarray) -> np.ndarray:
    rows[[0, LENGTH - 1]] = rows[[LENGTH - 1, 0]]
    return rows


def noisy(_site: Site, rows: np.ndarray) -> np.ndarray:
    return scaled(rows, 2e-7)


def of_layer_0(site: Site, rows: np.ndarray) -> np.ndarray:
    return toy_values(replace(site, layer=0), FLOAT)


@pytest.mark.parametrize("tensor", ["k_cache", "v_cache"])
def test_rows_that_are_prefills_own(tensor):
    found = checked(unchanged, tensor)
    assert (found.compared, found.equal) == (LENGTH, LENGTH)
    assert (found.moved, found.zero, found.changed, found.other_layer) == ((), (), (), ())


def test_the_steps_own_row_is_not_counted():
    def own(_site, rows):
        rows[-1] += 1
        return rows

    assert checked(own).equal == LENGTH


@pytest.mark.parametrize("whole", [False, True])
def test_a_shift_is_seen_as_one(whole):
    found = checked(rolled, whole=whole)
    assert found.moved == tuple((i, i - 1) for i in range(1, LENGTH))
    assert found.zero == (0,)
    assert found.equal == 0


@pytest.mark.parametrize("whole", [False, True])
def test_a_swap_is_seen_as_one(whole):
    found = checked(swapped, whole=whole)
    assert found.moved == ((0, LENGTH - 1), (LENGTH - 1, 0))
    assert found.equal == LENGTH - 2


def test_of_several_equal_rows_the_one_that_fits_the_others_is_the_source():
    """The same token has the same V row wherever no position is in it: rows 0, 2 and 4 are one row here."""

    def alike(site, rows):
        rows = rows.copy()
        if (site.layer, site.tensor) == (1, "v_cache"):
            rows[[2, 4]] = rows[0]
            rows[:LENGTH] = np.roll(rows[:LENGTH], -1, axis=0) if site.arm[0] == "D" else rows[:LENGTH]
        return rows

    trace, _ = toy(alike)
    assert of_trace(trace, NoPayloads(), "v_cache", 1).moved == tuple((i, i + 1) for i in range(LENGTH - 1))


@pytest.mark.parametrize("whole", [False, True])
def test_another_layers_rows_are_named(whole):
    found = checked(of_layer_0, whole=whole)
    assert found.other_layer == tuple((i, 0) for i in range(LENGTH))


def test_a_shift_under_rounding_is_known_by_its_distance_where_tensors_are_whole():
    both_changes = lambda site, rows: noisy(site, rolled(site, rows))  # noqa: E731
    assert checked(both_changes, whole=True).moved == tuple((i, i - 1) for i in range(1, LENGTH))
    assert checked(both_changes).moved == ()
    assert checked(both_changes).changed == tuple(range(1, LENGTH))


def test_another_layers_rows_under_rounding_are_known_by_their_distance():
    found = checked(lambda site, rows: noisy(site, of_layer_0(site, rows)), whole=True)
    assert found.other_layer == tuple((i, 0) for i in range(LENGTH))


@pytest.mark.parametrize("whole", [False, True])
def test_rows_off_by_rounding_are_within(whole):
    found = checked(noisy, whole=whole)
    assert (found.equal, found.within, found.changed) == (0, LENGTH, ())


def test_one_bad_row_among_rounded_ones_is_told_apart_where_tensors_are_whole():
    def one_bad(site, rows):
        rows = noisy(site, rows)
        rows[2] *= 2
        return rows

    found = checked(one_bad, whole=True)
    assert (found.within, found.changed) == (LENGTH - 1, (2,))


def test_rows_that_match_nothing_are_changed():
    assert checked(lambda _site, rows: rows + 1).changed == tuple(range(LENGTH))


def test_a_row_that_a_longer_prefill_wrote_is_no_fault():
    """E1 and D round alike, P does not: the hash of any prefill arm at the same position will do."""
    ours = {"E1", "D", "D'"}
    trace, _ = toy(lambda site, array: scaled(array, 2e-7) if site.arm in ours and "cache" in site.tensor else array)
    assert of_trace(trace, NoPayloads(), "k_cache", 1).equal == LENGTH


def test_a_row_of_a_later_step_is_compared_with_prefills_row_of_that_step():
    trace, _ = toy(on_cache("k_cache", 1, lambda site, rows: rolled(site, rows) if site.step == 1 else rows), steps=2)
    assert of_trace(trace, NoPayloads(), "k_cache", 1, 0).equal == LENGTH
    later = of_trace(trace, NoPayloads(), "k_cache", 1, 1)
    assert later.compared == LENGTH + 1
    assert later.equal == 1  # the row that decode0 wrote


def test_a_window_that_starts_late_is_compared_by_position():
    trace, _ = toy(lambda site, array: array[2:] if site.tensor == "k_cache" else array)
    late = replace(trace, records=tuple(replace(r, row_start=2) if r.tensor == "k_cache" else r for r in trace.records))
    found = of_trace(late, NoPayloads(), "k_cache", 1)
    assert (found.compared, found.equal) == (LENGTH - 2, LENGTH - 2)


def test_the_hash_of_an_empty_row():
    trace, _ = toy(on_cache("k_cache", 1, rolled))
    cached = next(r for r in trace.records if (r.arm, r.tensor, r.layer) == ("D", "k_cache", 1))
    assert cached.rows is not None
    assert zero_row_hash(cached) == cached.rows[0]
    assert zero_row_hash(replace(cached, dtype=None)) is None
    assert zero_row_hash(replace(cached, shape=None)) is None


# ---- the indicators


def indicators(change: Change, **more: object):
    found = judge_trace(toy(change, **more)[0], NoPayloads())  # type: ignore[arg-type]
    return kv_indicators(found.rows, found.cells)


def test_all_consistent():
    kv = indicators(unchanged)
    assert (kv.k_hash_consistent, kv.v_hash_consistent, kv.kv_aligned) == (True, True, True)
    assert (kv.k_rows_equal, kv.k_rows, kv.v_rows) == (2 * LENGTH, 2 * LENGTH, 2 * LENGTH)


def test_k_and_v_are_each_compared_with_their_own():
    """The predecessor called K and V aligned where K's hash was V's."""
    kv = indicators(on_cache("v_cache", 1, rolled))
    assert (kv.k_hash_consistent, kv.v_hash_consistent, kv.kv_aligned) == (True, False, False)


def test_rounding_varies_the_hashes_and_leaves_k_and_v_aligned():
    kv = indicators(on_cache("k_cache", 1, noisy))
    assert (kv.k_hash_consistent, kv.kv_aligned) == (False, True)


def test_without_cache_taps_nothing_is_claimed():
    kv = indicators(unchanged, taps=("q_proj",))
    assert (kv.k_hash_consistent, kv.v_hash_consistent, kv.kv_aligned) == (None, None, None)


def test_a_cache_that_differs_by_an_unknown_amount_is_not_called_aligned():
    trace, _ = toy(on_cache("k_cache", 1, noisy))
    hashed = tuple(replace(r, sketch=None, l2=None, abs_sum=None) for r in trace.records)
    found = judge_trace(replace(trace, records=hashed), NoPayloads())
    assert kv_indicators(found.rows, found.cells).kv_aligned is None


def test_arrays_are_found_by_their_key():
    trace, arrays = toy()
    assert isinstance(arrays, Arrays)
    assert all(arrays.get(record) is not None for record in trace.records)


@pytest.mark.parametrize("side", ["D", "P", "both"])
def test_a_cache_of_no_rows_is_judged(side):
    def none(site: Site, rows: np.ndarray) -> np.ndarray:
        mine = side == "both" or site.arm[0] == side
        return rows[:0] if (site.layer, site.tensor) == (1, "k_cache") and mine else rows

    trace, arrays = toy(none, mode="kv_aligned")
    judged = judge_trace(trace, arrays)
    assert all((row.compared, row.equal) == (0, 0) for row in judged.rows if (row.tensor, row.layer) == ("k_cache", 1))
    assert rows_as_numbers(next(r for r in trace.records if r.tensor == "k_cache" and r.layer == 1), arrays) is not None


def test_a_differing_cache_of_no_rows_is_checked_in_numbers():
    """The other layers' rows are looked through too, and one of those caches may be empty."""

    def none(site: Site, rows: np.ndarray) -> np.ndarray:
        if site.tensor == "k_cache" and site.layer == 0:
            return rows[:0]
        return noisy(site, rows) if site.tensor == "k_cache" and site.arm[0] in "DA" else rows

    trace, arrays = toy(none)
    assert of_trace(trace, arrays, "k_cache", 1).compared == LENGTH


# ---- a wrong row is wrong in K and in V


def beside(keys: float, others: float, values: float = 1.0, row: int = 1) -> tuple[Trace, Arrays]:
    """One row of layer 1 is off by shares of itself in K and V, every other K row by a smaller one."""

    def changed(site: Site, array: np.ndarray) -> np.ndarray:
        if site.arm not in ("D", "D'") or site.layer != 1 or site.tensor not in ("k_cache", "v_cache"):
            return array
        sizes = np.full(len(array), others if site.tensor == "k_cache" else 0.0)
        sizes[row], sizes[LENGTH] = keys if site.tensor == "k_cache" else values, 0.0
        return (array * (1 + sizes[:, None, None])).astype(array.dtype)

    return toy(changed, facts={"casts": {"k_cache": "int8", "v_cache": "int8"}})


def test_a_row_that_v_fails_in_fails_in_k_where_it_stands_out_there():
    trace, arrays = beside(keys=0.17, others=0.01)
    found = judge_trace(trace, arrays)
    first = found.first_failure
    assert first is not None
    assert (first.layer, first.tensor, first.local and first.local.ground) == (1, "k_cache", Ground.VALUES)
    assert first.excess < 4
    assert "the rows in which V fails stand out in K too" in found.reason


@pytest.mark.parametrize(
    ("keys", "others", "values"),
    [(0.17, 0.03, 1.0), (0.05, 0.0, 1.0), (0.17, 0.01, 0.1)],
    ids=["others differ as much", "no more than rounding", "V passes"],
)
def test_a_row_of_k_alone_is_not_picked_for_being_the_largest(keys, others, values):
    trace, arrays = beside(keys, others, values)
    found = judge_trace(trace, arrays)
    assert next(c for c in found.cells if (c.layer, c.tensor) == (1, "k_cache")).status is Status.PASS


def test_without_whole_tensors_v_alone_fails():
    trace, _ = beside(keys=0.17, others=0.01)
    first = judge_trace(trace, NoPayloads()).first_failure
    assert first is not None
    assert first.tensor == "v_cache"


def test_a_stale_row_is_named_in_k_though_its_difference_is_under_the_limit_of_all_rows():
    trace, arrays = beside(keys=0.17, others=0.001)
    found = diagnose(judge([trace], arrays), [trace], arrays).first_failure
    assert found is not None
    assert found.diagnosis is not None
    assert (found.tensor, found.diagnosis.cause, found.diagnosis.parameters) == (
        "k_cache",
        "cache_stale",
        {"rows": (1,)},
    )
