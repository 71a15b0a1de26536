"""The terminal's map: one character a cell, the gravest of all that stands there, no wider than the terminal."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from rich.console import Console

from driftprobe.cli.show import show_map
from driftprobe.compare import NoPayloads
from driftprobe.judgement import Judgement
from driftprobe.report.terminal_map import BEYOND, EQUAL, MOST_LINES, UNTOLD, WITHIN, terminal_map
from driftprobe.verdict import judge
from html_pages import CHANGES, toy_run
from make_trace import drifting, toy
from report_traces import foreign, run


def lines(judgement: Judgement, width: int = 80) -> dict[str, str]:
    found = terminal_map(judgement, width)
    assert found is not None
    return {label.strip(): marks for label, marks in found.lines}


def test_a_fault_is_a_wedge_that_begins_where_it_was_planted() -> None:
    judgement, *_ = toy_run("fault")
    found = terminal_map(judgement, 80)
    assert found is not None
    rows = lines(judgement)
    assert list(rows) == ["embed", "0", "1", "final_norm", "logits"], "in order of execution"
    assert rows["embed"] == EQUAL
    assert set(rows["0"]) == {WITHIN}
    taps = [word.split()[1] for line in found.key for word in line.split("  ")]
    first = taps.index("q_rope")
    before = {tap: mark for tap, mark in zip(taps, rows["1"], strict=True) if taps.index(tap) < first}
    assert set(before.values()) == {WITHIN}
    assert rows["1"][first] == BEYOND
    assert rows["logits"] == BEYOND


def test_missing_and_untold_cells_look_like_neither() -> None:
    judgement, *_ = toy_run("missing")
    rows = lines(judgement)
    assert rows["1"].count(" ") == 1 and rows["0"].count(" ") == 0
    assert UNTOLD in "".join(lines(foreign(sums=False)[0]).values())
    assert set("".join(lines(run()[0]).values())) == {EQUAL}


@pytest.mark.parametrize("width", [24, 40, 80])
def test_it_fits_the_terminal(width: int) -> None:
    judgement, *_ = toy_run("fault")
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    show_map(judgement, console)
    printed = console.export_text().splitlines()
    assert printed
    assert all(len(line) <= width for line in printed)
    found = terminal_map(judgement, width)
    assert found is not None
    assert all(len(label) + 2 + len(marks) <= width for label, marks in found.lines)
    shown = len(found.lines[1][1])
    assert shown + found.cut == len(lines(judgement, 200)["0"])


def test_a_deep_model_keeps_its_gravest_layer_of_each_line() -> None:
    trace, _ = toy(drifting(0.1, start=(57, "q_rope")), arms=(), layers=60, taps=("q_proj", "q_rope", "x_out"))
    rows = lines(judge([trace], NoPayloads()))
    spans = [label for label in rows if label[0].isdigit()]
    assert len(spans) <= MOST_LINES
    assert spans[0] == "0–2" and spans[-1] == "57–59"
    assert rows["57–59"] == BEYOND * 3
    assert set(rows["0–2"]) == {EQUAL}


def test_nothing_compared_is_no_map() -> None:
    assert terminal_map(Judgement(run()[0].verdict, "", {}, None, None), 80) is None


def test_hostile_names_are_shown_as_escapes() -> None:
    from html_pages import hostile_run

    found = terminal_map(hostile_run()[0], 80)
    assert found is not None
    assert all(line.isprintable() for line in (*found.key, *(label for label, _ in found.lines)))


def test_run_prints_it_and_quiet_does_not(tmp_path: object) -> None:
    pytest.importorskip("transformers")
    from driftprobe.cli import group

    words = ["run", "--prompts", "p0_short", "--mode", "as_designed", "--ladder", "off", "--out", str(tmp_path)]
    loud = CliRunner().invoke(group, words, standalone_mode=False)
    assert "a x_in  b attn_norm" in loud.output, loud.output
    assert "report.html" in loud.output
    quiet = CliRunner().invoke(group, [*words, "--quiet"], standalone_mode=False)
    assert "a x_in" not in quiet.output and quiet.output.startswith("verdict: STRUCTURAL_DRIFT")


def test_open_shows_the_page_in_the_browser(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    from driftprobe.cli import group
    from driftprobe.trace_file import TraceWriter

    folder = Path(str(tmp_path))
    trace, _ = toy(CHANGES["rounding"])
    with TraceWriter(folder / "traces" / trace.path, trace.header) as writer:
        for record in trace.records:
            writer.record(record)
        for event in trace.events:
            writer.event(event)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    CliRunner().invoke(group, ["report", str(folder)], standalone_mode=False)
    assert opened == []
    CliRunner().invoke(group, ["report", str(folder), "--open"], standalone_mode=False)
    assert opened == [(folder / "report.html").as_uri()]
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
