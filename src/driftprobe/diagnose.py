"""The root cause of a first failure, in words: from the rows that moved, the op that failed and the 2×2 reading."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from driftprobe.causes import CAUSES
from driftprobe.compare import NoPayloads, PayloadSource
from driftprobe.explain import explain
from driftprobe.hypotheses.blame import Blame, blame
from driftprobe.judgement import (
    Cell,
    Diagnosis,
    Failure,
    Judgement,
    ModeJudgement,
    Reading,
    RowCheck,
    Status,
    TraceJudgement,
)
from driftprobe.scene import Scene
from driftprobe.taps import BY_NAME, CACHE_TAPS, execution_order, place
from driftprobe.trace import Trace


def diagnose(judgement: Judgement, traces: Sequence[Trace] = (), payloads: PayloadSource | None = None) -> Judgement:
    """Return the judgement with a root cause in every first failure.

    With the traces and their payloads the fault dictionary is asked for the cause and its parameters.
    """
    by_file = {trace.path: trace for trace in traces}
    source = NoPayloads() if payloads is None else payloads
    return replace(
        judgement, modes={name: _diagnose_mode(mode, by_file, source) for name, mode in judgement.modes.items()}
    )


def _diagnose_mode(mode: ModeJudgement, traces: dict[str, Trace], payloads: PayloadSource) -> ModeJudgement:
    prompts = tuple(_diagnose_prompt(item, traces, payloads) for item in mode.prompts)
    first = mode.first_failure
    if first is None:
        return replace(mode, prompts=prompts)
    same = [p.first_failure for p in prompts if p.first_failure is not None and _bare(p.first_failure) == _bare(first)]
    return replace(mode, prompts=prompts, first_failure=same[0])


def _bare(failure: Failure) -> Failure:
    return replace(failure, root_cause="", diagnosis=None)


def _diagnose_prompt(item: TraceJudgement, traces: dict[str, Trace], payloads: PayloadSource) -> TraceJudgement:
    """Diagnose a failure from the trace in which it was seen: the run's own, or its rung's on the ladder."""
    first, ladder = item.first_failure, item.ladder
    if first is None or ladder is None or not first.rung:
        return _diagnose_trace(item, traces.get(item.file), payloads)
    judged = _diagnose_trace(ladder.judged, traces.get(ladder.judged.file), payloads)
    found = replace(judged.failures[0], rung=first.rung)
    return replace(item, failures=(found, *item.failures[1:]), ladder=replace(ladder, judged=judged))


def _diagnose_trace(item: TraceJudgement, trace: Trace | None, payloads: PayloadSource) -> TraceJudgement:
    first = item.first_failure
    if first is None:
        return item
    told = None
    if trace is not None:
        told = blame(Scene(trace, item, first, payloads))
    if trace is not None and first.diagnosis is None:
        first = replace(first, diagnosis=explain(Scene(trace, item, first, payloads)) or _matched(first))
    words = root_cause(first, item)
    if told is not None:
        words = f"{words}; {_blame_in_words(told, first)}"
    return replace(item, failures=(replace(first, root_cause=words), *item.failures[1:]))


def _blame_in_words(told: Blame, failure: Failure) -> str:
    """Return which side is at fault, with the evidence."""
    names, sizes = ("decode", "prefill"), (told.decode, told.prefill)
    if failure.phase == "prefill_ext":
        names = ("the longer prefill", "prefill")
    (right, near), (wrong, far) = sorted(zip(names, sizes, strict=True), key=lambda pair: pair[1])
    return (
        f"{wrong} is the wrong side: {right}'s {failure.tensor} agrees with a replay from its input ({near:.1e}), "
        f"{wrong}'s does not ({far:.1e})"
    )


def _matched(failure: Failure) -> Diagnosis | None:
    """Return the cause that a matched filter named, where nothing else does."""
    match = failure.match
    if match is None:
        return None
    left = math.sqrt(max(failure.drift**2 - match.share**2, 0.0))
    explained = min(1.0, (match.share / failure.drift) ** 2) if failure.drift else 0.0
    return Diagnosis(match.cause, match.parameters, match.layer, match.tensor, left, explained, z=match.z)


def root_cause(failure: Failure, item: TraceJudgement) -> str:
    """Return the cause of a failure in a sentence or two."""
    return "; ".join((_cause(failure, item), *_notes(failure, item)))


def _cause(failure: Failure, item: TraceJudgement) -> str:
    if failure.diagnosis is not None:
        found = failure.diagnosis
        where = place(found.layer, found.tensor)
        return _with_reading(f"{where}: {CAUSES[found.cause].say(found.parameters)}", item.reading)
    if failure.phase == "prefill_ext":
        return (
            f"prefill itself: the same token at {place(failure.layer, failure.tensor)} changes with what stands behind "
            "it or with the prefill's length, beyond rounding; look at the causal mask, chunking and reshapes by token "
            "count"
        )
    rows = _rows_in_words(failure, item.rows) if failure.tensor in CACHE_TAPS else ""
    return _with_reading(rows or _op_in_words(failure, item.cells), item.reading)


def _notes(failure: Failure, item: TraceJudgement) -> list[str]:
    """Return what else bears on the cause: the other kind of failure, and taps before it that are not told."""
    notes = []
    other = next((f for f in item.failures if (f.phase == "prefill_ext") != (failure.phase == "prefill_ext")), None)
    if other is not None:
        at = place(other.layer, other.tensor)
        notes.append(
            f"a longer prefill differs too, first at {at}: the prefill may be the wrong side"
            if other.phase == "prefill_ext"
            else f"{other.phase} differs too, first at {at}"
        )
    first = (failure.step, execution_order(failure.layer, failure.tensor))
    untold = [
        c for c in item.cells if c.status is Status.UNKNOWN and (c.step, execution_order(c.layer, c.tensor)) < first
    ]
    if untold:
        notes.append(
            f"{len(untold)} earlier {'tap differs' if len(untold) == 1 else 'taps differ'} by an amount that the trace "
            f"cannot tell, from {place(untold[0].layer, untold[0].tensor)} on"
        )
    return notes


def _with_reading(words: str, reading: Reading) -> str:
    return words if reading in {Reading.NONE, Reading.H0} else f"{words}; {reading.words}"


def _op_in_words(failure: Failure, cells: Sequence[Cell]) -> str:
    tap = BY_NAME.get(failure.tensor)
    where = place(failure.layer, failure.tensor)
    if tap is None:
        return f"{where} is the first tap that differs"
    inputs = [c for c in cells if c.step == failure.step and c.layer == failure.layer and c.tensor in tap.inputs]
    agree = ", ".join(
        f"{c.tensor} (×{c.excess:.2g})" for c in inputs if c.status is Status.PASS and c.excess is not None
    )
    lead = f"the {tap.op} at {where}: " + (
        f"its input agrees, {agree}, its result does not" if agree else "its result differs"
    )
    return f"{lead}; suspects: {tap.suspect}"


def _rows_in_words(failure: Failure, checks: Sequence[RowCheck]) -> str:
    mine = [c for c in checks if (c.step, c.layer, c.tensor) == (failure.step, failure.layer, failure.tensor)]
    if not mine:
        return ""
    check, letter = mine[0], "K" if failure.tensor == "k_cache" else "V"
    layer, n = check.layer, check.compared
    if check.zero and not check.moved and not check.changed:
        return f"{letter} {_rows(check.zero)} of layer {layer} {_are(check.zero)} zero"
    if check.other_layer and not check.moved:
        source = Counter(other for _, other in check.other_layer).most_common(1)[0][0]
        positions = [position for position, _ in check.other_layer]
        return (
            f"{letter} {_rows(positions)} of layer {layer} {_are(positions)} layer {source}'s: "
            "another layer's cache was read"
        )
    if check.moved:
        return _moved_in_words(check, letter, layer, n)
    if check.changed:
        return (
            f"{letter} {_rows(check.changed)} of layer {layer} (of {n}) "
            f"{'differs' if len(check.changed) == 1 else 'differ'} from prefill's and match no other row: "
            "overwritten, stale, or coarser than their dtype"
        )
    return ""


def _moved_in_words(check: RowCheck, letter: str, layer: int, n: int) -> str:
    pairs = set(check.moved)
    if len(pairs) == 2 and {(b, a) for a, b in pairs} == pairs:
        first, second = sorted(position for position, _ in pairs)
        return f"{letter} rows {first} and {second} of layer {layer} stand in each other's place"
    offsets = Counter((position - source) % max(n, 1) for position, source in check.moved)
    offset, count = offsets.most_common(1)[0]
    if count == len(check.moved):
        signed = offset if offset <= n // 2 else offset - n
        hold = "holds" if len(check.moved) == 1 else "hold"
        empty = f", and {_rows(check.zero)} {_are(check.zero)} zero" if check.zero else ""
        return (
            f"{letter} {_rows([p for p, _ in check.moved])} of layer {layer} {hold} prefill's rows shifted by "
            f"{'one' if abs(signed) == 1 else abs(signed)} ({'+' if signed > 0 else '−'}{abs(signed)}){empty}: "
            "wrong cache slot"
        )
    shown = ", ".join(f"{position}←{source}" for position, source in check.moved[:4])
    return f"{letter} rows of layer {layer} are prefill's in another order ({shown}): wrong slot or block table"


def _rows(positions: Sequence[int]) -> str:
    if len(positions) == 1:
        return f"row {positions[0]}"
    ordered = sorted(positions)
    if ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"rows {ordered[0]}–{ordered[-1]}"
    return f"{len(ordered)} rows ({', '.join(str(p) for p in ordered[:4])}{'…' if len(ordered) > 4 else ''})"


def _are(positions: Sequence[int]) -> str:
    return "is" if len(positions) == 1 else "are"
