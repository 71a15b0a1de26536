"""The compiled core: rows in the same pass, and one tensor over several threads, as by one and as by NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from driftprobe.fingerprint import (
    BUILT,
    DTYPES,
    Array,
    canonical_bytes,
    fields_and_rows,
    fingerprint,
    hash_bytes,
    reference_fingerprint,
    row_hashes,
)

built = pytest.mark.skipif(not BUILT, reason="driftprobe._core is not built here: it needs a C compiler and xxhash.h")
LARGE = 1 << 20
"""From here on the core takes more than one thread, if it is given them."""


def large(dtype: str, n: int) -> Array:
    values = (np.random.default_rng(n).normal(size=n) * 50).astype(np.float32)
    return values.astype(DTYPES[dtype])


@built
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [LARGE - 1, LARGE, LARGE + 1, LARGE + 65_536 + 77, 1_700_003])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_threads_gives_the_same_bits(dtype, n, threads):
    array = large(dtype, n)
    assert fingerprint(array, threads=threads) == fingerprint(array)


@built
def test_what_threads_give_is_what_numpy_gives():
    array = large("float32", LARGE + 4097)
    ours, theirs = fingerprint(array, threads=3), reference_fingerprint(array)
    assert (ours.hash, ours.nz_count, ours.min, ours.max) == (theirs.hash, theirs.nz_count, theirs.min, theirs.max)
    assert [v.hex() for v in ours.sketch] == [v.hex() for v in theirs.sketch]
    assert ours.abs_sum == pytest.approx(theirs.abs_sum, rel=1e-12)


@built
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_count_what_is_not_finite(threads):
    array = large("float32", LARGE + 300_000)
    array[3], array[70_000:70_100], array[-1] = np.nan, np.inf, -np.inf
    found = fingerprint(array, threads=threads)
    assert (found.nan_count, found.inf_count) == (1, 101)
    assert found == fingerprint(array)


STRIDED = {
    "transposed": lambda a: a.reshape(1200, -1).T,
    "every other": lambda a: a.reshape(-1, 1000)[:, ::2],
    "backwards": lambda a: a[::-1],
    "broadcast": lambda a: np.broadcast_to(a[:1500, None], (1500, 900)),
}


@built
@pytest.mark.parametrize("view", STRIDED)
def test_threads_follow_strides_and_hash_rows(view):
    array = STRIDED[view](large("float32", 2_400_000))
    assert array.size >= LARGE
    rows = array if array.ndim > 1 else array.reshape(-1, 1000)
    one = fields_and_rows(rows, rows=True)
    assert one[1] == tuple(hash_bytes(canonical_bytes(row)) for row in rows)
    assert fields_and_rows(rows, rows=True, threads=3) == one


@pytest.mark.parametrize("threads", [0, -1])
def test_fewer_than_one_thread_is_refused(threads):
    with pytest.raises(ValueError, match="threads"):
        fingerprint(np.ones(3), threads=threads)


@built
@pytest.mark.parametrize(
    "shape",
    [(3, 120), (3, 121), (7, 500), (100, 333), (33, 64), (9, 5000), (5, 4096), (17, 4097), (1, 9999), (64, 8, 64)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_rows_of_every_length_are_hashed_in_the_same_pass(dtype, shape):
    array = large(dtype, int(np.prod(shape))).reshape(shape)
    expected = tuple(hash_bytes(canonical_bytes(row)) for row in array)
    assert row_hashes(array) == expected
    assert fields_and_rows(array, rows=True)[1] == expected


@built
@pytest.mark.parametrize("threads", [1, 2])
def test_a_thread_that_takes_subnormals_for_zero_gets_the_same_bits(threads):
    torch = pytest.importorskip("torch")
    tiny = np.random.default_rng(0).normal(size=LARGE + 77) * 1e-310
    before = fingerprint(tiny)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot be told to take subnormals for 0")
    try:
        found = fingerprint(tiny, threads=threads)
    finally:
        torch.set_flush_denormal(False)
    assert found == before
    assert found.max > 0 and max(map(abs, found.sketch)) > 0
