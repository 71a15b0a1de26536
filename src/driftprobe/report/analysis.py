"""B3_66_V2_ANALYSIS.md: everything that was measured, mode by mode and prompt by prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from driftprobe.climb import sides_of
from driftprobe.fingerprint import SKETCH_SIZE
from driftprobe.floor import LIMIT
from driftprobe.judgement import Cell, Determinism, Judgement, Reading, RowCheck, Status, TraceJudgement
from driftprobe.report import facts
from driftprobe.report.ladder import slopes
from driftprobe.report.text import (
    NOT_TOLD,
    blocks,
    bullets,
    code,
    count,
    listed,
    number,
    prose,
    table,
    tidy,
    times,
)
from driftprobe.taps import BY_NAME, execution_order, place
from driftprobe.trace import Record, Trace
from driftprobe.version import __version__

LARGEST = 10
"""Cells of the table of the largest."""
ACROSS = 9
"""Tap columns of one excess table, so that it fits a page."""
UNPAIRED_SHOWN = 100


def render(judgement: Judgement, traces: Sequence[Trace]) -> str:
    """Return the analysis as Markdown."""
    parts = [
        "# B3.66 v2 ANALYSIS",
        f"**Date**: {prose(facts.date(traces))}  \n"
        f"**Verdict**: **{judgement.verdict.value}**: {prose(facts.reason(judgement))}",
        *(
            f"> **Planted fault**: {code(name)}. This run tests the probe, not the engine."
            for name in facts.faults(traces)
        ),
        prose(facts.limits_words(judgement)),
        _legend(traces),
    ]
    for name in facts.mode_names(judgement):
        mode = judgement.modes.get(name)
        parts.append(f"## Mode {prose(name)}")
        if mode is None:
            parts.append(f"PENDING: not run. `{facts.run_command(name, traces)}` runs it.")
            continue
        parts.append(f"**{mode.verdict.value}**: {prose(facts.reason(mode))}. {facts.pass_fail(mode)}.")
        parts += [_prompt(item) for item in mode.prompts]
    return blocks([*parts, f"**Generated**: {prose(facts.generated(traces))} by driftprobe {__version__}"]) + "\n"


def _legend(traces: Sequence[Trace]) -> str:
    sums = min((trace.header.sketch_size for trace in traces), default=SKETCH_SIZE)
    error = math.sqrt(1 / (2 * sums))  # of the norm; its square has √(2/sums) (docs/trace-format.md)
    return (
        "Drift is ‖decode − prefill‖₂ / ‖prefill‖₂. The floor is the drift that arithmetic alone explains at a tap. "
        f"Excess is drift / floor; beyond {LIMIT:g} a tap fails. Evidence is the rung that a drift stands on: `hash` "
        f"(equal bit for bit), `payload` (whole tensors), `sketch` (an estimate, ± {error:.0%} of itself), "
        "`moments` (a lower bound)."
    )


def _prompt(item: TraceJudgement) -> str:
    return blocks([
        f"### {code(item.prompt)}, {prose(item.mode)}",
        f"**{item.verdict.value}**: {prose(item.reason)}  \n"
        f"**Reading**: {_reading(item.reading)}  \n"
        f"**Determinism**: {_determinism(item.determinism)}  \n"
        f"**Trace**: {code(item.file)}",
        _first(item),
        "#### Gates",
        table(("Gate", "Outcome", "Detail"), (
            (gate.name, "open" if gate.passed else "**SHUT**", prose(gate.detail)) for gate in item.gates
        )),
        "#### Excess, by layer and tap",
        _excess(item.cells),
        "#### The largest cells",
        _largest(item.cells),
        "#### Precision ladder",
        slopes(item.ladder),
        "#### Cache rows that are not all equal",
        _rows(item.decided_by.rows),
        "#### Controls",
        _controls(item.controls),
        "#### Detection limit, by tap",
        _detection(item.cells),
        "#### Records without a partner",
        _unpaired(item.unpaired),
    ])  # fmt: skip


def _first(item: TraceJudgement) -> str:
    first = item.first_failure
    if first is None:
        return ""
    return (
        f"First failure: {prose(facts.where(first))}, {' against '.join(map(prose, sides_of(first)))}: "
        f"{prose(facts.size_words(first))}. Root cause: {prose(first.root_cause)}."
    )


def _reading(reading: Reading) -> str:
    return prose(reading.words) if reading is Reading.NONE else f"{reading.value}: {prose(reading.words)}"


def _determinism(found: Determinism) -> str:
    if not found.checked:
        return "not checked: no arm was run twice"
    if found.equal:
        return "P' and D' repeat P and D bit for bit"
    return f"run-to-run drift up to {number(found.largest)}"


def _excess(cells: Sequence[Cell]) -> str:
    """Return tables of the largest excess over steps: a row a layer, the taps across, in pieces that fit a page."""
    if not cells:
        return "Nothing was compared."
    worst: dict[tuple[int | None, str], Cell] = {}
    for cell in cells:
        key = (cell.layer, cell.tensor)
        if key not in worst or _rank(cell) > _rank(worst[key]):
            worst[key] = cell
    taps = _taps(cell.tensor for cell in cells if cell.layer is not None)
    layers = sorted({cell.layer for cell in cells if cell.layer is not None})
    across = math.ceil(len(taps) / max(1, math.ceil(len(taps) / ACROSS)))
    pieces = [taps[i : i + across] for i in range(0, len(taps), across)] if taps else []
    tables = [
        table(("Layer", *map(prose, piece)), (
            (str(layer), *(_excess_cell(worst.get((layer, tap))) for tap in piece)) for layer in layers
        ), "r" * (len(piece) + 1))
        for piece in pieces
    ]  # fmt: skip
    outside = _taps(tensor for layer, tensor in worst if layer is None)
    if outside:
        row = ("outside", *(_excess_cell(worst[(None, tap)]) for tap in outside))
        tables.append(table(("Layer", *map(prose, outside)), [row], "r" * len(row)))
    legend = "The largest over all steps. `=`: equal bit for bit. `?`: not told. Empty: not compared. **Bold**: fails."
    return blocks([*tables, legend])


def _rank(cell: Cell) -> tuple[int, float]:
    order = (Status.PASS, Status.UNKNOWN, Status.FAIL)
    return (order.index(cell.status), cell.excess if cell.excess is not None else 0.0)


def _taps(names: Iterable[str]) -> list[str]:
    return sorted(set(names), key=lambda name: execution_order(0 if name in BY_NAME else None, name))


def _excess_cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.drift.equal:
        return "="
    shown = tidy(cell.excess)
    return f"**{shown}**" if cell.status is Status.FAIL else "?" if cell.status is Status.UNKNOWN else shown


def _largest(cells: Sequence[Cell]) -> str:
    found = sorted(facts.differing(cells), key=_rank, reverse=True)[:LARGEST]
    if not found:
        return "Every pair is equal bit for bit." if cells else "Nothing was compared."
    rows = (
        (prose(place(c.layer, c.tensor)), str(c.step), number(c.drift.value), number(c.floor.value),
         prose(c.floor.source), times(c.excess), c.drift.rung, number(c.drift.max_abs), number(c.drift.ulp),
         c.status.value)
        for c in found
    )  # fmt: skip
    head = ("Place", "Step", "Drift", "Floor", "Floor set by", "Excess", "Evidence", "Max abs", "ulp", "Status")
    return table(head, rows, "lrrrlrlrrl")


def _rows(checks: Sequence[RowCheck]) -> str:
    if not checks:
        return "No cache rows with a hash on both sides."
    odd = [row for row in checks if row.equal != row.compared]
    if not odd:
        return f"None: all {sum(row.compared for row in checks)} rows are prefill's, bit for bit."
    rows = (
        (str(row.layer), row.tensor, str(row.step), f"{row.equal} of {row.compared}", str(row.within), _what_rows(row))
        for row in odd
    )
    return table(("Layer", "Tensor", "Step", "Equal", "Within the floor", "The others"), rows, "rlrrrl")


def _what_rows(row: RowCheck) -> str:
    parts = []
    if row.moved:
        parts.append(f"prefill's row of another position (position←source): {_some(f'{a}←{b}' for a, b in row.moved)}")
    if row.zero:
        parts.append(f"zero: {_some(map(str, row.zero))}")
    if row.other_layer:
        parts.append(f"another layer's (position←layer): {_some(f'{a}←{b}' for a, b in row.other_layer)}")
    if row.changed:
        parts.append(f"match no row of prefill's: {_some(map(str, row.changed))}")
    return "; ".join(parts) or "none"


def _some(items: Iterable[str]) -> str:
    return listed(list(items), 6)


def _controls(controls: dict[str, float]) -> str:
    if not controls:
        return "No control arm was run; the floor rests on the unit roundoff alone."
    rows = ((prose(arm), _about_arm(arm), number(drift)) for arm, drift in sorted(controls.items(), key=_arm_order))
    return table(("Arm", "What it is", "Largest drift"), rows, "llr")


def _about_arm(arm: str) -> str:
    match = re.fullmatch("([EN])([0-9]+)", arm)
    if match is None:
        what = {"'": "once more"} | {f"@{knob}": words for knob, words in _TURNED.items()}
        return f"{arm[0]} {what[arm[1:]]}" if arm[1:] in what else "a control"
    if match[1] == "E":
        return f"prefill {count(int(match[2]), 'token')} longer, read at the same position"
    return f"prefill with every op off by a rounding error, draw {match[2]}"


_TURNED = {
    "batch": "beside a second sequence in the batch",
    "chunks": "fed in chunks",
    "threads": "on another number of threads",
}
"""What is another in an arm that was run again with a knob of the engine turned."""


def _arm_order(item: tuple[str, float]) -> tuple[int, int, str]:
    arm = item[0]
    return ("PDEN".find(arm[:1]), len(arm), arm)


def _detection(cells: Sequence[Cell]) -> str:
    if not cells:
        return "Nothing was compared."
    rows = []
    for tap in _taps(cell.tensor for cell in cells):
        mine = [cell for cell in cells if cell.tensor == tap]
        low, high = (pick(mine, key=lambda c: c.floor.value) for pick in (min, max))
        rows.append((prose(tap), number(low.floor.limit), _layer(low), number(high.floor.limit), _layer(high),
                     prose(high.floor.source)))  # fmt: skip
    head = ("Tap", "Smallest", "in layer", "Largest", "in layer", "Largest set by")
    words = "The relative error above which each tap fails: the smallest that could be told from rounding there."
    return blocks([words, table(head, rows, "lrrrrl")])


def _layer(cell: Cell) -> str:
    return "–" if cell.layer is None else str(cell.layer)


def _unpaired(records: Sequence[Record]) -> str:
    if not records:
        return "None."
    shown = [
        f"{prose(place(r.layer, r.tensor))}: only in arm {prose(r.arm) or NOT_TOLD}, {prose(r.phase)}, step {r.step}"
        + ("" if r.shape is None else f", shape {list(r.shape)}")
        for r in records[:UNPAIRED_SHOWN]
    ]
    more = len(records) - UNPAIRED_SHOWN
    return bullets([*shown, f"and {more} more"] if more > 0 else shown)
