"""Cache rows as a coarser dtype would hold them: every dtype and scale that caches are commonly kept in.

Axes: S rows, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from driftprobe.fingerprint import DTYPES, Float64

FLOATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
GRIDS = {"int8": 127.0, "int4": 7.0}
"""Largest code of a symmetric integer grid: a value v is kept as round(v/s), with s = absmax/127 or absmax/7."""
SCALED = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
"""Largest finite value of a float8, onto which a scale maps the largest element (OCP OFP8, table 1)."""
Either = tuple[Float64, Float64]


def rounded(rows_SGD: Float64, cached: int, slack: float) -> Iterator[tuple[str, Either]]:
    """Yield each dtype with the rows rounded to it, twice: of values a relative `slack` smaller, and larger.

    The two differ only where a value is so close to the middle between two codes that rounding errors decide. Scales
    are taken of the `cached` rows.
    """
    for dtype in FLOATS:
        yield dtype, _both(rows_SGD, slack, dtype, None)
    for scale in _scales(rows_SGD, cached):
        for dtype, largest in (*GRIDS.items(), *SCALED.items()):
            yield dtype, _both(rows_SGD, slack, dtype, scale / largest)


def _both(rows_SGD: Float64, slack: float, dtype: str, step: Float64 | None) -> Either:
    lower, upper = (_round(rows_SGD * (1.0 + sign * slack), dtype, step) for sign in (-1.0, 1.0))
    return lower, upper


def _round(values: Float64, dtype: str, step: Float64 | None) -> Float64:
    codes = values if step is None else np.divide(values, step, out=np.zeros_like(values), where=step > 0.0)
    if dtype in GRIDS:
        codes = np.clip(np.rint(codes), -GRIDS[dtype], GRIDS[dtype])
    else:
        largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)  # type: ignore[no-untyped-call]
        codes = np.clip(codes, -largest, largest).astype(DTYPES[dtype]).astype(np.float64)
    return codes if step is None else codes * step


def _scales(rows_SGD: Float64, cached: int) -> Iterator[Float64]:
    """Yield the largest magnitude of each row and head, each row, each head, each channel, and of all."""
    sizes = abs(rows_SGD)
    yield sizes.max(axis=2, keepdims=True)
    yield sizes.max(axis=(1, 2), keepdims=True)
    for axes in ((0, 2), (0,), (0, 1, 2)):
        yield np.broadcast_to(sizes[:cached].max(axis=axes, keepdims=True), (len(sizes), *sizes.shape[1:]))
