"""Constants of the model in a trace: records of arm W, written with a capture or added to a trace that failed.

Small ones are always there; the matrices of an op are large, and are added once a judgement has named the op.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from driftprobe.engines.base import Constant
from driftprobe.fingerprint import Array, fields_and_rows
from driftprobe.payload import Payloads, payload_file, write_payloads
from driftprobe.trace import CONSTANTS, Header, Record, Trace
from driftprobe.trace_checks import CONSTANT_PHASE
from driftprobe.trace_file import TraceWriter

BUDGET = 256 * 1024 * 1024
"""Bytes of the largest set of matrices that is added to one trace."""


def constant_record(constant: Constant, header: Header, trace: str) -> Record:
    """Return the record of a constant; `trace` is the trace file's name without its ending."""
    found, _ = fields_and_rows(constant.array, header.sketch_size, rows=False)
    record = Record(
        prompt=header.prompt, phase=CONSTANT_PHASE, layer=constant.layer, tensor=constant.name, arm=CONSTANTS, **found
    )
    return replace(record, payload=f"{payload_file(trace, CONSTANTS)}#{tensor_name(record)}")


def tensor_name(record: Record) -> str:
    """Return the name of a constant's tensor in its payload file."""
    return f"{'model' if record.layer is None else record.layer}.{record.tensor}"


def add_constants(trace: Trace, constants: Iterable[Constant], folder: Path) -> tuple[int, list[str]]:
    """Add constants, beyond those that it has, to a trace in a folder, and rewrite it there.

    Returns how many were new, and a line for each that the budget leaves out. An incomplete trace is left as it is:
    writing it again would give it a footer.
    """
    if trace.damage or trace.foreign:
        return 0, []
    name = trace.path.removesuffix(".jsonl")
    known = {(r.layer, r.tensor) for r in trace.records if r.arm == CONSTANTS}
    new: list[Record] = []
    arrays: dict[str, Array] = {}
    left_out, spent = [], 0
    for constant in constants:
        size = int(constant.array.nbytes)
        if (constant.layer, constant.name) in known:
            continue
        if spent + size > BUDGET:
            left_out.append(f"{constant.name} of layer {constant.layer} is not kept: {size} bytes beside {spent}, "
                            f"budget {BUDGET}")  # fmt: skip
            continue
        known.add((constant.layer, constant.name))
        spent += size
        record = constant_record(constant, trace.header, name)
        new.append(record)
        arrays[tensor_name(record)] = constant.array
    if new:
        _write(trace, new, arrays, folder)
    return len(new), left_out


def _write(trace: Trace, new: list[Record], arrays: dict[str, Array], folder: Path) -> None:
    payloads = Payloads(folder)
    for record in trace.records:
        if record.arm == CONSTANTS and record.payload is not None:
            array = payloads.get(record)
            if array is not None:
                arrays[tensor_name(record)] = array
    write_payloads(folder / payload_file(trace.path.removesuffix(".jsonl"), CONSTANTS), arrays)
    partial = folder / f".{trace.path}.part"
    with TraceWriter(partial, trace.header) as writer:
        for record in (*trace.records, *new):
            writer.record(record)
        for event in trace.events:
            writer.event(event)
    partial.replace(folder / trace.path)
