"""B3_66_V2_ANALYSIS.tsv: one row for each compared pair, for a spreadsheet or a script.

Fields are never quoted. A backslash, tab, line break or unprintable character in a name is written as a Python-style
escape. Numbers are the shortest that read back to the same float64; an empty field is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

from driftprobe.floor import LIMIT
from driftprobe.judgement import Cell, Judgement
from driftprobe.report.facts import all_prompts
from driftprobe.report.text import printable
from driftprobe.trace import Trace

COLUMNS = (
    "mode", "prompt", "step", "phase", "layer", "tensor", "token_id", "logical_tok_idx", "pos_id", "shape", "dtype",
    "prefill_hash", "decode_hash", "equal", "drift", "rung", "max_abs", "ulp", "floor", "floor_source", "excess",
    "limit", "status", "aligned_drift", "aligned_excess", "source", "ladder_drift", "ladder_excess", "slope",
)  # fmt: skip


def render(judgement: Judgement, traces: Sequence[Trace]) -> str:
    """Return the table, a header line first."""
    lines = ["\t".join(COLUMNS)]
    for item in all_prompts(judgement):
        aligned = {_key(cell): cell for cell in item.aligned_cells}
        finer = {_key(cell): cell for cell in item.ladder.judged.cells} if item.ladder else {}
        slopes = {(s.layer, s.tensor): s.slope for s in item.ladder.slopes} if item.ladder else {}
        for cell in item.cells:
            row = _row(item.mode, cell, aligned.get(_key(cell)), finer.get(_key(cell)))
            lines.append("\t".join(map(_field, (*row, slopes.get((cell.layer, cell.tensor))))))
    return "\n".join(lines) + "\n"


def _key(cell: Cell) -> tuple[int, int | None, str, int | None]:
    return (cell.step, cell.layer, cell.tensor, cell.reference.logical_tok_idx)


_Value = str | int | float | bool | None


def _row(mode: str, cell: Cell, aligned: Cell | None, finer: Cell | None) -> tuple[_Value, ...]:
    prefill, decode, drift = cell.reference, cell.candidate, cell.drift
    shape = decode.shape if decode.shape is not None else prefill.shape
    return (
        mode, cell.prompt, cell.step, decode.phase, cell.layer, cell.tensor, decode.token_id, decode.logical_tok_idx,
        decode.pos_id, None if shape is None else "x".join(map(str, shape)), decode.dtype or prefill.dtype,
        prefill.hash, decode.hash, drift.equal, drift.value, drift.rung, drift.max_abs, drift.ulp, cell.floor.value,
        cell.floor.source, cell.excess, LIMIT, cell.status.value, None if aligned is None else aligned.drift.value,
        None if aligned is None else aligned.excess,
        "recomputed" if "recomputed" in (prefill.source, decode.source) else decode.source,
        None if finer is None else finer.drift.value, None if finer is None else finer.excess,
    )  # fmt: skip


def _field(value: _Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return printable(value.replace("\\", "\\\\")) if isinstance(value, str) else repr(value)
