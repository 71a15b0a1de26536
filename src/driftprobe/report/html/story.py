"""What the page says in words, before any picture: the verdict, the four figures beside it, the evidence, the gates.

Every string is plain text; the template escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from driftprobe.climb import sharper_words, sides_of
from driftprobe.floor import LIMIT, is_turned
from driftprobe.judgement import Failure, Impact, Judgement, Range, Reading, Verdict
from driftprobe.report import facts
from driftprobe.report.conclusion import impact_words
from driftprobe.report.evidence import EvidenceRow, evidence_matrix
from driftprobe.report.html.pool import name
from driftprobe.report.ladder import ladder_words
from driftprobe.report.text import NOT_TOLD, clip, count, number, printable, times
from driftprobe.taps import BY_NAME
from driftprobe.trace import Trace
from driftprobe.verdict import base_traces
from driftprobe.version import __version__

LONG = 800
"""Characters of a sentence that quotes names from a trace; the other reports have all of it."""
_HEADLINES = {
    Verdict.NO_DRIFT: "No difference: {both} agree bit for bit.",
    Verdict.STRUCTURAL_DRIFT: "No bug found: {both} differ, and rounding explains all of it.",
    Verdict.MISMATCH: "A bug: {both} differ by more than rounding can explain.",
    Verdict.NOT_AVAILABLE: "It cannot be told whether {both} agree.",
}
_HYPOTHESES = {
    Verdict.NO_DRIFT: ("H₀ holds", "There is no difference to explain."),
    Verdict.STRUCTURAL_DRIFT: ("H₀ holds", "The difference is structural: arithmetic of other shapes, no bug."),
    Verdict.MISMATCH: ("H₁ holds", "The difference is real: a bug in the implementation of attention, cache or an op."),
    Verdict.NOT_AVAILABLE: ("Neither H₀ nor H₁", "A condition for a verdict is not met. This is no pass and no fail."),
}
_TONES = {
    Verdict.NO_DRIFT: "calm",
    Verdict.STRUCTURAL_DRIFT: "calm",
    Verdict.MISMATCH: "grave",
    Verdict.NOT_AVAILABLE: "open",
}


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the figures beside the verdict."""

    label: str
    value: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shut:
    """One gate of one prompt."""

    prompt: str
    mode: str
    gate: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Story:
    """The words of a page."""

    title: str
    tone: str
    """`calm`, `grave` or `open`: which colour the verdict has."""
    verdict: str
    headline: str
    hypothesis: tuple[str, str]
    reason: str
    tiles: tuple[Tile, ...]
    planted: str
    ran: tuple[tuple[str, str], ...]
    evidence: tuple[EvidenceRow, ...]
    gates: tuple[Shut, ...]
    shut: str
    """What figures behind a shut gate are worth; empty where all are open."""
    readings: tuple[tuple[str, str, str, str, str], ...]
    """Prompt, D beyond the floor, A beyond the floor, reading, meaning."""
    statistics: tuple[tuple[str, ...], ...]
    sides: tuple[str, str]
    """What the two sides are called."""
    ladder: str
    impact: str
    rebuild: str
    generated: str


def tell(judgement: Judgement, traces: Sequence[Trace]) -> Story:
    """Return the words of a judgement."""
    base = base_traces(traces)
    both = " and ".join(facts.sides(judgement))
    model = next((item.engine.model for item in facts.all_prompts(judgement)), "")
    return Story(
        title=f"{judgement.verdict.value} · {name(model) or 'driftprobe'}",
        tone=_TONES[judgement.verdict],
        verdict=judgement.verdict.value,
        headline=_headline(judgement, both),
        hypothesis=_HYPOTHESES[judgement.verdict],
        reason=_long(facts.reason(judgement)),
        tiles=(_cause(judgement), _first(judgement.first_failure, judgement), _limit(judgement), _impact(judgement)),
        planted=", ".join(map(name, facts.faults(base))),
        ran=_ran(judgement, base),
        evidence=tuple(replace(row, figure=_long(row.figure)) for row in evidence_matrix(judgement, base)),
        gates=tuple(
            Shut(name(item.prompt), name(item.mode), gate.name, gate.passed, _long(gate.detail))
            for item in facts.all_prompts(judgement)
            for gate in item.gates
        ),
        shut=_long(facts.shut_words(judgement)),
        readings=_readings(judgement),
        statistics=_statistics(judgement),
        sides=facts.sides(judgement),
        ladder=f"It says: {printable(ladder_words(judgement))}.",
        impact=impact_words(judgement),
        rebuild=_long(facts.report_command(base)),
        generated=f"{printable(facts.generated(base))} by driftprobe {__version__}",
    )


def _headline(judgement: Judgement, both: str) -> str:
    first = judgement.first_failure
    if first is not None and first.of_control:
        mine, other = sides_of(first)
        both = (
            f"{name(other)} and {name(mine)}, the same run but for a knob," if is_turned(first.arm) else "two prefills"
        )
    return _HEADLINES[judgement.verdict].format(both=both)


def _cause(judgement: Judgement) -> Tile:
    failure = judgement.first_failure
    if failure is None:
        words = {
            Verdict.NO_DRIFT: "nothing to explain",
            Verdict.STRUCTURAL_DRIFT: "rounding",
            Verdict.NOT_AVAILABLE: "not told",
        }
        shut = [gate for item in facts.all_prompts(judgement) for gate in item.gates if not gate.passed]
        notes = (_long(f"gate ‘{shut[0].name}’ is shut: {shut[0].detail}"),) if shut else ()
        return Tile("Cause", words.get(judgement.verdict, NOT_TOLD), notes)
    first, *more = _long(failure.root_cause).split("; ")
    tap = BY_NAME.get(failure.tensor)
    untold = tap is not None and failure.diagnosis is None and tap.suspect not in failure.root_cause
    suspects = (f"look first at: {tap.suspect}",) if tap and tap.suspect and untold else ()
    return Tile("Cause", first or NOT_TOLD, (*more, *suspects))


def _first(failure: Failure | None, judgement: Judgement) -> Tile:
    if failure is None:
        worst = facts.largest(facts.every_cell(judgement))
        if worst is None or judgement.verdict is Verdict.NOT_AVAILABLE:
            return Tile("First failure", "not decided" if judgement.verdict is Verdict.NOT_AVAILABLE else "none")
        note = f"largest excess {times(worst.excess)} at {name(facts.where(worst))}; limit ×{LIMIT:g}"
        return Tile("First failure", "none", (note,))
    sizes = f"drift {number(failure.drift)}, floor {number(failure.floor)}: {times(failure.excess)}, limit ×{LIMIT:g}"
    told = sharper_words(failure.local, failure.match)
    rung = (f"seen with everything run again in {name(failure.rung)}",) if failure.rung else ()
    return Tile("First failure", name(facts.where(failure)), (sizes, *([f"but {told}"] if told else []), *rung))


def _limit(judgement: Judgement) -> Tile:
    limits = judgement.limits
    if limits is None:
        return Tile("Detection limit", "none", (facts.limits_words(judgement),))
    return Tile(
        "Detection limit",
        f"{number(limits.smallest)} to {number(limits.largest)}",
        ("the smallest relative error that this run could have told from rounding, by tap",
         "a smaller fault is not ruled out"),
    )  # fmt: skip


def _impact(judgement: Judgement) -> Tile:
    found = judgement.impact
    if found is None:
        return Tile("Impact", NOT_TOLD, (impact_words(judgement),))
    tokens = {True: "same token chosen", False: f"another token chosen: {found.flip}"}
    value = NOT_TOLD if found.top1_agree is None else tokens[found.top1_agree]
    return Tile("Impact", value, (_logits(found),))


def _logits(found: Impact) -> str:
    parts = [("KL", found.kl, " nats"), ("max |Δlogit|", found.max_abs_dlogit, ""), ("margin", found.margin, "")]
    return ", ".join(f"{label} {number(value)}{unit}" for label, value, unit in parts if value is not None)


def _ran(judgement: Judgement, traces: Sequence[Trace]) -> tuple[tuple[str, str], ...]:
    prompts = facts.all_prompts(judgement)
    engine = prompts[0].engine if prompts else None
    known = [] if engine is None else [
        ("Engine", f"{engine.name} {engine.version}".strip()), ("Model", engine.model), ("Dtype", engine.dtype),
        ("Attention", engine.attention), ("Device", engine.device),
        ("Layers", str(engine.layers) if engine.layers else ""),
    ]  # fmt: skip
    lines = [
        *known,
        ("Modes", ", ".join(judgement.modes)),
        ("Prompts", ", ".join(f"{p.name} ({count(p.length, 'token')})" if p.length else p.name
                              for p in facts.prompts(traces))),
        ("Date", facts.date(traces)),
        ("Run", ", ".join(facts.runs(traces))),
    ]  # fmt: skip
    return tuple((label, _long(words)) for label, words in lines if words)


def _long(words: str) -> str:
    return clip(printable(words), LONG)


def _readings(judgement: Judgement) -> tuple[tuple[str, str, str, str, str], ...]:
    mode = judgement.modes.get("kv_aligned")
    if mode is None:
        return ()
    rows = []
    for item in mode.prompts:
        told = item.reading is not Reading.NONE
        sides = (item.decided_by.cells, item.decided_by.aligned_cells)
        beyond = [
            f"{'yes' if facts.failing(cells) else 'no'} ({len(facts.failing(cells))} of {len(cells)})" if told else "–"
            for cells in sides
        ]
        rows.append((name(item.prompt), *beyond, item.reading.value, item.reading.words))
    return tuple(rows)  # type: ignore[arg-type]


def _statistics(judgement: Judgement) -> tuple[tuple[str, ...], ...]:
    """Return rows of attention statistics: mode, phase, then min, max and mean before and after the softmax."""
    rows: list[tuple[str, ...]] = []
    for mode in judgement.modes.values():
        found = mode.attention
        left, right = facts.sides(judgement)
        for side, pre, post in (
            (left, found.pre_softmax_prefill, found.post_softmax_prefill),
            (right, found.pre_softmax_decode, found.post_softmax_decode),
        ):
            if pre is not None or post is not None:
                rows.append((name(mode.mode), side, *_range(pre), *_range(post)))
    return tuple(rows)


def _range(found: Range | None) -> tuple[str, str, str]:
    if found is None:
        return ("–", "–", "–")
    return (number(found.min), number(found.max), number(found.mean))
