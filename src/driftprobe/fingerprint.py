"""Array -> Fingerprint: hash, moments and a linear sketch of one tensor. The one door to float64.

Specified in docs/trace-format.md, section "Fingerprint". The compiled core (`_core.c`, which is include/driftprobe.h)
does the work in one pass where it was built; the NumPy code here is what it is tested against, and stands in for it.
Both give the same hash and the same sketch, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import xxhash

try:
    from driftprobe import _core as core
except ImportError:
    core = None  # type: ignore[assignment]

SKETCH_SIZE = 64
SKETCH_BLOCK = 1 << 16
"""Elements summed in order before the block's sums are added to the total; fixed, so that threads cannot change it."""

Array = npt.NDArray[np.generic]
Float64 = npt.NDArray[np.float64]

DTYPES: dict[str, np.dtype[np.generic]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CODES = {name: code for code, name in enumerate(DTYPES)}
"""The core's number of each dtype: `dp_dtype` of driftprobe.h has the same order."""
_CODE_OF = {dtype: _CODES[name] for dtype, name in _NAMES.items()}
_MAX_DIMS = 8
BUILT = core is not None
"""Whether the compiled core does the work here."""

UNIT_ROUNDOFF: dict[str, float] = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "tfloat32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8_e4m3fn": 2.0**-4,
    "float8_e5m2": 2.0**-3,
}
"""Unit roundoff u = 2^-p for a significand of p bits, rounding to nearest (Higham 2002, section 2.1)."""

GRID_ROUNDOFF: dict[str, float] = {"int8": 1 / 254, "int4": 1 / 14}
"""What a cast to a symmetric integer grid with a scale amounts to, in place of a unit roundoff.

A value v is kept as round(v/s)·s with s = absmax/127 (absmax/7), so that it is off by s/2 = absmax/254 (absmax/14) at
most, and by s/√12 in the root of the mean square. Relative to the rows' own root mean square that is c/√3 of this
number, c = absmax/rms over what shares a scale: 3 to 4 for a head of a normal row, where the limit of 8 of them is four
times what it does. One scale for a whole tensor with outliers (c above 13) is beyond it, and is found as an error.
"""
CAST_ROUNDOFF = {**UNIT_ROUNDOFF, **GRID_ROUNDOFF}
"""Dtypes that a cast may name. A recorded integer tensor is no such cast: nothing says what its scale was."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is kept of a tensor. Moments and sketch run over the finite elements; the others are counted."""

    dtype: str
    shape: tuple[int, ...]
    hash: str
    """XXH3-64 of the canonical little-endian bytes, `0x` and 16 hexadecimal digits."""
    nz_count: int
    """Finite elements that are not zero."""
    abs_sum: float
    min: float
    """0 where no element is finite; so `max`, `mean`."""
    max: float
    mean: float
    l2: float
    nan_count: int
    inf_count: int
    sketch: tuple[float, ...]


def dtype_name(array: Array) -> str:
    """Return the format's name of an array's dtype; KeyError where the format has none."""
    return _NAMES.get(array.dtype) or _NAMES[array.dtype.newbyteorder("=")]


def to_float64(array: Array) -> Float64:
    """Return the values as float64, exactly for every float dtype of the format. The one numeric door."""
    with np.errstate(invalid="ignore"):
        return np.asarray(array).astype(np.float64)


def hash_bytes(data: bytes | memoryview) -> str:
    """Return XXH3-64 of the bytes, written `0x` and 16 lower-case hexadecimal digits."""
    return f"0x{xxhash.xxh3_64_intdigest(data):016x}"


def canonical_bytes(array: Array) -> bytes:
    """Return the array's elements in C order, little-endian, in their own dtype."""
    data = np.ascontiguousarray(array)
    return data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes()


def row_hashes(array: Array) -> tuple[str, ...]:
    """Return the hash of each slice along the first axis (one a position for a K/V cache tap)."""
    if core is not None and array.ndim:
        hashes: tuple[str, ...] = core.row_hashes(*for_core(array))
        return hashes
    return tuple(hash_bytes(canonical_bytes(row)) for row in array)


def fingerprint(array: Array, sketch_size: int = SKETCH_SIZE, *, threads: int = 1) -> Fingerprint:
    """Return the fingerprint of an array of any dtype in `DTYPES`, of any shape and strides, empty ones included.

    `threads` changes nothing in it: tensors of a million elements or more are done that much sooner (by the core, with
    sketches of the usual size). Raises KeyError where the format has no such dtype, ValueError for a `sketch_size`
    outside 1 to 65536 or fewer than one thread.
    """
    fields, _ = fields_and_rows(array, sketch_size, rows=False, threads=threads)
    return Fingerprint(**fields)


def fields_and_rows(
    array: Array, sketch_size: int = SKETCH_SIZE, *, rows: bool, threads: int = 1
) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """Return the fields of an array's Fingerprint, and with `rows` the hash of each slice along its first axis.

    One pass for both. Raises as `fingerprint`; `rows` asks for an array of one axis or more.
    """
    if threads < 1:
        raise ValueError(f"{threads} threads")
    if core is None:
        print_ = reference_fingerprint(array, sketch_size)
        return {name: getattr(print_, name) for name in _FIELDS}, row_hashes(array) if rows else None
    *measured, hashes = core.fingerprint(*for_core(array), sketch_size, rows, threads)
    return dict(zip(_FIELDS, (dtype_name(array), array.shape, *measured), strict=True)), hashes


_FIELDS = tuple(spec.name for spec in fields(Fingerprint))
"""The core returns them in this order, behind dtype and shape."""


def for_core(array: Array) -> tuple[Array, int]:
    """Return an array as the core can read it, and its dtype's number there.

    An array in another byte order, with odd strides or of many axes is copied first. Raises KeyError where the format
    has no such dtype.
    """
    code = _CODE_OF.get(array.dtype)
    if code is None:
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
        code = _CODES[dtype_name(array)]
    size = array.dtype.itemsize
    if array.ndim > _MAX_DIMS or (not array.flags.aligned and any(stride % size for stride in array.strides)):
        array = np.ascontiguousarray(array).reshape(array.shape[0], math.prod(array.shape[1:]))
    return array, code


def reference_fingerprint(array: Array, sketch_size: int = SKETCH_SIZE) -> Fingerprint:
    """Return the same by NumPy alone."""
    if not 1 <= sketch_size <= SKETCH_BLOCK:
        raise ValueError(f"a sketch of {sketch_size} sums")
    values = to_float64(array).reshape(-1)
    finite_mask = np.isfinite(values)
    finite = values[finite_mask]
    some = finite.size > 0
    with np.errstate(over="ignore"):
        abs_sum = _saturate(np.abs(finite).sum())
    return Fingerprint(
        dtype=dtype_name(array),
        shape=tuple(int(n) for n in array.shape),
        hash=hash_bytes(canonical_bytes(array)),
        nz_count=int(np.count_nonzero(finite)),
        abs_sum=abs_sum,
        min=float(finite.min()) if some else 0.0,
        max=float(finite.max()) if some else 0.0,
        mean=_mean(finite) if some else 0.0,
        l2=l2_norm(finite),
        nan_count=int(np.isnan(values).sum()),
        inf_count=int(np.isinf(values).sum()),
        sketch=sketch(np.where(finite_mask, values, 0.0), sketch_size),
    )


def _mean(values: Float64) -> float:
    """Return the mean, scaled by the largest element where the plain sum overflows (to inf, or inf − inf)."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(values.mean())
    if np.isfinite(mean):
        return mean
    top = np.abs(values).max()
    return float(top * (values / top).mean())


def l2_norm(values: Float64) -> float:
    """Return the Euclidean norm, scaled by the largest element where squares would over- or underflow."""
    top = float(np.abs(values).max()) if values.size else 0.0
    if top == 0.0 or 1e-100 < top < 1e100:
        return float(np.sqrt(np.square(values).sum()))
    with np.errstate(over="ignore", under="ignore"):
        return _saturate(top * np.sqrt(np.square(values / top).sum()))


def sketch(values: Float64, size: int = SKETCH_SIZE) -> tuple[float, ...]:
    """Return the signed bucket sums of a flat float64 array (count sketch: Charikar, Chen, Farach-Colton 2002).

    Element i goes to bucket i mod size with `sketch_signs`' sign. ‖sketch(x) − sketch(y)‖² estimates ‖x − y‖² with
    relative standard deviation √(2/size), so the norm itself with about half that; with at most `size` elements
    there is one a bucket and the norm is exact.
    """
    totals = np.zeros(size, dtype=np.float64)
    block = SKETCH_BLOCK // size * size
    for start in range(0, values.size, block):
        with np.errstate(over="ignore"):
            totals += _block_sums(values[start : start + block], start, size)
        totals = np.clip(totals, -_MAX, _MAX)
    return tuple(float(v) for v in totals)


def _block_sums(values: Float64, start: int, size: int) -> Float64:
    """Return one block's bucket sums, each added up in order.

    np.add.reduce over axis 0 adds row after row, but a single column pairwise, so that one is accumulated.
    """
    signed = np.zeros(-(-values.size // size) * size, dtype=np.float64)
    signed[: values.size] = values * sketch_signs(start, values.size)
    with np.errstate(over="ignore"):
        if size == 1:
            sums = np.add.accumulate(signed)[-1:]
        else:
            sums = np.add.reduce(signed.reshape(-1, size), axis=0)
    return np.clip(sums, -_MAX, _MAX)


_MAX = float(np.finfo(np.float64).max)


def _saturate(value: float | np.floating[npt.NBitBase]) -> float:
    """Return the value, held inside float64's finite range: a statistic is never infinite."""
    return float(np.clip(value, -_MAX, _MAX))


@lru_cache(maxsize=64)
def sketch_signs(start: int, count: int) -> Float64:
    """Return ±1 for elements start..start+count-1: the top bit of SplitMix64's output for counter i (Steele 2014)."""
    z = np.arange(start + 1, start + 1 + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    signs = 1.0 - 2.0 * (z >> np.uint64(63)).astype(np.float64)
    signs.flags.writeable = False
    return signs
