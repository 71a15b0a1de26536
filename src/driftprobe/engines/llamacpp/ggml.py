"""Tensors of ggml, read and written where they are: the struct, the library behind it, and whether the two agree.

ggml counts axes from the innermost: `ne[0]` runs fastest, `nb[0]` is the bytes of one element or block. Arrays are
handed out outermost first, as everywhere else here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from driftprobe.errors import EngineError, ModelError
from driftprobe.fingerprint import Array

DIMENSIONS, SOURCES, NAME = 4, 10, 64
_TYPES: dict[int, Any] = {0: np.float32, 1: np.float16, 24: np.int8, 25: np.int16, 26: np.int32, 27: np.int64,
                          28: np.float64, 30: ml_dtypes.bfloat16}  # fmt: skip
"""ggml's types that NumPy has as well."""
TYPE_NUMBERS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
"""Types that a cache may have."""


class _Struct(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h, as far as it is read here; `check_layout` says whether a build has it so."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * DIMENSIONS),
        ("nb", ctypes.c_size_t * DIMENSIONS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * NAME),
    )


class _Library:
    """The functions of ggml that are called here, found once and typed."""

    def __init__(self) -> None:
        from llama_cpp import _ggml  # its folder is where the package keeps the libraries of this build
        from llama_cpp._ctypes_extensions import load_shared_library

        try:
            handle = load_shared_library("ggml-base", _ggml.libggml_base_path)
        except (FileNotFoundError, OSError, RuntimeError):  # a static build has everything in one library
            handle = _ggml.libggml
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self.name = _typed(handle, "ggml_get_name", ctypes.c_char_p, pointer)
        self.op = _typed(handle, "ggml_op_desc", ctypes.c_char_p, pointer)
        self.type_name = _typed(handle, "ggml_type_name", ctypes.c_char_p, ctypes.c_int)
        self.nbytes = _typed(handle, "ggml_nbytes", size, pointer)
        self.elements = _typed(handle, "ggml_nelements", ctypes.c_int64, pointer)
        self.data = _typed(handle, "ggml_get_data", pointer, pointer)
        self.block = _typed(handle, "ggml_blck_size", ctypes.c_int64, ctypes.c_int)
        self.get = _typed(handle, "ggml_backend_tensor_get", None, pointer, pointer, size, size)
        self.set = _typed(handle, "ggml_backend_tensor_set", None, pointer, pointer, size, size)


def _typed(handle: Any, name: str, result: Any, *arguments: Any) -> Any:
    try:
        function = getattr(handle, name)
    except AttributeError as error:
        raise unknown_build(f"{name} is missing", "a build that exports ggml's tensor functions") from error
    function.restype, function.argtypes = result, list(arguments)
    return function


_LIBRARY: list[_Library] = []


def library() -> _Library:
    """Return ggml's library, opened once."""
    if not _LIBRARY:
        _LIBRARY.append(_Library())
    return _LIBRARY[0]


def unknown_build(measured: str, allowed: str) -> ModelError:
    """Return the error that says that this build of llama.cpp is not read, as its structs are other ones."""
    return ModelError(
        "this build of llama.cpp has another layout", where="llama_cpp", measured=measured, allowed=allowed,
        next_step="pip install 'llama-cpp-python==0.3.36', the version that this was written for",
    )  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor of a graph, valid while the call that handed it out lasts; a cache's, as long as its context."""

    address: int

    @cached_property
    def _struct(self) -> _Struct:
        return _Struct.from_address(self.address)

    @property
    def name(self) -> str:
        """Its name, which need not be its own alone."""
        return bytes(self._struct.name).decode("utf-8", "replace")

    @property
    def op(self) -> str:
        """The op that makes it: `MUL_MAT`, `ROPE`, …; `SWIGLU` and its like for the unary and gated ones."""
        return str(library().op(self.address).decode())

    @property
    def type_name(self) -> str:
        """ggml's name of its type: `f32`, `q8_0`."""
        return str(library().type_name(self._struct.type).decode())

    @property
    def shape(self) -> tuple[int, ...]:
        """All four axes, outermost first."""
        return tuple(int(n) for n in reversed(self._struct.ne))

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes between neighbours along each axis, outermost first."""
        return tuple(int(n) for n in reversed(self._struct.nb))

    @property
    def owner(self) -> Tensor:
        """The tensor that this is a view of; itself where it is none."""
        found = self._struct.view_src
        return Tensor(found) if found else self

    def source(self, index: int) -> Tensor | None:
        """Return one of the op's inputs."""
        found = self._struct.src[index]
        return Tensor(found) if found else None

    def parameter(self, index: int) -> float:
        """Return one of the op's parameters, read as a float."""
        return float(np.int32(self._struct.op_params[index]).view(np.float32))

    def content(self) -> bytearray:
        """Return a copy of the bytes from its first element to its last, those in between that it skips included."""
        count = int(library().nbytes(self.address))
        held = bytearray(count)
        if count:
            library().get(self.address, (ctypes.c_char * count).from_buffer(held), 0, count)
        return held

    def write(self, content: bytes | bytearray) -> None:
        """Put bytes in place of its own, from the first element on."""
        held = (ctypes.c_char * len(content)).from_buffer_copy(content)
        library().set(self.address, held, 0, len(content))

    def array(self) -> Array:
        """Return a copy of its elements in their own dtype; blocks of a quantised type as float32, which holds them.

        Raises EngineError for a quantised tensor whose elements do not stand block by block.
        """
        dtype = _TYPES.get(self._struct.type)
        held = self.content()
        if dtype is not None:
            flat = np.frombuffer(held, dtype=np.uint8)
            made = np.ndarray(self.shape, dtype, buffer=flat, strides=self.strides)
            return np.ascontiguousarray(made)
        return self._dequantised(np.frombuffer(held, dtype=np.uint8))

    def _dequantised(self, held: Any) -> Array:
        import gguf

        kind = gguf.GGMLQuantizationType(self._struct.type)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape, strides = self.shape, self.strides
        if shape[-1] % block or strides[-1] != size:
            raise EngineError(
                "a quantised tensor that is not read", where=self.name, measured=f"{shape} of {self.type_name}",
                allowed=f"whole blocks of {block} along the last axis", next_step="use another --cache-type",
            )  # fmt: skip
        row = shape[-1] // block * size
        rows = np.ndarray((*shape[:-1], row), np.uint8, buffer=held, strides=(*strides[:-1], 1))
        flat = gguf.quants.dequantize(np.ascontiguousarray(rows).reshape(-1, row), kind)
        return np.asarray(flat, dtype=np.float32).reshape(shape) + np.float32(0)  # an empty block gives -0.0, and is 0


def check_layout(tensor: Tensor) -> None:
    """Compare what the struct says of a tensor with what ggml's own functions say. Raises ModelError."""
    lib, struct = library(), tensor._struct
    says = {
        "name": (bytes(struct.name), lib.name(tensor.address)),
        "elements": (int(np.prod(tensor.shape)), lib.elements(tensor.address)),
        "data": (struct.data, lib.data(tensor.address)),
        "bytes": (_span(tensor), lib.nbytes(tensor.address)),
    }
    for what, (read, told) in says.items():
        if read != told:
            raise unknown_build(f"ggml_tensor: {what} is read as {read!r}, and is {told!r}", "the struct of ggml.h")


def _span(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    block = int(library().block(tensor._struct.type))
    pairs = list(zip(tensor.shape, tensor.strides, strict=True))
    (inner, first), outer = pairs[-1], pairs[:-1]
    along = inner * first // block if block > 1 else first + (inner - 1) * first
    return along + sum((n - 1) * stride for n, stride in outer)
