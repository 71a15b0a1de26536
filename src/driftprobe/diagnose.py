"""The root cause of a first failure, in words: from the rows that moved, the op that failed and the 2×2 reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from driftprobe.causes import CAUSES
from driftprobe.compare import NoPayloads, PayloadSource
from driftprobe.floor import is_extension, is_turned, repeated
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
from driftprobe.row_causes import cause_of_rows, rows_in_words
from driftprobe.taps import BY_NAME, CACHE_TAPS, CANDIDATE, REFERENCE, execution_order, place
from driftprobe.trace import Trace

if TYPE_CHECKING:
    from driftprobe.hypotheses.blame import Blame


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
    told = found = None
    if trace is not None and repeated(first.arm) == "P":  # another run of decode differs from decode, and from no op
        told, found = _asked(trace, item, first, payloads)
    if first.diagnosis is None or found is not None or _by_hashes(first, item) is not None:
        found = found or _by_hashes(first, item) or _by_controls(first, item) or _matched(first)
        first = replace(first, diagnosis=found)
    words = root_cause(first, item)
    if told is not None:
        words = f"{words}; {_blame_in_words(told, first)}"
    return replace(item, failures=(replace(first, root_cause=words), *item.failures[1:]))


def _asked(
    trace: Trace, item: TraceJudgement, first: Failure, payloads: PayloadSource
) -> tuple[Blame | None, Diagnosis | None]:
    """Ask the fault dictionary for the side and the cause; it is loaded only where something has failed."""
    from driftprobe.explain import explain
    from driftprobe.hypotheses.blame import blame
    from driftprobe.scene import Scene

    scene = Scene(trace, item, first, payloads)
    return blame(scene), explain(scene)


def _blame_in_words(told: Blame, failure: Failure) -> str:
    """Return which side is at fault, with the evidence."""
    names, sizes = ("decode", "prefill"), (told.decode, told.prefill)
    if failure.of_control:
        names = (_other_control(failure), "prefill")
    elif failure.phase == CANDIDATE:
        names = (CANDIDATE, REFERENCE)
    (right, near), (wrong, far) = sorted(zip(names, sizes, strict=True), key=lambda pair: pair[1])
    return (
        f"{wrong} is the wrong side: {right}'s {failure.tensor} agrees with a replay from its input ({near:.1e}), "
        f"{wrong}'s does not ({far:.1e})"
    )


def _by_controls(failure: Failure, item: TraceJudgement) -> Diagnosis | None:
    """Return that prefill changes with the length of its calls, where one of another length fails here too."""
    if failure.of_control:
        return None
    where = (failure.step, failure.layer, failure.tensor)
    same = [f for f in item.failures if f.of_control and (f.step, f.layer, f.tensor) == where and _of_length(f.arm)]
    return Diagnosis("prefill_length", {}, failure.layer, failure.tensor, failure.drift, 0.0) if same else None


def _of_length(arm: str) -> bool:
    """Whether a control's calls are of another length than prefill's."""
    return is_extension(arm) or arm == "P@chunks"


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


def _by_hashes(failure: Failure, item: TraceJudgement) -> Diagnosis | None:
    """Return the cause that the row hashes alone prove, where every row of a failing cache tap is known again."""
    check = _row_check(failure, item.rows)
    found = None if check is None else cause_of_rows(check, item.prompt_len + failure.step)
    if found is None or failure.of_control:
        return None
    return Diagnosis(*found, failure.layer, failure.tensor, residual=0.0, explained=1.0)


def _row_check(failure: Failure, checks: Sequence[RowCheck]) -> RowCheck | None:
    where = (failure.step, failure.layer, failure.tensor)
    return next((c for c in checks if (c.step, c.layer, c.tensor) == where), None)


def _cause(failure: Failure, item: TraceJudgement) -> str:
    check = _row_check(failure, item.rows)
    if failure.diagnosis is not None:
        return _with_reading(_diagnosis_in_words(failure.diagnosis, check), item.reading)
    if is_turned(failure.arm):
        knob = failure.arm.partition("@")[2]
        return f"the engine's own knob: {place(failure.layer, failure.tensor)} changes with {_KNOBS.get(knob, knob)}"
    if failure.of_control:
        return (
            f"prefill itself: the same token at {place(failure.layer, failure.tensor)} changes with what stands behind "
            "it or with the prefill's length, beyond rounding; look at the causal mask, chunking and reshapes by token "
            "count"
        )
    rows = rows_in_words(check) if check is not None else ""
    return _with_reading(rows or _op_in_words(failure, item.cells), item.reading)


def _other_control(failure: Failure) -> str:
    return f"control {failure.arm}" if is_turned(failure.arm) else "a longer prefill"


def _what_it_tells(control: Failure) -> str:
    if control.arm.partition("@")[2] == "chunks":
        return "its calls read the cache, as decode's do"
    return "the prefill may be the wrong side"


_KNOBS = {
    "batch": "a second sequence beside it in the batch, beyond rounding: rows of the batch mixed up, or a shape "
    "taken for one sequence",
    "threads": "the number of threads, beyond rounding: a reduction that depends on it, or a race",
    "chunks": "the prefill being fed in chunks, beyond rounding: positions, mask or cache of a call on a filled cache",
}


def _diagnosis_in_words(found: Diagnosis, check: RowCheck | None) -> str:
    """Return a cause in words; where it is about rows that the row check knows again, the check's, which name them."""
    if check is not None and found.cause in _TOLD_BY_ROWS:
        return rows_in_words(check)
    words = CAUSES[found.cause].say(found.parameters)
    if "calls" in found.parameters:
        words = f"{words}; in calls {found.parameters['calls']} alone"
    if found.tensor in CACHE_TAPS:
        return f"{'K' if found.tensor == 'k_cache' else 'V'} cache of layer {found.layer}: {words}"
    return f"{place(found.layer, found.tensor)}: {words}"


_TOLD_BY_ROWS = {"cache_shift", "cache_swapped", "cache_blocks", "cache_zero", "cache_other_layer"}


def _notes(failure: Failure, item: TraceJudgement) -> list[str]:
    """Return what else bears on the cause: the other kind of failure, and taps before it that are not told."""
    notes = []
    other = next((f for f in item.failures if f.of_control != failure.of_control), None)
    if other is not None:
        at = place(other.layer, other.tensor)
        notes.append(
            f"{_other_control(other)} differs too, first at {at}: {_what_it_tells(other)}"
            if other.of_control
            else f"{other.phase} differs too, first at {at}"
        )
    first = (failure.step, execution_order(failure.layer, failure.tensor, failure.order))
    untold = [
        c
        for c in item.cells
        if c.status is Status.UNKNOWN and (c.step, execution_order(c.layer, c.tensor, c.reference.order)) < first
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
    inputs = [
        c
        for c in cells
        if c.step == failure.step
        and c.layer == failure.layer
        and c.tensor in tap.inputs
        and (failure.phase != CANDIDATE or c.reference.logical_tok_idx == failure.position)
    ]
    agree = ", ".join(
        f"{c.tensor} (×{c.excess:.2g})" for c in inputs if c.status is Status.PASS and c.excess is not None
    )
    lead = f"the {tap.op} at {where}: " + (
        f"its input agrees, {agree}, its result does not" if agree else "its result differs"
    )
    return f"{lead}; suspects: {tap.suspect}"
