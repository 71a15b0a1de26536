"""What every report says of a failure that its floor did not tell, and of an engine's knob that changes the result."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from driftprobe.climb import in_words, sharper_words
from driftprobe.diagnose import diagnose
from driftprobe.judgement import Cell, Failure, Judgement, Status, TraceJudgement, Verdict
from driftprobe.local import Ground
from driftprobe.matched import Match
from driftprobe.report import analysis, final_report, github, junit, reasoning
from driftprobe.report.facts import drift_words, sharper
from driftprobe.report.terminal_map import LEGEND
from driftprobe.trace import Trace
from driftprobe.verdict import judge
from html_pages import data_of, page_of
from make_trace import Arrays, Change, Site, both, drifting, rotated, scaled, toy

EXCESS = "×9.87 (limit 1.5)"


def wrong_rotation(site: Site, array: object) -> object:
    """A query that is off by 1e-7 before its rotation and by a tenth behind it: no rotation does that."""
    size = {"q_proj": 1e-7, "q_rope": 0.1}.get(site.tensor, 0.0)
    return scaled(array, size) if size and (site.arm, site.layer) == ("D", 0) else array  # type: ignore[arg-type]


def under_the_limit() -> tuple[Judgement, Trace, Arrays]:
    """Return a run in which a rotation fails by its distances alone."""
    change: Change = both(rotated, wrong_rotation)  # type: ignore[arg-type]
    trace, arrays = toy(change, facts={"casts": {"q_proj": "bfloat16"}})
    return diagnose(judge([trace], arrays), [trace], arrays), trace, arrays


def on_ground(ground: Ground) -> tuple[Judgement, Trace, Arrays]:
    """Return that run as if another ground had told its failure."""
    judgement, trace, arrays = under_the_limit()
    item = judgement.modes["as_designed"].prompts[0]

    def told(of: Cell | Failure) -> Cell | Failure:
        assert of.local is not None
        return replace(of, local=replace(of.local, ground=ground, excess=9.8712))

    cells = tuple(told(c) if sharper(c) else c for c in item.cells)
    failures = tuple(told(f) if f.local else f for f in item.failures)
    changed: TraceJudgement = replace(item, cells=cells, failures=failures)  # type: ignore[arg-type]
    mode = replace(judgement.modes["as_designed"], prompts=(changed,), first_failure=changed.first_failure)
    return replace(judgement, modes={"as_designed": mode}), trace, arrays


@pytest.mark.parametrize("ground", Ground)
def test_every_report_says_on_what_ground_a_failure_under_the_limit_was_told(ground: Ground) -> None:
    judgement, trace, _ = on_ground(ground)
    plain = lambda text: text.replace("\\", "")  # noqa: E731
    for render in (final_report.render, analysis.render, reasoning.render, junit.render):
        text = plain(render(judgement, [trace]))
        assert ground.words in text, render.__module__
        assert EXCESS in text, render.__module__
    assert ground.words in plain(github.summary(judgement, [trace], ""))
    assert any(EXCESS in line for line in github.annotate(judgement, ""))


@pytest.mark.parametrize("ground", Ground)
def test_the_page_says_it_beside_the_verdict_and_in_the_cells_record(ground: Ground) -> None:
    judgement, trace, arrays = on_ground(ground)
    page = page_of(judgement, (trace,), arrays)
    words = f"{ground.words} {EXCESS}"
    assert f"but {words}".replace("'", "&#39;") in page
    assert {more["t"] for column in data_of(page)["columns"] if isinstance(column, dict)
            for more in column.values() if "t" in more} == {words}  # fmt: skip


def test_what_is_under_the_limit_is_not_called_beyond_the_floor() -> None:
    judgement, trace, _ = under_the_limit()
    item = judgement.modes["as_designed"].prompts[0]
    failing = [cell for cell in item.cells if cell.status is Status.FAIL]
    assert failing and all(sharper(cell) for cell in failing)
    assert {drift_words(cell).split(":")[0] for cell in failing} == {"MORE THAN ROUNDING"}
    assert "1 of 37 more than rounding, 0 of them beyond the floor" in final_report.render(judgement, [trace])
    assert "# more than rounding" in LEGEND


def test_what_the_floor_tells_needs_no_other_ground() -> None:
    trace, arrays = toy(drifting(0.1, start=(1, "q_rope")))
    judgement = diagnose(judge([trace], arrays), [trace], arrays)
    assert not any(sharper(cell) for cell in judgement.modes["as_designed"].cells)
    assert "under the limit" not in final_report.render(judgement, [trace]).lower()
    assert '"t":' not in page_of(judgement, (trace,), arrays).partition('id="data">')[2].partition("</script>")[0]


@pytest.mark.parametrize(("arm", "other"), [("P@batch", "P"), ("D@batch", "D"), ("P@threads", "P"), ("P@chunks", "P")])
def test_a_knob_is_compared_with_the_arm_it_turns(arm: str, other: str) -> None:
    trace, arrays = toy(drifting(0.1, (arm,), (1, "attn_ctx")), arms=("P'", "D'", "E1", arm))
    judgement = diagnose(judge([trace], arrays), [trace], arrays)
    first = judgement.first_failure
    assert judgement.verdict is Verdict.MISMATCH and first is not None
    assert in_words(first).startswith(f"{arm} differs from {other} at layer 1 attn_ctx, prompt p0, step 0: ")
    report = final_report.render(judgement, [trace])
    assert f"**First Failure**: layer 1 attn_ctx of p0, step 0, {arm} against {other}\n" in report
    assert f"arms {other} and {arm} differ by more than arithmetic explains" in report
    assert f"{arm} against {other}" in reasoning.render(judgement, [trace])
    assert f"A bug: {other} and {arm}, the same run but for a knob, differ" in page_of(judgement, (trace,), arrays)
    assert f"| {arm} | {other} " in analysis.render(judgement, [trace])


def test_the_evidence_of_a_knob_is_the_two_records_that_differ() -> None:
    trace, arrays = toy(drifting(0.1, ("D@batch",), (1, "attn_ctx")), arms=("P'", "D'", "E1", "D@batch"))
    judgement = diagnose(judge([trace], arrays), [trace], arrays)
    report = final_report.render(judgement, [trace])
    shown = {r.arm: r.hash for r in trace.records if (r.layer, r.tensor) == (1, "attn_ctx")}
    assert shown["D"] in report and shown["D@batch"] in report


def test_the_docs_explain_every_ground_in_its_own_words() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs/reading-a-report.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([^`]*)` \|", page, flags=re.MULTILINE)
    told = sharper_words(None, Match("q_rope", 0, 1, "rope_scaling", {}, 0.1, 0.01, 6.0, ()))
    assert {ground.words for ground in Ground} == {words for words in listed if "of themselves" not in words}
    (filter_words,) = [words for words in listed if "of themselves" in words]
    assert re.match(filter_words.replace("…", ".*"), told)
