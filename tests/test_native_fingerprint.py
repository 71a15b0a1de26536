"""include/driftprobe.h: the fingerprint is Python's, hash and sketch to the bit, moments to the last bits."""

from __future__ import annotations

import ctypes as c
import math

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from driftprobe.engines import include_folder
from driftprobe.fingerprint import DTYPES, Array, Fingerprint, canonical_bytes
from driftprobe.fingerprint import reference_fingerprint as fingerprint
from native_header import BAD_ARGUMENT, BUILDS, INCLUDE, Print, Tensor, fingerprint_in_c, library, tensor


@pytest.fixture(scope="session", params=BUILDS)
def header(request, tmp_path_factory):
    return library(tmp_path_factory.getbasetemp(), request.param)


def assert_same(theirs: Fingerprint, ours: Fingerprint) -> None:
    assert [v.hex() for v in theirs.sketch] == [v.hex() for v in ours.sketch]
    for name in ("hash", "nz_count", "nan_count", "inf_count", "min", "max"):
        assert getattr(theirs, name) == getattr(ours, name), name
    assert theirs.abs_sum == pytest.approx(ours.abs_sum, rel=1e-12)
    assert theirs.l2 == pytest.approx(ours.l2, rel=1e-12)
    finite = max(1, math.prod(ours.shape) - ours.nan_count - ours.inf_count)
    assert abs(theirs.mean - ours.mean) <= 1e-12 * ours.abs_sum / finite


def sample(dtype: str, n: int, seed: int = 0) -> Array:
    """Return n elements of random bits (floats: with NaN, infinities and -0 among them)."""
    rng, kind = np.random.default_rng(seed), DTYPES[dtype]
    if dtype == "bool":
        return rng.integers(0, 2, n).astype(np.bool_)
    if dtype in ("float64", "float32") and n > 1000:
        return rng.normal(size=n).astype(kind)  # random bits span so many decades that one element is the sum
    return np.frombuffer(rng.bytes(n * kind.itemsize), dtype=kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 4096, 4097, 65536, 65537, 200_001])
def test_every_dtype_and_length_has_pythons_fingerprint(header, dtype, n):
    array = sample(dtype, n, seed=n)
    assert_same(fingerprint_in_c(header, array), fingerprint(array))


def test_ten_million_elements_have_pythons_fingerprint(header):
    array = np.random.default_rng(5).normal(size=10_000_000).astype(np.float32)
    assert_same(fingerprint_in_c(header, array), fingerprint(array))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"])
def test_every_value_of_a_small_dtype_is_read_as_it_is(header, dtype):
    kind = DTYPES[dtype]
    codes = np.arange(256**kind.itemsize, dtype=f"u{kind.itemsize}").view(kind)
    assert_same(fingerprint_in_c(header, codes, 65536), fingerprint(codes, 65536))


@pytest.mark.parametrize("dtype", [name for name in DTYPES if DTYPES[name].itemsize < 4])
def test_finite_values_of_a_small_dtype_have_pythons_sums(header, dtype):
    """NaN and infinity take another way: here every chunk goes through the vectors."""
    array = sample(dtype, 70_000, seed=3).copy()
    array[~np.isfinite(array.astype(np.float64))] = 1
    assert_same(fingerprint_in_c(header, array), fingerprint(array))


@pytest.mark.parametrize("shape", [(7, 10), (7, 500), (100, 333), (5, 768), (9, 5000), (17, 4097), (20, 3, 64), (3, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_rows_are_hashed_in_the_pass_over_all_of_them(header, dtype, shape):
    """Some lie in one chunk of the pass, some begin in one and end in another, some are longer than several."""
    array = sample(dtype, math.prod(shape), seed=2).reshape(shape)
    found = np.zeros(shape[0] + 1, np.uint64)
    assert header.dp_test_rows(c.byref(tensor(array)), found.ctypes.data) == shape[0]
    assert found.tolist() == [*(xxhash.xxh3_64_intdigest(canonical_bytes(row)) for row in array), 0]


@pytest.mark.parametrize("size", [1, 2, 63, 64, 1000, 65535, 65536])
def test_every_sketch_size_has_pythons_sums(header, size):
    array = np.random.default_rng(size).normal(size=150_001)
    assert fingerprint_in_c(header, array, size).sketch == fingerprint(array, size).sketch


VIEWS = {
    "transposed": lambda a: a.transpose(2, 0, 1),
    "every other": lambda a: a[::2, :, 1::3],
    "backwards": lambda a: a[::-1, ::-1],
    "broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "one row": lambda a: a[3:4],
    "no axis": lambda a: a[0, 0, 0],
    "nothing": lambda a: a[:0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_strides_are_followed(header, view, dtype):
    array = np.asarray(VIEWS[view](sample(dtype, 7 * 33 * 50).reshape(7, 33, 50)))
    assert_same(fingerprint_in_c(header, array), fingerprint(array))


@pytest.mark.parametrize(
    "values",
    [[math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0], [math.nan] * 3, [1e308] * 9, [-1e308, 1e308] * 4,
     [5e-324, 1e-310], [1e200, 1.0]],
)  # fmt: skip
def test_what_is_not_finite_or_overflows_is_counted_and_saturates(header, values):
    array = np.array(values)
    assert_same(fingerprint_in_c(header, array), fingerprint(array))


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    n=st.integers(0, 900),
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 7, 64]),
)
def test_any_bits_have_pythons_fingerprint(header, dtype, n, seed, size):
    array = sample(dtype, n, seed)
    assert_same(fingerprint_in_c(header, array, size), fingerprint(array, size))


BYTES = np.random.default_rng(7).bytes(20_000)


def hash_in_c(made: c.CDLL, data: bytes, piece: int) -> int:
    made.dp_test_hash.restype = c.c_uint64
    made.dp_test_hash.argtypes = [c.c_char_p, c.c_size_t, c.c_size_t]
    return made.dp_test_hash(data, len(data), piece)


def test_inputs_of_every_length_have_xxhashs_hash(header):
    wrong = [n for n in range(5001) if hash_in_c(header, BYTES[:n], n + 1) != xxhash.xxh3_64_intdigest(BYTES[:n])]
    assert wrong == []


@pytest.mark.parametrize("piece", [1, 7, 63, 64, 65, 128, 240, 241, 960, 1000, 1024, 1025, 4096])
def test_the_hash_does_not_depend_on_the_pieces(header, piece):
    lengths = [*range(230, 330), *range(1000, 1120), 2047, 2048, 2049, 8192, 10_007, 20_000]
    wrong = [n for n in lengths if hash_in_c(header, BYTES[:n], piece) != xxhash.xxh3_64_intdigest(BYTES[:n])]
    assert wrong == []


def test_a_thread_that_takes_subnormals_for_zero_gives_the_same(header):
    array = np.full(4096 + 5, 1e-40, np.float32)
    array[::3], array[1::1000] = 3e-39, 1e-37
    doubles = array.astype(np.float64) * 2.0**-900
    expected = [fingerprint(array), fingerprint(doubles)]
    try:
        if not header.dp_test_flush_subnormals(1):
            pytest.skip("only known to do this on x86")
        found = [fingerprint_in_c(header, array), fingerprint_in_c(header, doubles)]
        product = array[:1] * array.dtype.type(1)
    finally:
        header.dp_test_flush_subnormals(0)
    assert product[0] == 0, "this thread did not take them for 0"
    for theirs, ours in zip(found, expected, strict=True):
        assert_same(theirs, ours)


def test_the_header_is_found_where_the_command_says():
    assert (include_folder() / "driftprobe.h").read_bytes() == (INCLUDE / "driftprobe.h").read_bytes()


def test_a_tensor_that_cannot_be_is_refused(header):
    array, print_, sums = np.ones(4, np.float32), Print(), np.zeros(70_000)

    def asked(item: Tensor, size: int = 64) -> int:
        return header.dp_fingerprint_of(c.byref(item), size, c.byref(print_), sums.ctypes.data)

    wrong = [tensor(array) for _ in range(5)]
    wrong[0].dtype = 12
    wrong[1].ndim = 9
    wrong[2].shape[0] = -1
    wrong[3].data = None
    wrong[4].ndim, wrong[4].shape[0], wrong[4].shape[1] = 2, 2**40, 2**40
    assert [asked(item) for item in wrong] == [BAD_ARGUMENT] * 5
    assert [asked(tensor(array), size) for size in (0, 65537)] == [BAD_ARGUMENT] * 2
