"""include/driftprobe.h built as a shared library, and called through ctypes, for the tests."""

from __future__ import annotations

import ctypes as c
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from driftprobe.fingerprint import DTYPES, Array, Fingerprint, dtype_name

ROOT = Path(__file__).parent.parent
INCLUDE = ROOT / "include"
MAX_DIMS = 8
NONE = -(2**63)
OK, BAD_ARGUMENT, DUPLICATE, NO_MEMORY, NOT_WRITTEN = range(5)
_CODES = {name: code for code, name in enumerate(DTYPES)}


class Tensor(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("dtype", c.c_int),
        ("ndim", c.c_int),
        ("shape", c.c_int64 * MAX_DIMS),
        ("strides", c.c_int64 * MAX_DIMS),
    ]


class Print(c.Structure):
    _fields_ = [
        ("hash", c.c_uint64),
        *((name, c.c_int64) for name in ("nz_count", "nan_count", "inf_count")),
        *((name, c.c_double) for name in ("abs_sum", "min", "max", "mean", "l2")),
    ]


class Key(c.Structure):
    _fields_ = [
        ("arm", c.c_char_p),
        ("phase", c.c_char_p),
        ("step", c.c_int64),
        ("layer", c.c_int64),
        ("tensor", c.c_char_p),
        *((name, c.c_int64) for name in ("token_id", "position", "pos_id", "row_start")),
        ("recomputed", c.c_int),
    ]


class Header(c.Structure):
    _fields_ = [
        *((name, c.c_char_p) for name in ("prompt", "mode", "run", "prompt_text", "date")),
        ("token_ids", c.POINTER(c.c_int64)),
        ("token_count", c.c_size_t),
        *((name, c.c_int64) for name in ("prompt_len", "steps", "seed", "sketch_size")),
        ("reads", c.c_void_p),
        ("read_count", c.c_size_t),
        ("taps", c.c_void_p),
        ("tap_count", c.c_size_t),
        *((name, c.c_char_p) for name in ("engine", "version", "model", "dtype", "attention", "device")),
        *((name, c.c_int64) for name in ("layers", "heads", "kv_heads", "vocabulary", "max_positions")),
        ("casts", c.c_void_p),
        ("cast_count", c.c_size_t),
        ("payloads", c.c_int),
    ]


class Count(c.Structure):
    _fields_ = [("name", c.c_char_p), ("value", c.c_int64)]


def compiler(name: str = "cc") -> str:
    """Return a compiler that finds xxhash's header, or skip the test, saying what to install."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on this machine: install a C and C++ compiler")
    asked = subprocess.run([found, "-E", "-include", "xxhash.h", "-x", "c", "-"], input=b"", capture_output=True,
                           check=False)  # fmt: skip
    if asked.returncode:
        pytest.skip("xxhash.h is not installed: install Debian's libxxhash-dev, or your system's like it")
    return found


BUILDS = ("", "-DDRIFTPROBE_NO_AVX512", "-DDRIFTPROBE_SCALAR")
"""The header as this machine would run it, as one without AVX-512 would, and without any vectors."""


@lru_cache(maxsize=len(BUILDS))
def _built(folder: str, flag: str) -> c.CDLL:
    out = Path(folder) / f"probe{BUILDS.index(flag)}.so"
    command = [compiler(), "-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-shared", "-fPIC",
               *([flag] if flag else []), f"-I{INCLUDE}", str(ROOT / "tests/native/probe.c"), "-o", str(out),
               "-lm", "-pthread"]  # fmt: skip
    subprocess.run(command, check=True)
    return c.CDLL(str(out))


def library(folder: Path, flag: str = "") -> c.CDLL:
    """Return the header as a library, its layouts checked against those above."""
    made = _built(str(folder), flag)
    made.dp_default_header.restype = Header
    made.dp_make_key.restype = Key
    made.dp_make_key.argtypes = [c.c_char_p, c.c_char_p, c.c_int64, c.c_int64, c.c_char_p]
    made.dp_constant.argtypes = [c.c_void_p, c.c_int64, c.c_char_p, c.POINTER(Tensor)]
    made.dp_event.argtypes = [c.c_void_p, c.c_char_p, c.c_char_p, c.c_int64, c.POINTER(Count), c.c_size_t]
    made.dp_write.argtypes = [c.c_void_p, c.POINTER(Key), c.POINTER(Tensor)]
    made.dp_open.argtypes = [c.POINTER(c.c_void_p), c.c_char_p, c.POINTER(Header)]
    made.dp_flush.argtypes = made.dp_close.argtypes = made.dp_message.argtypes = [c.c_void_p]
    made.dp_message.restype = c.c_char_p
    made.dp_test_rows.argtypes, made.dp_test_rows.restype = [c.POINTER(Tensor), c.c_void_p], c.c_size_t
    made.dp_fingerprint_of.argtypes = [c.POINTER(Tensor), c.c_size_t, c.POINTER(Print), c.c_void_p]
    sizes = (c.c_size_t * 4).in_dll(made, "dp_test_sizes")
    assert list(sizes) == [c.sizeof(kind) for kind in (Tensor, Key, Header, Print)]
    return made


def tensor(array: Array) -> Tensor:
    """Return a view of an array for C; the array must outlive it."""
    item = Tensor(array.ctypes.data, _CODES[dtype_name(array)], array.ndim)
    for axis in range(array.ndim):
        item.shape[axis], item.strides[axis] = array.shape[axis], array.strides[axis] // array.itemsize
    return item


def fingerprint_in_c(made: c.CDLL, array: Array, size: int = 64) -> Fingerprint:
    """Return what the header makes of an array."""
    print_, sums = Print(), np.zeros(size)
    status = made.dp_fingerprint_of(c.byref(tensor(array)), size, c.byref(print_), sums.ctypes.data)
    assert status == OK
    return Fingerprint(
        dtype=dtype_name(array),
        shape=array.shape,
        hash=f"0x{print_.hash:016x}",
        **{name: getattr(print_, name) for name, _ in Print._fields_ if name != "hash"},
        sketch=tuple(float(v) for v in sums),
    )
