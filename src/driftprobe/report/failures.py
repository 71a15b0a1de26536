"""Section 4 of the final report: the first failure of each mode, its root cause and its size."""

from __future__ import annotations

from collections.abc import Sequence

from driftprobe.climb import sharper_words, sides_of
from driftprobe.floor import LIMIT
from driftprobe.judgement import Cell, Failure, Judgement, ModeJudgement, Verdict
from driftprobe.report.facts import PROJECTIONS, differing, failing, largest, mode_names, run_command, where
from driftprobe.report.text import NOT_TOLD, blocks, bullets, count, number, prose, times
from driftprobe.taps import BY_NAME, CACHE_TAPS, place
from driftprobe.trace import Trace

CITED = (*PROJECTIONS, "attn_scores", "attn_probs")
"""The QKV and softmax taps whose figures stand as evidence."""


SPREAD = 2
"""How many prompts are quoted whose first failure says something else."""


def failures_section(judgement: Judgement, traces: Sequence[Trace]) -> str:
    """Return section 4: one part for each mode, run or not."""
    parts = ["## 4. First Failure by Mode"]
    for name in mode_names(judgement):
        mode = judgement.modes.get(name)
        parts += [f"### {prose(name)} Mode", bullets(_not_run(name, traces) if mode is None else _lines(mode))]
    return blocks(parts)


def _not_run(name: str, traces: Sequence[Trace]) -> list[str]:
    names = ("First Failure", "Root Cause", "Tensor", "Drift", "Floor", "Excess", "Evidence")
    run_it = f" (not run; `{run_command(name, traces)}` runs it)"
    return [f"**{field}**: TBD{run_it if field == 'First Failure' else ''}" for field in names]


def _lines(mode: ModeJudgement) -> list[str]:
    failure = mode.first_failure
    return _failure_lines(failure, mode) if failure is not None else _clean_lines(mode)


def _failure_lines(failure: Failure, mode: ModeJudgement) -> list[str]:
    tap, told = BY_NAME.get(failure.tensor), sharper_words(failure.local, failure.match)
    return [
        f"**First Failure**: {prose(where(failure))}, {' against '.join(map(prose, sides_of(failure)))}",
        f"**Root Cause**: {prose(failure.root_cause) or NOT_TOLD}",
        f"**Tensor**: {prose(place(failure.layer, failure.tensor))}" + (f" ({tap.op})" if tap else ""),
        f"**Drift**: {number(failure.drift)} (relative L2 distance)",
        f"**Floor**: {number(failure.floor)}{_set_by(failure, mode)}",
        f"**Excess**: {times(failure.excess)}, limit {LIMIT:g}",
        *([f"**Told under the limit**: {prose(told)}"] if told else []),
        f"**Prompts that fail**: {_spread(mode, failure)}",
        f"**Evidence**: {_statistics(mode, failure.prompt, failure.step, failure.layer)}",
    ]


def _spread(mode: ModeJudgement, first: Failure) -> str:
    """Say how many prompts fail, and what those say that fail elsewhere or whose cache rows tell more."""
    found = [item.first_failure for item in mode.prompts if item.first_failure is not None]
    others = [
        f"{prose(other.prompt)} first at {prose(place(other.layer, other.tensor))}: {prose(other.root_cause)}"
        for other in found
        if (other.layer, other.tensor) != (first.layer, first.tensor)
        or (other.tensor in CACHE_TAPS and other.root_cause != first.root_cause)
    ]
    more = [f"and {len(others) - SPREAD} more"] if len(others) > SPREAD else []
    return "; ".join([f"{len(found)} of {len(mode.prompts)}", *others[:SPREAD], *more])


def _set_by(failure: Failure, mode: ModeJudgement) -> str:
    cell = next((c for c in mode.cells if (c.prompt, c.step, c.layer, c.tensor)
                 == (failure.prompt, failure.step, failure.layer, failure.tensor)), None)  # fmt: skip
    return f", set by {prose(cell.floor.source)}" if cell and cell.floor.value == failure.floor else ""


def _clean_lines(mode: ModeJudgement) -> list[str]:
    if mode.verdict is Verdict.NOT_AVAILABLE:
        return [
            "**First Failure**: none can be named; the verdict of this mode is N/A",
            f"**Root Cause**: {prose(mode.reason)}",
            f"**Tensor**: {NOT_TOLD}",
        ]
    worst = largest(differing(mode.cells))
    if worst is None:
        same = f"all {count(len(mode.cells), 'pair')} equal bit for bit"
        return ["**First Failure**: none", "**Root Cause**: none to name", f"**Tensor**: none; {same}"]
    return [
        "**First Failure**: none",
        "**Root Cause**: none to name; arithmetic explains every difference",
        f"**Tensor**: none fails; the largest excess is at {prose(where(worst))}",
        f"**Drift**: {number(worst.drift.value)} there (relative L2 distance)",
        f"**Floor**: {number(worst.floor.value)} there, set by {prose(worst.floor.source)}",
        f"**Excess**: {times(worst.excess)} there, limit {LIMIT:g}",
        f"**Evidence**: {_statistics(mode, worst.prompt, worst.step, worst.layer)}",
    ]


def _statistics(mode: ModeJudgement, prompt: str, step: int, layer: int | None) -> str:
    """Return the QKV and softmax figures of one layer: drift and excess of each tap."""
    where_to_look = layer if layer is not None else 0
    found = [
        _figure(cell)
        for item in mode.prompts
        for cell in item.cells
        if (cell.prompt, cell.step, cell.layer) == (prompt, step, where_to_look) and cell.tensor in CITED
    ]
    if not found:
        return f"no QKV or softmax tap of layer {where_to_look} was compared"
    bad = len(failing(mode.cells))
    return (
        f"QKV/softmax drift in layer {where_to_look}: {', '.join(found)}; {bad} of {len(mode.cells)} taps fail in all"
    )


def _figure(cell: Cell) -> str:
    if cell.drift.equal:
        return f"{cell.tensor} equal"
    return f"{cell.tensor} {number(cell.drift.value)} ({times(cell.excess)})"
