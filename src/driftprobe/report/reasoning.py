"""The reasoning behind a verdict as plain text, in the order in which it was made: what Result.explain() returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from driftprobe.climb import sharper_words, sides_of
from driftprobe.floor import LIMIT
from driftprobe.judgement import Failure, Judgement, Reading
from driftprobe.report import facts
from driftprobe.report.evidence import EvidenceRow, evidence_matrix
from driftprobe.report.ladder import ladder_words
from driftprobe.report.text import number, printable, times
from driftprobe.trace import Trace


def render(judgement: Judgement, traces: Sequence[Trace]) -> str:
    """Return the reasoning, a paragraph a step: verdict, gates, evidence, failure, cause, reading, ladder, limits."""
    steps = (
        ("Verdict", [f"{judgement.verdict.value}: {facts.reason(judgement)}"]),
        ("Gates", _gates(judgement)),
        ("Evidence", [_evidence(row) for row in evidence_matrix(judgement, traces)]),
        ("First failure", _failure(judgement.first_failure)),
        ("Cause", _cause(judgement.first_failure)),
        ("Reading of arms D and A", _readings(judgement)),
        ("Precision ladder", [ladder_words(judgement)]),
        ("Detection limit", [facts.limits_words(judgement)]),
    )
    paragraphs = []
    for title, lines in steps:
        found = [printable(line) for line in lines]
        if found:
            paragraphs.append("\n".join((title, *(f"  {line}" for line in found))))
    return "\n\n".join(paragraphs) + "\n"


def _gates(judgement: Judgement) -> Iterator[str]:
    prompts = facts.all_prompts(judgement)
    shut = [(item, gate) for item in prompts for gate in item.gates if not gate.passed]
    for item, gate in shut:
        yield f"shut for {item.prompt} ({item.mode}): {gate.name}: {gate.detail}"
    if prompts and not shut:
        names = dict.fromkeys(gate.name for item in prompts for gate in item.gates)
        yield f"all open: {', '.join(names)}"


def _evidence(row: EvidenceRow) -> str:
    side = "H0" if row.supports_h0 else "H1" if row.supports_h1 else "--"
    return f"{side}  {row.label}: {row.figure}"


def _failure(first: Failure | None) -> Iterator[str]:
    if first is None:
        return
    mine, other = sides_of(first)
    yield f"{facts.where(first)}, {mine} against {other}" + (f", in {first.rung}" if first.rung else "")
    yield f"drift {number(first.drift)}, floor {number(first.floor)} ({times(first.excess)}, limit {LIMIT:g})"
    told = sharper_words(first.local, first.match)
    if told:
        yield f"told under the limit: {told}"
    if first.match is not None:
        yield f"the matched filter's fault: {first.match.cause}"


def _cause(first: Failure | None) -> Iterator[str]:
    if first is None:
        return
    yield first.root_cause
    found = first.diagnosis
    if found is None:
        yield "no known cause predicts what was seen"
        return
    given = ", ".join(f"{name} {value}" for name, value in found.parameters.items())
    yield f"{found.cause}" + (f": {given}" if given else "")
    yield f"it explains {found.explained:.4%} of the squared difference and leaves {number(found.residual)} over"
    if found.z is not None:
        yield f"its parameter is {number(found.z)} standard errors from none"
    if found.side:
        yield f"the side at fault is {found.side}: a replay of the op from its captured inputs shows it"


def _readings(judgement: Judgement) -> Iterator[str]:
    for reading in dict.fromkeys(item.reading for item in facts.all_prompts(judgement)):
        if reading is not Reading.NONE:
            yield f"{reading.value}: {reading.words}"
