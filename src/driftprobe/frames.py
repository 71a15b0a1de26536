"""to_frame(): the records of a run as a data frame of polars or pandas, whichever is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from driftprobe.errors import UsageError
from driftprobe.judgement import Cell, Judgement
from driftprobe.trace import Record, Trace

LIBRARIES = ("polars", "pandas")
_OF_THE_RECORD = {
    "arm": "text", "phase": "text", "step": "int", "layer": "int", "tensor": "text", "token_id": "int",
    "logical_tok_idx": "int", "pos_id": "int", "dtype": "text", "hash": "text", "nz_count": "int", "abs_sum": "float",
    "min": "float", "max": "float", "mean": "float", "l2": "float", "nan_count": "int", "inf_count": "int",
    "source": "text",
}  # fmt: skip
COLUMNS = {
    "file": "text", "mode": "text", "prompt": "text", "rung": "text", **_OF_THE_RECORD, "shape": "text",
    "drift": "float", "evidence": "text", "floor": "float", "excess": "float", "status": "text", "max_abs": "float",
    "ulp": "float",
}  # fmt: skip
"""Column -> kind. Those from `drift` on are of records that were judged, decode's (arms D and A); else null."""
_KINDS = {
    "polars": {"text": "String", "int": "Int64", "float": "Float64"},
    "pandas": {"text": "string", "int": "Int64", "float": "Float64"},
}
_INT64 = 1 << 63


def to_frame(judgement: Judgement, traces: Sequence[Trace], library: str | None = None) -> Any:
    """Return one row a record, in the order of the traces.

    `library` is polars or pandas; None takes the first that is installed. Raises UsageError where neither is, or for
    another name.
    """
    name = _library(library)
    columns: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    for row in _rows(judgement, traces):
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    frames = import_module(name)
    if name == "polars":
        schema = {column: getattr(frames, _KINDS[name][kind]) for column, kind in COLUMNS.items()}
        return frames.DataFrame(columns, schema=schema)
    return frames.DataFrame(
        {column: frames.array(values, dtype=_KINDS[name][COLUMNS[column]]) for column, values in columns.items()}
    )


def _library(wanted: str | None) -> str:
    if wanted is not None and wanted not in LIBRARIES:
        raise UsageError("unknown library of frames", where="library", measured=repr(wanted)[:80],
                         allowed=", ".join(LIBRARIES), next_step="choose one of them, or leave it out")  # fmt: skip
    found = [name for name in ([wanted] if wanted else LIBRARIES) if find_spec(name) is not None]
    if not found:
        raise UsageError("no library of data frames", where="Result.to_frame()",
                         measured=f"{wanted or ' and '.join(LIBRARIES)} not installed", allowed="polars or pandas",
                         next_step=f"pip install {wanted or LIBRARIES[0]}")  # fmt: skip
    return found[0]


def _rows(judgement: Judgement, traces: Sequence[Trace]) -> Iterator[tuple[Any, ...]]:
    judged = {id(cell.candidate): cell for cell in _cells(judgement)}
    for trace in traces:
        header = trace.header
        for record in trace.records:
            yield (trace.path, header.mode, header.prompt, header.rung,
                   *(_value(getattr(record, name), kind) for name, kind in _OF_THE_RECORD.items()),
                   None if record.shape is None else "x".join(map(str, record.shape)),
                   *_measured(judged.get(id(record)), record))  # fmt: skip


def _cells(judgement: Judgement) -> Iterator[Cell]:
    for mode in judgement.modes.values():
        for item in mode.prompts:
            for judged in (item, *([item.ladder.judged] if item.ladder else [])):
                yield from judged.aligned_cells
                yield from judged.cells


def _value(value: Any, kind: str) -> Any:
    """Return a field; a whole number that no column can hold becomes null."""
    return None if kind == "int" and value is not None and not -_INT64 <= value < _INT64 else value


def _measured(cell: Cell | None, record: Record) -> tuple[Any, ...]:
    if cell is None:
        return (None,) * 7
    drift = cell.drift
    return (drift.value, drift.rung, cell.floor.value, cell.excess, cell.status.value, drift.max_abs, drift.ulp)
