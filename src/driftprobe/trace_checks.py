"""The MUSTs that a line shows by itself: JSON of one meaning, and fields that can all be true of one tensor.

Pure functions; `trace_file.py` calls them for every line that is read or written. Numbers are those of
docs/trace-format.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from driftprobe.fingerprint import DTYPES, SKETCH_BLOCK, SKETCH_SIZE
from driftprobe.taps import BY_NAME, CACHE_TAPS, Scope

if TYPE_CHECKING:
    from driftprobe.trace import Header, Record

CONSTANT_ARM = "W"
"""The arm of the model's constants."""
CONSTANT_PHASE = "constant"
"""Their phase; their step is 0."""
Fault = tuple[str, str, str, str]
"""What is wrong, what was measured, what is allowed, how to mend it."""


def json_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a line (M1, M2, M9). Raises ValueError, in a reader's words, for anything else."""
    try:
        text = raw.decode("utf-8")
        body = _READER.decode(text)
        if isinstance(body, dict) and not _finite(body.values()):
            _TELLING.decode(text)  # raises, in the number's own words
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(body, dict):
        raise ValueError(f"{type(body).__name__}, not an object")
    if b"\\u" in raw and b"\\ud" in raw.lower():
        json.dumps(body, ensure_ascii=False).encode()  # a lone surrogate, which no report could print, raises here
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicated key {next(n for n in names if names.count(n) > 1)!r} in one object")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON; a statistic is finite (count NaN and infinity instead)")


def _finite(values: Iterable[Any]) -> bool:
    """Whether every float in parsed JSON is finite: 1e999 is read as infinity.

    Looked for behind the parser, as one that calls a function for every float takes a third longer.
    """
    for value in values:
        if isinstance(value, float):
            if not math.isfinite(value):
                return False
        elif isinstance(value, dict):
            if not _finite(value.values()):
                return False
        elif isinstance(value, list):
            try:
                numbers = all(map(math.isfinite, value))
            except (TypeError, OverflowError):  # not numbers alone, or an integer beyond any float
                numbers = _finite(value)
            if not numbers:
                return False
    return True


def _told(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text)


_READER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_TELLING = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_told)


def record_faults(record: Record, sketch_size: int | None = None) -> list[Fault]:
    """Return what a record says that cannot all be true (M7, M12 to M18, M23)."""
    found = _place_faults(record) + _constant_faults(record)
    if record.dtype is not None and record.dtype not in DTYPES:
        found.append(("unknown dtype", record.dtype, ", ".join(DTYPES), "use one of the format's names"))
    found += _shape_faults(record, sketch_size) + statistic_faults(record)
    if record.payload is not None and not _safe_reference(record.payload):
        found.append(("payload leaves the trace's folder", record.payload, "FILE#NAME, FILE below the trace's folder",
                      "write a relative path without `..`"))  # fmt: skip
    return found


def name_fault(field_name: str, value: str) -> Fault | None:
    """Return what is wrong with the name of a prompt or mode: both become parts of file names and of reports."""
    if value and value.isprintable() and not set(value) & set("/\\") and value not in (".", ".."):
        return None
    return (f"{field_name} cannot name a file", ascii(value), "printable characters, no slash, not empty",
            f"choose another {field_name}")  # fmt: skip


def header_faults(header: Header) -> list[Fault]:
    """Return what is wrong with a header (M6, M7, M24)."""
    faults = [name_fault("prompt", header.prompt), name_fault("mode", header.mode)]
    if not 1 <= header.sketch_size <= SKETCH_BLOCK:
        faults.append(("impossible sketch size", str(header.sketch_size), f"1 to {SKETCH_BLOCK}",
                       f"write {SKETCH_SIZE}; leave `sketch` out of the records where there is none"))  # fmt: skip
    negative = [f"{name} {number}" for name, number in _header_counts(header) if number < 0]
    if negative:
        faults.append(("negative count in the header", ", ".join(negative[:5]), "0 or more", "write what was run"))
    if header.token_ids and header.prompt_len > len(header.token_ids):
        faults.append(("prompt longer than its tokens", f"prompt_len {header.prompt_len}, {len(header.token_ids)} "
                       "token_ids", "prompt_len of token_ids or fewer", "count the prompt's own tokens"))  # fmt: skip
    return [fault for fault in faults if fault is not None]


def _header_counts(header: Header) -> Iterator[tuple[str, int]]:
    engine = header.engine
    yield from (("prompt_len", header.prompt_len), ("steps", header.steps))
    for name in ("layers", "heads", "kv_heads", "vocabulary", "max_positions"):
        yield f"engine.{name}", getattr(engine, name)
    yield from ((f"layer of {tensor}", layer) for tensor, layers in header.taps.items() for layer in layers)
    for read in header.reads:
        yield from ((f"step of a read of {read.arm}", read.step), (f"position of a read of {read.arm}", read.position))


_DECODE = re.compile("decode([0-9]{1,9})")


def _place_faults(record: Record) -> list[Fault]:
    found = []
    if not (record.arm and record.phase and record.tensor and record.hash):
        empty = [name for name in ("arm", "phase", "tensor", "hash") if not getattr(record, name)]
        found.append(("empty name", ", ".join(empty), "one character or more", "name it"))
    tap = BY_NAME.get(record.tensor)
    inside = record.layer is not None
    if tap is not None and inside != (tap.scope is Scope.LAYER):
        found.append((f"{record.tensor} in the wrong place", f"layer {record.layer}",
                      "null" if inside else "the number of its layer", "correct the layer"))  # fmt: skip
    decode = _DECODE.fullmatch(record.phase)
    if decode and int(decode[1]) != record.step:
        found.append(("phase disagrees with the step", f"{record.phase}, step {record.step}", "decodeK at step K",
                      "count both from 0"))  # fmt: skip
    return found


def _constant_faults(record: Record) -> list[Fault]:
    """Constants have an arm and a phase of their own, no step and no token (M23)."""
    if record.arm != CONSTANT_ARM and record.phase != CONSTANT_PHASE:
        return []
    fits = record.arm == CONSTANT_ARM and record.phase == CONSTANT_PHASE and record.step == 0
    if fits and record.logical_tok_idx is None and record.token_id is None and record.tensor not in BY_NAME:
        return []
    measured = f"arm {record.arm}, {record.phase}, step {record.step}, {record.tensor}"
    return [("a constant that is none", measured,
             f"arm {CONSTANT_ARM}, phase {CONSTANT_PHASE}, step 0, no token, and not the name of a tap",
             "write results under another arm, and constants under this one")]  # fmt: skip


def _shape_faults(record: Record, sketch_size: int | None) -> list[Fault]:
    found = []
    shape = record.shape
    if shape is not None:
        elements = 1
        for n in shape:
            elements *= n
        counted = (record.nz_count or 0) + (record.nan_count or 0) + (record.inf_count or 0)
        if any(n < 0 for n in shape) or counted > elements:
            found.append(("shape disagrees with the counts", f"shape {list(shape)}, {counted} elements counted",
                          "at most the product of the shape", "write the tensor's true shape"))  # fmt: skip
        if record.rows is not None and (not shape or len(record.rows) != shape[0]):
            found.append(("shape disagrees with the rows", f"shape {list(shape)}, {len(record.rows)} row hashes",
                          "one hash for each row of the first axis", "hash every row once"))  # fmt: skip
    if record.rows is not None and record.tensor not in CACHE_TAPS:
        found.append(("row hashes on a tap without rows", record.tensor, ", ".join(sorted(CACHE_TAPS)),
                      "leave `rows` out"))  # fmt: skip
    if record.sketch is not None and sketch_size is not None and len(record.sketch) != sketch_size:
        found.append(("sketch of the wrong size", f"{len(record.sketch)} sums", f"{sketch_size}, as the header says",
                      "write header.sketch_size sums"))  # fmt: skip
    return found


_MOMENTS = ("abs_sum", "min", "max", "mean", "l2")
_COUNTS = ("step", "layer", "logical_tok_idx", "nz_count", "abs_sum", "l2", "nan_count", "inf_count", "row_start",
           "order")  # fmt: skip
"""Fields that are never negative."""
_moments_of, _counts_of = attrgetter(*_MOMENTS), attrgetter(*_COUNTS)


def statistic_faults(record: Record) -> list[Fault]:
    """Return the statistics of a record that no tensor can have (M9, M17)."""
    found = []
    numbers = [value for value in _moments_of(record) if value is not None]
    if not (math.isfinite(sum(numbers)) and math.isfinite(sum(record.sketch or ()))) and not all(
        map(math.isfinite, [*numbers, *(record.sketch or ())])  # large finite numbers may have no finite sum
    ):
        found.append(("NaN or infinity in a statistic", f"{_MOMENTS} {numbers}, or the sketch", "finite numbers",
                      "run it over the finite elements, and count the others"))  # fmt: skip
    if any(value is not None and value < 0 for value in _counts_of(record)):
        negative = [name for name in _COUNTS if (getattr(record, name) or 0) < 0]
        found.append(("negative statistic", ", ".join(f"{n} {getattr(record, n)}" for n in negative), "0 or more",
                      "compute it as docs/trace-format.md says"))  # fmt: skip
    if record.min is not None and record.max is not None and record.min > record.max:
        found.append(
            ("min above max", f"{record.min} > {record.max}", "min ≤ max", "compute both over finite elements")
        )
    if record.top is not None and len(record.top.ids) != len(record.top.values):
        found.append(("top of two lengths", f"{len(record.top.ids)} ids, {len(record.top.values)} values",
                      "one value for each id", "write both from one sorted list"))  # fmt: skip
    return found


def _safe_reference(reference: str) -> bool:
    file, mark, name = reference.partition("#")
    parts = file.replace("\\", "/").split("/")
    return bool(mark and name and file) and file.isprintable() and parts[0] not in ("", "~") and not (
        ".." in parts or ":" in file
    )  # fmt: skip
