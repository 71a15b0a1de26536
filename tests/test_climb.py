"""The ladder: a bug keeps its size, arithmetic shrinks with the roundoff, and each pair of runs becomes one verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from driftprobe.climb import MODERATE, ROUNDING, SHRINKS
from driftprobe.compare import PayloadSource
from driftprobe.diagnose import diagnose
from driftprobe.fingerprint import UNIT_ROUNDOFF
from driftprobe.floor import LIMIT
from driftprobe.judgement import Judgement, Ladder, Outcome, Reading, TraceJudgement, Verdict
from driftprobe.report import render_all
from driftprobe.taps import PATHS
from driftprobe.trace import COST, OTHER_TOKEN, Event, Record, Trace
from driftprobe.verdict import base_traces, judge
from make_trace import Change, Site, both, both_payloads, drifting, scaled, toy, unchanged, without

BASE, RUNG = UNIT_ROUNDOFF["float32"], UNIT_ROUNDOFF["float64"]
START = (1, "attn_ctx")


def run_and_rung(base: Change, rung: Change, **facts: object) -> tuple[tuple[Trace, ...], PayloadSource]:
    """A float32 run and its rung in float64, with their tensors."""
    below, arrays = toy(base, mode="kv_aligned", arms=("E1",))
    above, more = toy(rung, mode="kv_aligned", arms=("E1",), dtype=np.float64, facts=facts)
    cost = Event(event=COST, arm="", measured={"milliseconds": 1500})
    above = replace(above, header=replace(above.header, rung="float64"), path="p0_kv_aligned_float64.jsonl",
                    events=(*above.events, cost))  # fmt: skip
    return (below, above), both_payloads((below, arrays), (above, more))


def climbed(base: Change, rung: Change, **facts: object) -> tuple[Judgement, TraceJudgement, Ladder]:
    traces, arrays = run_and_rung(base, rung, **facts)
    judged = diagnose(judge(traces, arrays), traces, arrays)
    item = judged.modes["kv_aligned"].prompts[0]
    assert item.ladder is not None
    return judged, item, item.ladder


def off(size: float, start: tuple[int | None, str] = START) -> Change:
    return drifting(size, start=start, caches=False)


def test_clean_at_both_leaves_the_verdict_and_sharpens_the_limit():
    judged, item, ladder = climbed(off(2 * BASE), off(2 * RUNG))
    assert judged.verdict is Verdict.STRUCTURAL_DRIFT
    assert ladder.outcome is Outcome.AGREES
    assert ladder.seconds == 1.5
    assert (ladder.base_unit, ladder.unit, ladder.limited_by) == (BASE, RUNG, "float64")
    assert item.limits is not None and ladder.judged.limits is not None
    assert ladder.judged.limits.largest < 1e-6 * item.limits.smallest


def test_a_bug_below_the_runs_floor_is_found_at_the_rung():
    size = 3 * BASE
    judged, item, ladder = climbed(off(size), off(size))
    assert ladder.base_verdict is Verdict.STRUCTURAL_DRIFT
    assert judged.verdict is Verdict.MISMATCH
    assert ladder.outcome is Outcome.SHARPER
    first = judged.first_failure
    assert first is not None
    assert (first.layer, first.tensor, first.rung) == (*START, "float64")
    assert first.drift == pytest.approx(size, rel=1e-3)
    assert first.root_cause
    assert "float64" in judged.reason
    assert item.decided_by is ladder.judged
    slopes = [s.slope for s in ladder.slopes if (s.layer, s.tensor) == START]
    assert slopes[0] == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("above", [3.0, 0.1])
def test_a_failure_that_shrinks_with_the_roundoff_is_arithmetic(above):
    """The floor was measured too low: three times the limit here, and about as many roundoffs above."""
    size = _floor_at(START) * LIMIT
    judged, item, ladder = climbed(off(3 * size), off(above * size / BASE * RUNG))
    assert ladder.judged.verdict is (Verdict.MISMATCH if above > 1 else Verdict.STRUCTURAL_DRIFT)
    assert ladder.base_verdict is Verdict.MISMATCH
    assert ladder.outcome is Outcome.SCALES
    assert judged.verdict is Verdict.STRUCTURAL_DRIFT
    assert judged.first_failure is None and item.failures == ()
    assert "scales with the unit roundoff" in judged.reason


def test_a_failure_far_beyond_its_dtype_that_is_gone_is_a_cast_nobody_declared():
    size = ROUNDING * UNIT_ROUNDOFF["bfloat16"]
    judged, _, ladder = climbed(off(size), off(2 * RUNG))
    assert ladder.outcome is Outcome.PRECISION
    assert judged.verdict is Verdict.MISMATCH
    first = judged.first_failure
    assert first is not None and first.rung == "" and first.diagnosis is not None
    assert (first.diagnosis.cause, dict(first.diagnosis.parameters)) == ("precision", {"dtype": "bfloat16"})
    assert first.diagnosis.explained == pytest.approx(1.0)
    assert "as bfloat16 would" in first.root_cause


def test_a_moderate_failure_that_is_gone_too_slowly_is_no_arithmetic():
    """It passes at the rung only because a cast is left there; a slope of a half is no slope of one."""
    size = _floor_at(START) * LIMIT * 3
    slow = size * (BASE / RUNG) ** -0.5
    assert slow > 100 * RUNG and SHRINKS > 0.5
    judged, _, ladder = climbed(off(size), off(slow), casts={"softmax": "float32"})
    assert ladder.judged.verdict is Verdict.STRUCTURAL_DRIFT
    assert (ladder.unit, ladder.limited_by) == (BASE, "float32 (softmax)")
    assert ladder.outcome is Outcome.PRECISION
    assert judged.verdict is Verdict.MISMATCH


@pytest.mark.parametrize("side", ["base", "rung"])
def test_a_shut_gate_leaves_the_runs_own_verdict(side):
    lost = without(arm="D", tensor="x_out", layer=1)
    changes = (both(off(0.1), lost), off(0.1)) if side == "base" else (off(0.1), both(off(0.1), lost))
    judged, _, ladder = climbed(*changes)
    assert ladder.outcome is Outcome.NOT_TOLD
    assert judged.verdict is ladder.base_verdict
    assert judged.verdict is (Verdict.NOT_AVAILABLE if side == "base" else Verdict.MISMATCH)
    assert judged.first_failure is None or judged.first_failure.rung == ""


@pytest.mark.parametrize(("size", "verdict"), [(3 * BASE, Verdict.MISMATCH), (2 * RUNG, Verdict.NOT_AVAILABLE)])
def test_another_token_is_explained_by_a_failure_before_it_at_the_rung_alone(size: float, verdict: Verdict) -> None:
    """What made the candidate choose otherwise may be under the run's own floor."""
    judged, ladder = strayed(size, PATHS)
    assert judged.verdict is verdict
    assert ladder.base_verdict is Verdict.NOT_AVAILABLE
    assert ladder.outcome is (Outcome.SHARPER if verdict is Verdict.MISMATCH else Outcome.NOT_TOLD)


def strayed(size: float, mode: str, other: int = 0) -> tuple[Judgement, Ladder]:
    """A run and its rung that are off by a size, in which the candidate goes on with another token.

    `other` is how far off the run's own token ids are, on the candidate's side.
    """

    def token(record: Record) -> Record:
        named = record.arm == "D" and record.token_id is not None and other
        return replace(record, token_id=record.token_id + other) if named else record  # type: ignore[operator]

    (below, arrays), (above, more) = (
        toy(off(size), mode="kv_aligned", arms=("E1",), dtype=dtype) for dtype in (np.float32, np.float64)
    )
    above = replace(above, header=replace(above.header, rung="float64"), path="p0_kv_aligned_float64.jsonl")
    below = replace(below, records=tuple(map(token, below.records)))
    event = Event(event=OTHER_TOKEN, arm="D", measured={"position": 9})
    traces = [replace(trace, header=replace(trace.header, mode=mode), events=(*trace.events, event))
              for trace in (below, above)]  # fmt: skip
    judged = judge(traces, both_payloads((traces[0], arrays), (traces[1], more)))
    ladder = judged.modes[mode].prompts[0].ladder
    assert ladder is not None
    return judged, ladder


@pytest.mark.parametrize(("mode", "other"), [("kv_aligned", 0), (PATHS, 1)])
def test_a_same_token_gate_that_more_shuts_than_a_paths_own_choice_stays_shut(mode: str, other: int) -> None:
    judged, ladder = strayed(3 * BASE, mode, other)
    assert (judged.verdict, ladder.outcome) == (Verdict.NOT_AVAILABLE, Outcome.NOT_TOLD)


def test_a_rung_without_its_run_stands_for_itself():
    traces, arrays = run_and_rung(unchanged, off(1e-6))
    assert base_traces(traces) == traces[:1]
    assert base_traces(traces[1:]) == traces[1:]
    judged = judge(traces[1:], arrays)
    assert judged.verdict is Verdict.MISMATCH and judged.ladders == ()


def test_the_reading_is_the_rungs_where_it_decides():
    contents = drifting(3 * BASE, arms=("D", "D'"), start=(0, "k_cache"))
    judged, item, _ = climbed(contents, contents)
    assert item.reading.value == "contents"
    assert "contents are wrong" in (judged.first_failure.root_cause if judged.first_failure else "")


def test_every_report_shows_the_ladder():
    traces, arrays = run_and_rung(off(3 * BASE), off(3 * BASE))
    judged = diagnose(judge(traces, arrays), traces, arrays)
    texts = render_all(judged, traces)
    page, final, analysis, tsv, verdict = texts.values()
    assert "beyond the floor there, where rounding is far too small" in page
    assert "### Precision Ladder" in final and "| `p0` | kv_aligned | float64 | 1.11e-16 |" in final
    assert "1.50" in final and "p0_kv_aligned_float64.jsonl" in final
    assert "#### Precision ladder" in analysis
    assert tsv.splitlines()[0].split("\t")[-3:] == ["ladder_drift", "ladder_excess", "slope"]
    assert len({len(line.split("\t")) for line in tsv.splitlines()}) == 1
    assert '"outcome": "sharper"' in verdict and '"seconds": 1.5' in verdict
    alone = traces[:1]
    assert "Not climbed" in render_all(judge(alone, arrays), alone)["B3_66_V2_FINAL_REPORT.md"]


def _floor_at(where: tuple[int | None, str]) -> float:
    trace, arrays = toy(unchanged, mode="kv_aligned", arms=("E1",))
    cells = judge([trace], arrays).modes["kv_aligned"].cells
    floor = next(cell.floor.value for cell in cells if (cell.layer, cell.tensor) == where)
    assert MODERATE > 3 * LIMIT
    return floor


def test_a_site_is_changed_where_it_is_said():
    assert scaled(np.ones(1, np.float32), 1.0)[0] == 2.0
    assert off(1.0)(Site("D", 0, *START), np.ones(1, np.float32))[0] == 2.0


def test_a_failure_that_the_ladder_takes_for_rounding_reads_h0():
    """A verdict of arithmetic beside a reading of wrong computation would contradict itself."""
    _, item, ladder = climbed(off(6 * _floor_at(START)), off(2 * RUNG))
    assert ladder.outcome is Outcome.SCALES
    assert item.reading is Reading.H0


@pytest.mark.parametrize("size", [0.9, 3.0])
def test_a_failure_of_no_dtypes_size_that_is_gone_is_not_called_rounding(size):
    judged, item, ladder = climbed(off(size), off(2 * RUNG))
    assert judged.verdict is Verdict.MISMATCH
    assert ladder.outcome is Outcome.PRECISION
    assert item.first_failure is not None
    assert item.first_failure.diagnosis is None
