"""The precision ladder in the reports: what was run again, at which roundoff, and what became of each drift."""

from __future__ import annotations

from collections.abc import Sequence

from driftprobe.judgement import Cell, Judgement, Ladder, Limits, Outcome, TraceJudgement
from driftprobe.report.text import blocks, code, number, prose, table, times
from driftprobe.taps import place

_GRAVEST = (Outcome.AGREES, Outcome.NOT_TOLD, Outcome.SCALES, Outcome.PRECISION, Outcome.SHARPER)
STEEPEST = 10
"""Taps of the analysis' table of slopes: those whose drift shrinks least."""


def ladder_section(judgement: Judgement) -> str:
    """Return the final report's part on the ladder."""
    climbed = [item for mode in judgement.modes.values() for item in mode.prompts if item.ladder is not None]
    if not climbed:
        return blocks(["### Precision Ladder", "Not climbed: everything was run in one precision."])
    return blocks([
        "### Precision Ladder",
        "Everything was run again at a higher precision, the model's own casts lifted with it. Arithmetic drift scales "
        "with the unit roundoff u (slope about 1), a bug keeps its size (slope about 0).",
        table(_HEAD, [row for item in climbed for row in _rows(item)], "lllrrlrrlr"),
        f"**Ladder**: {prose(ladder_words(judgement))}.",
    ])  # fmt: skip


_HEAD = ("Prompt", "Mode", "Precision", "u", "Largest drift", "at", "Excess", "Slope", "Verdict", "Seconds")


def _rows(item: TraceJudgement) -> list[tuple[str, ...]]:
    ladder = item.ladder
    assert ladder is not None
    own = _row(item, item.engine.dtype or "the run's own", ladder.base_unit, item.cells)
    rung = _row(item, ladder.rung + _limited(ladder), ladder.unit, ladder.judged.cells)
    seconds = "" if ladder.seconds is None else f"{ladder.seconds:.2f}"
    return [
        (*own, "", ladder.base_verdict.value, ""),
        (*rung, _slope_at_largest(item, ladder), ladder.judged.verdict.value, seconds),
    ]


def _limited(ladder: Ladder) -> str:
    return "" if ladder.limited_by == ladder.rung else f", limited by {ladder.limited_by}"


def _row(item: TraceJudgement, name: str, unit: float, cells: Sequence[Cell]) -> tuple[str, ...]:
    worst = _largest(cells)
    drift = ("", "nothing was sized", "") if worst is None else (
        number(worst.drift.value), prose(place(worst.layer, worst.tensor)), times(worst.excess)
    )  # fmt: skip
    return (code(item.prompt), prose(item.mode), prose(name), number(unit), *drift)


def _largest(cells: Sequence[Cell]) -> Cell | None:
    told = [cell for cell in cells if cell.drift.value is not None]
    return max(told, key=lambda cell: cell.drift.value or 0.0, default=None)


def _slope_at_largest(item: TraceJudgement, ladder: Ladder) -> str:
    worst = _largest(ladder.judged.cells)
    found = [s.slope for s in ladder.slopes if worst and (s.layer, s.tensor) == (worst.layer, worst.tensor)]
    return _slope(found[0]) if found and found[0] is not None else ""


def _slope(slope: float) -> str:
    return f"{round(slope, 2) + 0.0:.2f}"  # -0.00 is 0.00


def ladder_words(judgement: Judgement) -> str:
    """Return what the ladder reached, found and cost, in a line; what it says is the gravest of all prompts."""
    ladders = judgement.ladders
    if not ladders:
        return "not climbed"
    first = ladders[0]
    said = max((ladder.outcome for ladder in ladders), key=_GRAVEST.index)
    noise = [ladder.noise for ladder in ladders if ladder.noise is not None]
    parts = [f"{first.rung} (u {number(max(ladder.unit for ladder in ladders))}{_limited(first)}"]
    parts[0] += f", its controls drift by up to {number(max(noise))})" if noise else ")"
    limits = rung_limits(judgement)
    if limits is not None:
        parts.append(f"could tell {number(limits.smallest)} to {number(limits.largest)} from rounding")
    seconds = [ladder.seconds for ladder in ladders if ladder.seconds is not None]
    if seconds:
        parts.append(f"took {sum(seconds):.1f} s")
    return f"{said.words}; {', '.join(parts)}"


def rung_limits(judgement: Judgement) -> Limits | None:
    """Return the detection limit at the rung, over all prompts whose rung could be judged."""
    told = [ladder.judged.limits for ladder in judgement.ladders if ladder.outcome is not Outcome.NOT_TOLD]
    known = [limits for limits in told if limits is not None]
    if not known:
        return None
    low, high = min(known, key=lambda x: x.smallest), max(known, key=lambda x: x.largest)
    return Limits(low.smallest, low.smallest_at, high.largest, high.largest_at)


def slopes(ladder: Ladder | None) -> str:
    """Return the analysis' part on one prompt's ladder: what it says, and the taps whose drift shrinks least."""
    if ladder is None:
        return "Not climbed."
    told = sorted((s for s in ladder.slopes if s.slope is not None), key=lambda s: s.slope or 0.0)
    rows = (
        (prose(place(s.layer, s.tensor)), number(s.base), number(s.rung), _slope(s.slope or 0.0))
        for s in told[:STEEPEST]
    )
    judged = ladder.judged
    return blocks([
        f"{prose(ladder.rung)}: **{judged.verdict.value}**, {prose(judged.reason)}. What it says of the run: "
        f"{prose(ladder.outcome.words)}. Trace: {code(judged.file)}.",
        table(("Tap", "Drift in the run", f"in {prose(ladder.rung)}", "Slope"), rows, "lrrr") if told
        else "No tap has a drift in both that could be sized.",
    ])  # fmt: skip
