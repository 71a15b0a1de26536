"""The fingerprint: the same for the same numbers, and what docs/trace-format.md says it is."""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from driftprobe.fingerprint import (
    BUILT,
    DTYPES,
    SKETCH_BLOCK,
    SKETCH_SIZE,
    canonical_bytes,
    fingerprint,
    hash_bytes,
    l2_norm,
    reference_fingerprint,
    row_hashes,
    sketch,
    sketch_signs,
    to_float64,
)

FLOATS = [name for name in DTYPES if "float" in name]
LARGEST = 1.7976931348623157e308
finite = st.floats(allow_nan=False, allow_infinity=False, width=64)
moderate = st.floats(-1e6, 1e6, width=64)


def slow_sign(i: int) -> float:
    """SplitMix64 with seed 0: the sign of element i, in plain integers."""
    z = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return -1.0 if z >> 63 else 1.0


def slow_sketch(values: list[float], size: int) -> tuple[float, ...]:
    """The sketch as the format page spells it: one element after the other."""
    totals = [0.0] * size
    block = SKETCH_BLOCK // size * size
    for start in range(0, len(values), block):
        sums = [0.0] * size
        for i in range(start, min(start + block, len(values))):
            sums[i % size] += slow_sign(i) * values[i]
        totals = [_clip(t + _clip(s)) for t, s in zip(totals, sums, strict=True)]
    return tuple(totals)


def _clip(x: float) -> float:
    return max(-LARGEST, min(LARGEST, x))


arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=st.floats(width=32))


@given(arrays)
def test_hash_does_not_depend_on_layout(array):
    expected = fingerprint(array)
    big_endian = array.astype(array.dtype.newbyteorder(">"))
    spaced = np.repeat(array, 2, axis=-1)[..., ::2]
    for same in (np.asfortranarray(array), big_endian, spaced, array.copy()):
        assert repr(fingerprint(same)) == repr(expected)


def test_hash_is_xxh3_of_the_little_endian_bytes():
    array = np.array([1.0, -2.5, math.inf], np.float32)
    data = struct.pack("<3f", 1.0, -2.5, math.inf)
    assert canonical_bytes(array) == data
    assert fingerprint(array).hash == f"0x{xxhash.xxh3_64_hexdigest(data)}"


def test_hash_tells_minus_zero_from_zero_and_the_moments_do_not():
    plus, minus = fingerprint(np.array([0.0, 1.0])), fingerprint(np.array([-0.0, 1.0]))
    assert plus.hash != minus.hash
    assert plus.sketch == minus.sketch
    assert (plus.nz_count, plus.l2) == (minus.nz_count, minus.l2) == (1, 1.0)


def test_signs_are_splitmix64_bit_for_bit():
    for start in (0, 1, SKETCH_BLOCK - 3, 2**40):
        assert sketch_signs(start, 200).tolist() == [slow_sign(i) for i in range(start, start + 200)]


@settings(max_examples=60)
@given(st.lists(finite, max_size=300), st.sampled_from([1, 2, 3, 7, 16, 64, 100]))
def test_sketch_is_the_plain_loop_bit_for_bit(numbers, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sketch(np.array(numbers, np.float64), size) == slow_sketch(numbers, size)


@pytest.mark.parametrize("size", [1, 3, 64, 1000])
@pytest.mark.parametrize("count", [SKETCH_BLOCK - 1, SKETCH_BLOCK, SKETCH_BLOCK + 1, 2 * SKETCH_BLOCK + 77])
def test_sketch_over_one_block_is_the_plain_loop_bit_for_bit(count, size):
    rng = np.random.default_rng(count)
    numbers = rng.standard_normal(count) * 10.0 ** rng.integers(-8, 8, count)
    assert sketch(numbers, size) == slow_sketch(numbers.tolist(), size)


def test_sketch_saturates_over_blocks():
    numbers = sketch_signs(0, 2 * SKETCH_BLOCK) * LARGEST
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sketch(numbers) == (LARGEST,) * SKETCH_SIZE


@given(hnp.arrays(np.float64, (2, 500), elements=moderate))
def test_sketch_is_linear(pair):
    x, y = pair
    together = np.subtract(sketch(x), sketch(y))
    np.testing.assert_allclose(sketch(x - y), together, atol=1e-12 * np.abs(pair).sum() + 1e-300)


@given(hnp.arrays(np.float64, st.integers(0, SKETCH_SIZE), elements=moderate))
def test_norm_of_the_sketch_is_exact_where_each_bucket_has_one_element(x):
    assert math.isclose(l2_norm(np.array(sketch(x))), l2_norm(x), rel_tol=1e-15)


def test_norm_of_the_sketch_is_within_its_stated_error():
    rng = np.random.default_rng(1)
    ratios = [(l2_norm(np.array(sketch(x))) / l2_norm(x)) ** 2 for x in (rng.standard_normal(4096) for _ in range(400))]
    assert abs(np.mean(ratios) - 1) < 0.05
    assert 0.7 < np.std(ratios) / math.sqrt(2 / SKETCH_SIZE) < 1.3


@given(st.lists(moderate, min_size=1, max_size=200))
def test_moments_agree_with_exact_summation(numbers):
    found = fingerprint(np.array(numbers))
    total = math.fsum(map(abs, numbers))
    assert math.isclose(found.abs_sum, total, rel_tol=1e-13)
    assert math.isclose(found.mean, math.fsum(numbers) / len(numbers), rel_tol=1e-13, abs_tol=1e-13 * total)
    assert math.isclose(found.l2, math.sqrt(math.fsum(x * x for x in numbers)), rel_tol=1e-13, abs_tol=1e-150)
    assert (found.min, found.max) == (min(numbers), max(numbers))
    assert found.nz_count == sum(x != 0 for x in numbers)


@given(hnp.arrays(np.float64, st.integers(0, 100), elements=st.floats(width=64)))
def test_statistics_are_finite_whatever_the_tensor(array):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fingerprint(array)
    statistics = (found.abs_sum, found.min, found.max, found.mean, found.l2, *found.sketch)
    assert all(map(math.isfinite, statistics))
    assert found.nan_count == np.isnan(array).sum()
    assert found.inf_count == np.isinf(array).sum()
    assert found.nz_count + found.nan_count + found.inf_count <= array.size
    assert found.min <= found.mean <= found.max or math.isclose(found.mean, found.min) or found.min == found.max


def test_overflow_saturates():
    found = fingerprint(np.array([1.7e308, -1.7e308] * 20))
    assert (found.abs_sum, found.l2, found.mean) == (LARGEST, LARGEST, 0.0)
    assert fingerprint(np.full(9, 1.7e308)).mean == 1.7e308


@pytest.mark.parametrize("scale", [1e-160, 1e-300, 1e160, 1e300])
def test_l2_neither_underflows_nor_overflows(scale):
    assert math.isclose(l2_norm(np.array([3.0, 4.0]) * scale), 5.0 * scale, rel_tol=1e-14)


def test_non_finite_elements_are_counted_and_left_out():
    array = np.array([math.nan, 2.0, math.inf, -math.inf, -3.0, 0.0])
    found = fingerprint(array)
    assert (found.nan_count, found.inf_count, found.nz_count) == (1, 2, 2)
    assert (found.abs_sum, found.min, found.max, found.l2) == (5.0, -3.0, 2.0, math.sqrt(13))
    assert found.sketch == sketch(np.array([0.0, 2.0, 0.0, 0.0, -3.0, 0.0]))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_empty_tensors_have_zeros(shape):
    found = fingerprint(np.zeros(shape, np.float32))
    assert found.shape == shape
    assert found.hash == f"0x{xxhash.xxh3_64_hexdigest(b'')}"
    assert (found.nz_count, found.abs_sum, found.min, found.max, found.mean, found.l2) == (0, 0, 0, 0, 0, 0)
    assert set(found.sketch) == {0.0}


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_of_the_format(name):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(DTYPES[name])
    found = fingerprint(array)
    assert (found.dtype, found.shape, found.nz_count, found.abs_sum) == (name, (2, 3), 4, 4.0)
    assert canonical_bytes(array) == array.tobytes()
    assert fingerprint(array[0]).hash == row_hashes(array)[0]


@pytest.mark.parametrize("name", [name for name in FLOATS if DTYPES[name].itemsize <= 2])
def test_every_value_of_the_small_floats_becomes_float64_exactly(name):
    dtype = DTYPES[name]
    every = np.arange(256**dtype.itemsize, dtype=f"<u{dtype.itemsize}").view(dtype)
    back = to_float64(every).astype(dtype)
    nan = np.isnan(to_float64(every))
    assert np.array_equal(back[~nan].tobytes(), every[~nan].tobytes())
    assert np.isnan(to_float64(back[nan])).all()


def test_bfloat16_is_the_upper_half_of_float32():
    bits = np.array([0x3F80, 0x4049, 0xC2F7, 0x0001], np.uint16)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    assert to_float64(bits.view(DTYPES["bfloat16"])).tolist() == wide.astype(np.float64).tolist()


def test_scalars_have_a_fingerprint():
    assert fingerprint(np.array(-2.0)).shape == ()
    assert fingerprint(np.array(-2.0)).abs_sum == 2.0


PAGE = (Path(__file__).parent.parent / "docs" / "trace-format.md").read_text()


def code_block(language: str) -> str:
    return PAGE.split(f"```{language}\n")[1].split("```")[0]


def test_the_command_of_the_format_page_prints_its_test_vectors(capsys):
    exec(code_block("python"), {})
    assert capsys.readouterr().out == code_block("text")


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_c_of_the_format_page_gives_the_same_sketch(tmp_path):
    main = """
    #include <stdio.h>
    #include <stdlib.h>
    int main(int argc, char **argv) {
        static double x[300000], totals[65536];
        size_t m = strtoul(argv[1], 0, 10), n = fread(x, sizeof *x, 300000, stdin);
        sketch(x, n, m, totals);
        fwrite(totals, sizeof *totals, m, stdout);
        return argc != 2;
    }
    """
    (tmp_path / "sketch.c").write_text(code_block("c") + main)
    subprocess.run(["cc", "-O2", "-o", "sketch", "sketch.c"], cwd=tmp_path, check=True)
    rng = np.random.default_rng(5)
    for count, size in [(0, 64), (10, 64), (70_000, 64), (200_000, 1), (200_000, 1000), (140_000, 65536)]:
        values = rng.standard_normal(count) * 10.0 ** rng.integers(-300, 308, count)
        found = subprocess.run(
            [tmp_path / "sketch", str(size)], input=values.tobytes(), capture_output=True, check=True
        )
        assert found.stdout == np.array(sketch(values, size)).tobytes(), (count, size)


@pytest.mark.skipif(not BUILT, reason="driftprobe._core is not built here: it needs a C compiler and xxhash.h")
@given(arrays)
def test_the_core_gives_what_numpy_gives(array):
    for some in (array, np.asfortranarray(array)[::-1], array.astype(array.dtype.newbyteorder(">"))):
        ours, theirs = reference_fingerprint(some), fingerprint(some)
        assert (theirs.hash, theirs.sketch, theirs.shape) == (ours.hash, ours.sketch, ours.shape)
        assert theirs.l2 == pytest.approx(ours.l2, rel=1e-12)
        assert row_hashes(some) == tuple(hash_bytes(canonical_bytes(row)) for row in some)


def test_a_sketch_of_no_size_or_too_many_sums_is_refused():
    for size in (0, SKETCH_BLOCK + 1):
        for made in (fingerprint, reference_fingerprint):
            with pytest.raises(ValueError):
                made(np.ones(3, np.float32), size)


def test_an_empty_array_of_many_axes_has_a_fingerprint():
    array = np.zeros((0,) + (1,) * 9, np.float32)
    assert fingerprint(array) == reference_fingerprint(array)
