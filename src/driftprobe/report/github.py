"""What GitHub shows of a run: annotations, and a step summary in Markdown.

Workflow commands are lines of the log, so whatever a trace brings in is escaped: it must not become one.
"""

from __future__ import annotations

from collections.abc import Sequence

from driftprobe.judgement import Judgement, TraceJudgement, Verdict
from driftprobe.report import facts
from driftprobe.report.text import blocks, code, count, printable, prose, table
from driftprobe.taps import place
from driftprobe.trace import Trace

MOST = 9
"""Annotations of one kind: GitHub shows ten a step, and the last one says how many more there are."""


def annotation(kind: str, title: str, text: str) -> str:
    """Return a workflow command: `::error title=…::…`. `kind` is error, warning or notice.

    Percent signs and line ends are escaped, in the title colons and commas too (the commands' own rules).
    """
    escaped = _data(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={escaped}::{_data(text)}"


def _data(text: str) -> str:
    return printable(text).replace("%", "%25")  # printable() leaves no line end


def annotate(judgement: Judgement, report: str) -> tuple[str, ...]:
    """Return a line for each prompt that failed or could not be told; a notice where there is none."""
    prompts = facts.all_prompts(judgement)
    found = _some("error", [item for item in prompts if item.verdict is Verdict.MISMATCH], report)
    found += _some("warning", [item for item in prompts if item.verdict is Verdict.NOT_AVAILABLE], report)
    if found or not prompts:
        return tuple(found)
    return (annotation("notice", f"driftprobe: {judgement.verdict.value}", facts.reason(judgement)),)


def _some(kind: str, items: Sequence[TraceJudgement], report: str) -> list[str]:
    lines = [annotation(kind, _title(item), _text(item, report)) for item in items[:MOST]]
    if len(items) > MOST:
        lines.append(annotation(kind, "driftprobe", f"and {count(len(items) - MOST, 'prompt')} more{_see(report)}"))
    return lines


def _title(item: TraceJudgement) -> str:
    first = item.first_failure
    at = f" at {place(first.layer, first.tensor)}" if first else ""
    return f"driftprobe: {item.verdict.value}{at} ({item.prompt}, {item.mode})"


def _text(item: TraceJudgement, report: str) -> str:
    first = item.first_failure
    if first is None:
        return item.reason + _see(report)
    return f"{facts.size_words(first)}; {first.root_cause}{_see(report)}"


def _see(report: str) -> str:
    return f"; see {report}" if report else ""


def summary(judgement: Judgement, traces: Sequence[Trace], report: str) -> str:
    """Return the step summary: the verdict, each mode in a row, the first failure with its cause, and the limits."""
    first = judgement.first_failure
    failure = [] if first is None else [
        f"**First failure**: {prose(facts.where(first))}: {prose(facts.size_words(first))}",
        f"**Root cause**: {prose(first.root_cause)}",
    ]  # fmt: skip
    return blocks([
        f"### driftprobe: {judgement.verdict.value}",
        prose(facts.reason(judgement)),
        *failure,
        table(("Mode", "Verdict", "Pairs", "Pass / fail"), [
            (prose(mode.mode), mode.verdict.value, str(len(mode.cells)), prose(facts.pass_fail(mode)))
            for mode in judgement.modes.values()
        ], "llrl"),
        prose(facts.limits_words(judgement)),
        f"Report: {code(report)}" if report else "",
        f"Engine: {prose(_engine(traces))}" if traces else "",
    ]) + "\n"  # fmt: skip


def _engine(traces: Sequence[Trace]) -> str:
    engine = traces[0].header.engine
    return " ".join(part for part in (engine.name, engine.version, engine.model, engine.dtype) if part)
