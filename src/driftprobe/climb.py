"""climb(): a run and its rung of the precision ladder become one judgement.

Arithmetic drift scales with the unit roundoff, and a bug does not. At the rung, with the model's own casts lifted, what
rounding leaves is small enough for a bug to stand alone; what was beyond the floor in the run and is gone at the rung
was rounding, of this dtype or of a coarser one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from driftprobe.fingerprint import UNIT_ROUNDOFF
from driftprobe.floor import LIMIT, UNKNOWN_DTYPE, is_turned, repeated
from driftprobe.judgement import (
    Cell,
    Diagnosis,
    Failure,
    Ladder,
    Outcome,
    Reading,
    Slope,
    Status,
    TraceJudgement,
    Verdict,
)
from driftprobe.local import LOCAL_LIMIT, Local
from driftprobe.matched import MIN_Z, Match
from driftprobe.taps import CANDIDATE, REFERENCE, execution_order, place
from driftprobe.trace import EngineFacts

MODERATE = 4 * LIMIT
"""Largest excess that may be a floor measured too low. A floor is the largest of a few draws; LIMIT is the margin for
that, and the largest excess measured in healthy runs is within it (docs/decisions/0003-limit.md). A margin on that
margin is as large again. What lies beyond is no tail: the next coarser dtype of float32 rounds 8192 times as much. From
float16 to bfloat16, 8 times apart, an undeclared cast can be smaller than this and is then taken for arithmetic."""
SHRINKS = 0.75
"""Slope from which a drift counts as scaling with the unit roundoff: about 1 for arithmetic, about 0 for a bug. Drifts
of a few roundings stray by a factor of ten or so: a tenth of a slope over nine decades, a quarter over four."""
NEAR = 4.0
"""How far off a dtype's rounding a drift may be to be taken for it; the next dtype is 2 to 8 times as coarse."""
ROUNDING = 0.4
"""Relative L2 error of rounding many numbers once, in unit roundoffs: uniform errors are u/√3 of the power of two below
a number, and the root mean square of numbers is about 1.5 of that power."""


def climb(base: TraceJudgement, rung: TraceJudgement, name: str, seconds: float | None) -> TraceJudgement:
    """Return the run's judgement with what the rung says of it; `seconds` is what the rung took."""
    base_unit, unit = _unit(base.engine)[0], _unit(rung.engine)[0]
    slopes = _slopes(base.cells, rung.cells, unit, base_unit)
    outcome = _outcome(base, rung, slopes)
    guilty = {failure.arm for failure in rung.failures if failure.of_control}
    drifts = [drift for arm, drift in rung.controls.items() if math.isfinite(drift) and arm not in guilty]
    ladder = Ladder(name, rung, outcome, base.verdict, base_unit, unit, _unit(rung.engine)[1],
                    max(drifts, default=None), slopes, seconds)  # fmt: skip
    judged = replace(base, ladder=ladder)
    if outcome is Outcome.SHARPER:
        failures = tuple(replace(failure, rung=name) for failure in rung.failures)
        return replace(judged, verdict=Verdict.MISMATCH, reason=in_words(failures[0]), failures=failures,
                       reading=rung.reading)  # fmt: skip
    if outcome is Outcome.SCALES:
        return _explained(judged, slopes)
    if outcome is Outcome.AGREES and _hinges_on_a_tie(base):
        reason = f"{base.flips[0].words}: a near tie, as at {name}, where rounding turns none, {outcome.words}"
        return replace(judged, verdict=Verdict.STRUCTURAL_DRIFT, reason=reason)
    if outcome is Outcome.PRECISION:
        first = replace(base.failures[0], diagnosis=_precision(base.failures[0], rung.cells, base_unit))
        return replace(judged, failures=(first, *base.failures[1:]))
    return judged


def _outcome(base: TraceJudgement, rung: TraceJudgement, slopes: Sequence[Slope]) -> Outcome:
    shut = [gate for gate in base.gates if not gate.passed]
    if rung.verdict is Verdict.NOT_AVAILABLE or not all(gate.strayed for gate in shut):
        return Outcome.NOT_TOLD
    if shut:  # nothing failed before another token was chosen; where the rung says what did, that is why
        return Outcome.SHARPER if rung.verdict is Verdict.MISMATCH else Outcome.NOT_TOLD
    if base.verdict is Verdict.MISMATCH and _scale((*base.failures, *rung.failures), slopes):
        return Outcome.SCALES
    if rung.verdict is Verdict.MISMATCH:
        return Outcome.SHARPER
    return Outcome.PRECISION if base.verdict is Verdict.MISMATCH else Outcome.AGREES


def _hinges_on_a_tie(base: TraceJudgement) -> bool:
    """Whether a choice that nobody recorded, a near tie or a wrong one, is all that keeps a run from its verdict."""
    untold = bool(base.flips) and not base.flips[0].told and base.reading is not Reading.HARNESS
    return untold and all(cell.status is Status.PASS for cell in base.cells) and not base.failures


def _scale(failures: Sequence[Failure], slopes: Sequence[Slope]) -> bool:
    """Whether failures are moderate, and each tap's drift shrinks with the roundoff."""
    by_place = {(slope.layer, slope.tensor): slope for slope in slopes}
    return all(map(_moderate, failures)) and all(
        _shrinks(by_place.get((failure.layer, failure.tensor))) for failure in failures
    )


def _moderate(failure: Failure) -> bool:
    """Whether a failure may be a margin set too low; one that moves all elements one way is no tail of anything."""
    local = 0.0 if failure.local is None else failure.local.excess
    return failure.match is None and local <= MODERATE / LIMIT * LOCAL_LIMIT and failure.excess <= MODERATE


def _shrinks(slope: Slope | None) -> bool:
    if slope is None:
        return False
    return slope.rung == 0.0 or (slope.slope is not None and slope.slope >= SHRINKS)


def _slopes(base: Sequence[Cell], rung: Sequence[Cell], unit: float, base_unit: float) -> tuple[Slope, ...]:
    below, above = _largest(base), _largest(rung)
    step = math.log(unit / base_unit)
    found = []
    ranks = {(cell.layer, cell.tensor): cell.reference.order for cell in base}
    for where in sorted(below.keys() & above.keys(), key=lambda p: execution_order(p[0], p[1], ranks[p])):
        d, r = below[where], above[where]
        told = step != 0.0 and all(0.0 < drift < math.inf for drift in (d, r))
        found.append(Slope(*where, d, r, math.log(r / d) / step if told else None))
    return tuple(found)


def _largest(cells: Sequence[Cell]) -> dict[tuple[int | None, str], float]:
    found: dict[tuple[int | None, str], float] = {}
    for cell in cells:
        if cell.drift.value is not None:
            where = (cell.layer, cell.tensor)
            found[where] = max(found.get(where, 0.0), cell.drift.value)
    return found


def _unit(facts: EngineFacts) -> tuple[float, str]:
    """Return the unit roundoff of the coarsest dtype that an engine declares, and its name with where it comes in."""
    declared = {facts.dtype or UNKNOWN_DTYPE: facts.dtype or UNKNOWN_DTYPE}
    declared |= {f"{dtype} ({where})": dtype for where, dtype in facts.casts.items()}
    known = {words: UNIT_ROUNDOFF[dtype] for words, dtype in declared.items() if dtype in UNIT_ROUNDOFF}
    words = max(known, key=lambda name: known[name], default=UNKNOWN_DTYPE)
    return known.get(words, UNIT_ROUNDOFF[UNKNOWN_DTYPE]), words


def _explained(judged: TraceJudgement, slopes: Sequence[Slope]) -> TraceJudgement:
    """Return the judgement of a run whose failures the ladder takes for rounding."""
    worst = max(judged.failures, key=lambda failure: failure.excess)
    slope = next(s.slope for s in slopes if (s.layer, s.tensor) == (worst.layer, worst.tensor))
    scale = "gone" if slope is None else f"slope {slope:.2f}"
    reason = (
        f"largest excess {worst.excess:.2g} × floor, at {place(worst.layer, worst.tensor)}, is beyond {LIMIT:g}: "
        f"{Outcome.SCALES.words} ({scale} on the precision ladder)"
    )
    cells, aligned = (
        tuple(replace(cell, status=Status.PASS) if cell.status is Status.FAIL else cell for cell in found)
        for found in (judged.cells, judged.aligned_cells)
    )
    reading = Reading.H0 if aligned else Reading.NONE
    return replace(judged, verdict=Verdict.STRUCTURAL_DRIFT, reason=reason, failures=(), cells=cells,
                   aligned_cells=aligned, reading=reading)  # fmt: skip


def _precision(first: Failure, rung: Sequence[Cell], base_unit: float) -> Diagnosis | None:
    """Return the cause of a failure that is gone at the rung: the dtype whose rounding has the drift's size.

    None where no dtype's rounding is of that size: then it is no rounding, but a kernel of the run's own dtype.
    """
    if not 0.0 < first.drift < math.inf:
        return None
    coarser = [dtype for dtype, unit in UNIT_ROUNDOFF.items() if unit > base_unit and dtype != "tfloat32"]
    apart = {name: abs(math.log(first.drift / (ROUNDING * UNIT_ROUNDOFF[name]))) for name in coarser}
    dtype = min(apart, key=lambda name: apart[name], default=None)
    if dtype is None or apart[dtype] > math.log(NEAR):
        return None
    left = next(
        (
            c.drift.value or 0.0
            for c in rung
            if (c.step, c.layer, c.tensor) == (first.step, first.layer, first.tensor)
            and (first.phase != CANDIDATE or c.candidate.logical_tok_idx == first.position)
        ),
        0.0,
    )
    return Diagnosis("precision", {"dtype": dtype}, first.layer, first.tensor, left,
                     1.0 - (left / first.drift) ** 2)  # fmt: skip


def in_words(failure: Failure) -> str:
    """Return a failure in a sentence: what, where, measured, allowed."""
    rung = f", run again in {failure.rung}" if failure.rung else ""
    at = f"position {failure.position}" if failure.phase == CANDIDATE else f"step {failure.step}"
    where = f"{place(failure.layer, failure.tensor)}, prompt {failure.prompt}, {at}{rung}"
    mine, other = sides_of(failure)
    lead = f"{mine} differs from {other} at {where}: drift {failure.drift:.2e}, "
    sharper = sharper_words(failure.local, failure.match)
    if not sharper:
        return f"{lead}floor {failure.floor:.2e} (×{failure.excess:.3g}, limit {LIMIT:g})"
    under = f"floor of {failure.floor:.2e}" if failure.excess < 1.0 else f"limit of {LIMIT * failure.floor:.2e}"
    return f"{lead}under the {under}, but {sharper}"


def sides_of(failure: Failure) -> tuple[str, str]:
    """Return what differs and from what: phases, or arms where one was run again with a knob turned."""
    if is_turned(failure.arm):
        return failure.arm, repeated(failure.arm)
    return failure.phase, REFERENCE if failure.phase == CANDIDATE else "prefill_last"


def sharper_words(local: Local | None, match: Match | None) -> str:
    """Return what told a failure that its floor did not, with its figure and limit; nothing where both are None."""
    if local is not None:
        return f"{local.ground.words} ×{local.excess:.3g} (limit {LOCAL_LIMIT:g})"
    if match is not None:
        return (
            f"all elements move one way, by {match.share:+.2e} ± {match.error:.1e} of themselves "
            f"({abs(match.z):.1f} standard errors, limit {MIN_Z:g})"
        )
    return ""
