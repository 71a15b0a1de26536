"""Payloads: whole tensors beside a trace, in safetensors files, checked against their record's hash when read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

from driftprobe.errors import OutputError, TraceError
from driftprobe.fingerprint import DTYPES, Array, canonical_bytes, dtype_name, hash_bytes
from driftprobe.trace import Record

FOLDER = "payloads"
_CODES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def payload_file(trace: str, arm: str) -> str:
    """Return the payload file of an arm, relative to the traces folder; `trace` is the trace's name without ending."""
    return f"{FOLDER}/{trace}.{arm}.safetensors"


def write_payloads(path: Path, arrays: dict[str, Array]) -> None:
    """Write tensors to one safetensors file. Raises OutputError where the place cannot be written."""
    body = {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())}
    partial = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(body, str(partial))
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(
            "cannot write payloads", where=str(path), measured=str(error), allowed="a writable place with room left",
            next_step="free some space, choose another place with --out, or run with --payload none",
        ) from error  # fmt: skip


class Payloads:
    """The payload files below one traces folder, opened when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, dict[str, Array]] = {}
        self._checked: dict[tuple[object, ...], Array] = {}
        """Reference, hash, dtype and shape of a record -> its tensor, which is the one that they describe."""

    def is_missing(self, record: Record) -> bool:
        """Whether a record names a payload file that is not there."""
        file = "" if record.payload is None else record.payload.partition("#")[0]
        return bool(file) and not (self.folder / file).exists()

    def get(self, record: Record) -> Array | None:
        """Return a record's tensor, or None where it carries no payload.

        Raises TraceError where the file is missing or leads out of the folder, or the tensor is not the one that
        the record's hash, dtype and shape describe.
        """
        if record.payload is None:
            return None
        described = (record.payload, record.hash, record.dtype, record.shape)
        if described not in self._checked:
            self._checked[described] = self._described(record, *record.payload.split("#", 1))
        return self._checked[described]

    def _described(self, record: Record, file: str, name: str = "") -> Array:
        if file not in self._files:
            self._files[file] = self._open(file)
        array = self._files[file].get(name)
        if array is None:
            raise _bad(record, "no such tensor in the payload file", file)
        if dtype_name(array) != record.dtype or array.shape != record.shape:
            raise _bad(record, "payload of another dtype or shape", f"{dtype_name(array)} {list(array.shape)}")
        if hash_bytes(canonical_bytes(array)) != record.hash:
            raise _bad(record, "payload does not hash to its record", hash_bytes(canonical_bytes(array)))
        return array

    def _open(self, file: str) -> dict[str, Array]:
        problem = TraceError(
            "payload file cannot be read", where=file, measured="missing, damaged, or outside the trace's folder",
            allowed="a safetensors file below the trace's folder",
            next_step="copy the whole traces folder, or run again",
        )  # fmt: skip
        try:
            path = (self.folder / file).resolve()
            if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
                raise problem
            parts = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise problem from error
        return {name: _array(part) for name, part in parts if part["dtype"] in _CODES}


def _array(part: dict[str, object]) -> Array:
    dtype = DTYPES[_CODES[str(part["dtype"])]]
    array: Array = np.frombuffer(part["data"], dtype=dtype).reshape(part["shape"])  # type: ignore[call-overload]
    return array


def _bad(record: Record, what: str, measured: str) -> TraceError:
    return TraceError(
        what, where=f"{record.payload} of {record.arm} {record.phase} layer {record.layer} {record.tensor}",
        measured=measured, allowed=f"{record.hash}, {record.dtype} {list(record.shape or ())}",
        next_step="copy the whole traces folder again, or run again",
    )  # fmt: skip
