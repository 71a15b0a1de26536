"""Runs one case: plants, captures once, judges with and without the ladder, asks other rules, measures the truth."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.accuracy import models, path_measure, truth
from benchmarks.accuracy.benign import BENIGN
from benchmarks.accuracy.cases import BENIGN as BENIGN_KIND
from benchmarks.accuracy.cases import CLEAN, FAULT, Case
from benchmarks.accuracy.keepers import cannot_vary
from benchmarks.accuracy.outcome import CANNOT_ACT, ERROR, OK, Answer, Outcome, RuleAnswer, Wanted
from benchmarks.accuracy.rules import RULES, Tapped, ask
from driftprobe import products
from driftprobe.api import add_matrices
from driftprobe.artifacts import Layout
from driftprobe.capture import CaptureOptions, capture, choose_tokens
from driftprobe.causes import agree
from driftprobe.diagnose import diagnose
from driftprobe.errors import UsageError
from driftprobe.faults import FAULTS, Expected
from driftprobe.judgement import Judgement, TraceJudgement
from driftprobe.load import load_traces
from driftprobe.options import RunOptions, plan_for, rung_of
from driftprobe.payload import Payloads
from driftprobe.plan import Mode, Plan, Prompt, at_rung
from driftprobe.products import LOOKS, wanted_matrices
from driftprobe.taps import execution_order
from driftprobe.trace import Trace
from driftprobe.verdict import judge

HARMLESS = "no MISMATCH"
_CANNOT = ("the fault cannot act here", "the variation cannot act here", "the path cannot run here")


@dataclass(frozen=True)
class Seen:
    """One capture, read back and judged."""

    traces: tuple[Trace, ...]
    """The base trace first, then its rung's."""
    payloads: Payloads
    expected: Expected | None
    black_box: Judgement
    ladder: Judgement | None


def measure(case: Case) -> Outcome:
    """Return what a case comes to. Whatever goes wrong is an outcome too, and is counted."""
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="driftprobe-") as folder:
            found = (_measured_paths if case.path else _measured)(case, Path(folder))
    except UsageError as error:
        status = CANNOT_ACT if error.what in _CANNOT else ERROR
        found = Outcome(case.id, status, f"{error.what}: {error.measured}"[:300])
    except Exception as error:  # an error of any kind is a result of the measurement, not the end of it
        found = Outcome(case.id, ERROR, f"{type(error).__name__}: {error}"[:300])
    return replace(found, seconds=round(time.perf_counter() - started, 3))


def _measured(case: Case, folder: Path) -> Outcome:
    """Return what a run of the engine comes to.

    Raises UsageError where a variation changes not one bit of what the run captured, at any tap and step, in the
    model's own dtype or at its rung: it is none on this machine, and a quiet run of it would say nothing.
    """
    engine = models.engine(*case.model)
    plan = plan_of(case, engine)
    seen = _seen(case, engine, plan, folder)
    wanted = _wanted(case, seen.expected)
    base = truth.captured(seen.traces[0], seen.payloads)
    rung = truth.captured(seen.traces[1], seen.payloads) if len(seen.traces) > 1 else {}
    clean = [] if case.kind == CLEAN else _clean(case, plan, seen)
    if case.kind == BENIGN_KIND and all(map(truth.same, clean, (base, rung))):
        raise cannot_vary(case.name, "not one bit of the run changes", "a model and machine where it does")
    strength = _strength(clean, seen, wanted, base, rung) if case.kind == FAULT else None
    return _outcome(case, seen, wanted, strength, list(_tapped(base, rung)))


def _measured_paths(case: Case, folder: Path) -> Outcome:
    """Return what a run of probe_paths comes to, its trace judged again with the ladder and without."""
    run = path_measure.prepare(case)
    path_measure.capture(run, folder)
    seen = _read(folder / "traces", run.expected)
    wanted = Wanted(HARMLESS) if run.expected is None else _wanted_on_path(run.expected)
    base, *rungs = [path_measure.captured(trace, seen.payloads) for trace in seen.traces]
    rung = rungs[0] if rungs else {}
    strength = None
    if case.kind == FAULT:
        clean = [path_measure.clean_rows(run, trace.header.rung) for trace in seen.traces]
        strength = _strength(clean, seen, wanted, base, rung)
    return _outcome(case, seen, wanted, strength, list(path_measure.tapped(seen.traces[0], base, rung)))


def _outcome(
    case: Case, seen: Seen, wanted: Wanted, strength: tuple[float | None, float] | None, pairs: Sequence[Tapped]
) -> Outcome:
    """Return the outcome of a case that ran; `strength` is a fault's, as `_strength` measures it."""
    floors, change = (None, None) if strength is None else strength
    return Outcome(
        case=case.id,
        status=OK,
        wanted=wanted,
        black_box=_answer(seen.black_box, wanted),
        ladder=None if seen.ladder is None else _answer(seen.ladder, wanted),
        rules={rule.name: _rule_answer(rule, pairs) for rule in RULES},
        floors=floors,
        change=change,
        roundoff=truth.roundoff(seen.traces[-1].header.engine),
    )


def _wanted_on_path(expected: Expected) -> Wanted:
    return Wanted("MISMATCH", expected.layer, expected.tensor, cause=expected.cause,
                  parameters=dict(expected.parameters), family="paths")  # fmt: skip


def plan_of(case: Case, engine: Any) -> Plan:
    """Return the plan of a case: one prompt, in the mode that has arm A."""
    prompt = Prompt("case", models.tokens(case.length, case.seed))
    return plan_for(engine, Mode.KV_ALIGNED, prompt, RunOptions(steps=case.steps, seed=case.seed))


@contextmanager
def kept(case: Case, engine: Any) -> Iterator[Expected | None]:
    """Keep a case's fault or variation in an engine while the context lasts."""
    if case.kind == FAULT:
        with engine.plant(case.name, case.strength) as expected:
            yield expected
    elif case.kind == BENIGN_KIND:
        with BENIGN[case.name].keep(engine):
            yield None
    else:
        yield None


def _seen(case: Case, engine: Any, plan: Plan, folder: Path) -> Seen:
    if case.kind == BENIGN_KIND:
        plan = BENIGN[case.name].plan(plan)
    stage = Layout(folder)
    stage.traces.mkdir()
    with kept(case, engine) as expected:
        _capture(plan, engine, stage.traces)
        seen = _read(stage.traces, expected)
        for looks in (LOOKS, 0):
            if add_matrices(engine, _wanted_of(seen, looks), seen.traces, stage):
                seen = _read(stage.traces, expected)
        return seen


def _wanted_of(seen: Seen, looks: int) -> products.Wanted:
    """Return what either judgement asks for: both read the run's own trace."""
    wanted: products.Wanted = {}
    for judgement in filter(None, (seen.black_box, seen.ladder)):
        for file, places in wanted_matrices(judgement, looks).items():
            wanted[file] = [*dict.fromkeys((*wanted.get(file, ()), *places))]
    return wanted


def _read(folder: Path, expected: Expected | None) -> Seen:
    """Read the traces of a folder and judge them, without the ladder's and with it."""
    traces = tuple(sorted(load_traces(folder), key=lambda trace: trace.header.rung))
    payloads = Payloads(folder)
    return Seen(traces, payloads, expected, _judged(traces[:1], payloads),
                _judged(traces, payloads) if len(traces) > 1 else None)  # fmt: skip


def _capture(plan: Plan, engine: Any, folder: Path) -> None:
    """Write the plan's trace, and the trace of the ladder's rung where the engine has one."""
    tokens, settings = choose_tokens(plan, engine), CaptureOptions(payload="all")
    capture(plan, engine, tokens, folder, settings, _untold)
    rung = rung_of(engine, "auto")
    if rung:
        with engine.at(rung):
            capture(at_rung(plan, rung), engine, tokens, folder, settings, _untold)


def _untold(_line: str) -> None:
    """Take a line of progress that nobody waits for."""


def _judged(traces: tuple[Trace, ...], payloads: Payloads) -> Judgement:
    return diagnose(judge(traces, payloads), traces, payloads)


def _wanted(case: Case, expected: Expected | None) -> Wanted:
    if expected is None:
        return Wanted(HARMLESS)
    fault = FAULTS[case.name]
    return Wanted(fault.verdict, expected.layer, expected.tensor, expected.reading, expected.cause,
                  dict(expected.parameters), fault.family)  # fmt: skip


def _answer(judgement: Judgement, wanted: Wanted) -> Answer:
    judged = _only(judgement)
    first = judged.first_failure
    found = None if first is None else first.diagnosis
    verdict = judged.verdict.value
    detected = verdict == ("MISMATCH" if wanted.verdict == HARMLESS else wanted.verdict)
    cause, parameters = ("", {}) if found is None else (found.cause, dict(found.parameters))
    tap = (None, None) if first is None else (first.layer, first.tensor)
    return Answer(
        verdict=verdict,
        reason=judged.reason,
        layer=tap[0],
        tensor=tap[1],
        reading=judged.reading.value,
        cause=cause,
        parameters=parameters,
        detected=detected,
        tap_exact=detected and tap == (wanted.layer, wanted.tensor),
        cause_exact=bool(cause) and cause == wanted.cause and agree(cause, wanted.parameters, parameters),  # type: ignore[arg-type]
        reading_exact=judged.reading.value == wanted.reading,
    )


def _only(judgement: Judgement) -> TraceJudgement:
    (mode,) = judgement.modes.values()
    (judged,) = mode.prompts
    return judged


def _strength(
    clean: Sequence[truth.Taps], seen: Seen, wanted: Wanted, base: truth.Taps, rung: truth.Taps
) -> tuple[float | None, float]:
    """Return how many floors a fault is at its first tap, and the largest change it makes at the highest precision.

    A fault that only a longer prefill has is measured by that, in the floors that such a control is held to.
    """
    compared, longer = truth.apart(truth.changes(clean[0], base))
    first = (wanted.layer, wanted.tensor)
    judged = _only(seen.black_box)
    floor = next((c.floor.value for c in judged.cells if (c.layer, c.tensor) == first), None)
    bound = truth.bound(seen.traces[0], seen.payloads, *first) if truth.at(longer, *first) else None
    floors = [truth.at(found, *first) / of for found, of in ((compared, floor), (longer, bound)) if of]
    changed = truth.apart(truth.changes(clean[1], rung)) if rung else (compared, longer)
    return max(floors, default=None), max((value for found in changed for value in found.values()), default=0.0)


def _clean(case: Case, plan: Plan, seen: Seen) -> list[truth.Taps]:
    """Return the taps of the clean model, made anew, over the very tokens of the run; then those at its rung."""
    engine, tokens = models.engine(*case.model), seen.traces[0].header.token_ids
    found: list[truth.Taps] = [truth.run_clean(engine, plan, tokens)]
    for trace in seen.traces[1:]:
        with engine.at(trace.header.rung):
            found.append(truth.run_clean(engine, plan, tokens))
    return found


def _rule_answer(rule: Any, pairs: Sequence[Tapped]) -> RuleAnswer | None:
    found = ask(rule, pairs)
    return None if found is None else RuleAnswer(found.detected, found.layer, found.tensor)


def _tapped(base: truth.Taps, rung: Mapping[truth.Place, Any]) -> Iterator[Tapped]:
    places: Sequence[truth.Place] = sorted(
        (place for place in base if place[0] == "P"), key=lambda p: (p[1], execution_order(p[2], p[3]))
    )
    for _, step, layer, tensor in places:
        candidate = base.get(("D", step, layer, tensor))
        if candidate is not None:
            place = ("P", step, layer, tensor)
            yield Tapped(layer, tensor, base[place], candidate, rung.get(place))
