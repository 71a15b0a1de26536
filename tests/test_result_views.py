"""What a Result shows of itself: its map in a notebook, its reasoning as text, its records as a frame."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from driftprobe import Result, analyze
from driftprobe.errors import UsageError
from driftprobe.frames import COLUMNS, LIBRARIES, to_frame
from driftprobe.report import colours, inline, reasoning
from driftprobe.trace import Trace
from make_trace import assert_five_parts, drifting, toy
from report_traces import broken_from, foreign, judged, prompt_trace, rounding, run, same
from test_output import hostile
from test_pytest_plugin import write

ROOT = Path(__file__).resolve().parents[1]


TAGS = {"div", "p", "b", "br", "table", "caption", "thead", "tbody", "tr", "th", "td", "span"}


class Page(HTMLParser):
    """The elements of a fragment, their nesting checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def boxes(page: Page) -> list[dict[str, str | None]]:
    return [attrs for tag, attrs in page.seen if tag == "td" and attrs.get("title")]


def test_the_map_has_a_box_for_every_tap_and_the_gravest_prompt_in_it():
    changes = {"p0_short": same, "p6_len_16": broken_from(1, "q_rope"), "p6_len_32": same}
    judgement = judged([prompt_trace(prompt, "kv_aligned", change) for prompt, change in changes.items()])
    page = Page(inline.render(judgement))
    titles = [str(box["title"]) for box in boxes(page)]
    assert len(titles) == len({(cell.layer, cell.tensor) for m in judgement.modes.values() for cell in m.cells})
    (rope,) = [box for box in boxes(page) if str(box["title"]).startswith("layer 1 q_rope")]
    assert "BEYOND THE FLOOR" in str(rope["title"]) and colours.BEYOND[2][1].colour in str(rope["style"])
    (before,) = [box for box in boxes(page) if str(box["title"]).startswith("layer 0 q_rope")]
    assert colours.EQUAL.colour in str(before["style"])
    assert "MISMATCH" in page.text and "First failure" in page.text and "layer 1 q_rope" in page.text


def test_a_tap_that_a_layer_lacks_is_hatched_and_a_pass_has_no_failure():
    trace, _ = toy(drifting(1e-7))
    fewer = replace(trace, records=tuple(r for r in trace.records if (r.layer, r.tensor) != (1, "q_rope")))
    page = Page(inline.render(judged((replace(fewer, header=replace(fewer.header, taps={})),))))
    assert sum(colours.MISSING in str(attrs.get("style")) for tag, attrs in page.seen if tag == "td") == 1
    assert "First failure" not in page.text


def test_nothing_leaves_the_page_and_nothing_runs_in_it():
    for judgement in (run(rounding)[0], foreign()[0], hostile()[0], judged(())):
        page = Page(inline.render(judgement))
        assert {tag for tag, _ in page.seen} <= TAGS
        for _, attrs in page.seen:
            assert set(attrs) <= {"style", "title", "class", "colspan"}
            assert "url(" not in str(attrs.get("style"))
    assert "<script" not in inline.render(hostile()[0]) and "&lt;script&gt;" in inline.render(hostile()[0])


def test_a_deep_model_stays_small():
    trace, _ = toy(drifting(0.1, start=(100, "q_rope")), layers=126)
    text = inline.render(judged((trace,)))
    assert len(text) < 200_000
    rows = re.findall(r"layers? \d+(?:–\d+)?</th>", text)
    assert 1 < len(rows) <= inline.MOST_ROWS and rows[-1].startswith("layers 124–125")


@pytest.mark.parametrize(
    ("excess", "band"), [(0.09, "b0"), (0.11, "b1"), (0.31, "b2"), (0.9, "b2"), (1.1, "b3"), (3.9, "b3"), (4.1, "f1"),
                         (9.9, "f1"), (11, "f2"), (999, "f2"), (1001, "f3"), (1.1e6, "f4"), (1.1e12, "f5")],
)  # fmt: skip
def test_bands_follow_the_excess(excess, band):
    cell = next(c for c in judged((toy(drifting(1e-7))[0],)).modes["as_designed"].cells if not c.drift.equal)
    drift = replace(cell.drift, value=excess * cell.floor.value)
    status = type(cell.status).FAIL if excess > 4 else type(cell.status).PASS
    assert colours.band_of(replace(cell, drift=drift, status=status)).name == band


def test_what_is_not_told_is_neither_calm_nor_grave():
    cells = foreign()[0].modes["as_designed"].cells
    assert {colours.band_of(cell) for cell in cells} == {colours.UNTOLD}


def test_the_pages_palette_is_this_one():
    css = ROOT / "src/driftprobe/report/html/assets/page.css"
    if not css.is_file():
        pytest.skip("there is no report.html in this version")
    text = css.read_text(encoding="utf-8")
    for band in colours.LEGEND:
        assert f"--{band.name}: {band.colour}" in text, band


# ---- the reasoning


def test_the_reasoning_goes_from_gates_to_cause():
    judgement, traces = run(broken_from(1, "q_rope"))
    text = reasoning.render(judgement, traces)
    order = ["Verdict\n", "Gates\n  all open: ", "Evidence\n", "First failure\n  layer 1 q_rope", "Cause\n",
             "Reading of arms D and A\n", "Precision ladder\n", "Detection limit\n"]  # fmt: skip
    places = [text.find(part) for part in order]
    assert -1 not in places and places == sorted(places), text
    assert "H1  Every tap within its floor" in text


def test_the_reasoning_of_a_shut_gate_names_it():
    text = reasoning.render(*run(broken_from(None, "embed")))
    assert "shut for p0_short (as_designed): aligned: " in text and "First failure" not in text


def test_the_reasoning_has_a_known_cause_with_its_figures(clean_run, tmp_path):
    from driftprobe import probe

    result = probe("builtin:tiny", {"a": "Hello"}, mode="kv_aligned", ladder="off", fault="rope_plus_one")
    text = result.explain()
    assert "rope_position: used 6, expected 5" in text or "rope_position: expected 5, used 6" in text
    assert re.search(r"it explains (99|100)\.\d+% of the squared difference", text)
    assert text.isprintable() is False and all(line.isprintable() for line in text.splitlines())


def test_hostile_words_stay_on_their_line():
    judgement, traces = hostile()
    for line in reasoning.render(judgement, traces).splitlines():
        assert line.isprintable() and not line.startswith("::error")


# ---- the frame


@pytest.fixture
def result(tmp_path: Path) -> Result:
    write(tmp_path, prompt_trace("p0_short", "kv_aligned", broken_from(1, "q_rope")))
    return analyze(tmp_path)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_record_is_a_row_with_what_was_judged(result, library):
    pytest.importorskip(library)
    frame = result.to_frame(library)
    records = [record for trace in result.traces for record in trace.records]
    assert list(frame.columns) == list(COLUMNS) and len(frame) == len(records)
    rows = (
        frame.to_dicts() if library == "polars" else frame.astype(object).where(frame.notna(), None).to_dict("records")
    )
    for row, record in zip(rows, records, strict=True):
        assert (row["arm"], row["layer"], row["tensor"], row["hash"]) == (
            record.arm, record.layer, record.tensor, record.hash)  # fmt: skip
        assert (row["excess"] is not None) is (record.arm in {"D", "A"})
    (failing,) = [r for r in rows if (r["arm"], r["layer"], r["tensor"]) == ("D", 1, "q_rope")]
    assert failing["status"] == "fail" and failing["drift"] == pytest.approx(0.01, rel=0.1)
    assert failing["excess"] == pytest.approx(failing["drift"] / failing["floor"])


def test_numbers_that_no_column_holds_are_null(result):
    trace = result.traces[0]
    big = replace(trace.records[0], token_id=1 << 70)
    frame = to_frame(result.judgement, [Trace(trace.header, (big,), (), trace.path)], _installed())
    assert str(frame["token_id"][0]) in {"None", "<NA>"}


def _installed() -> str:
    from importlib.util import find_spec

    found = [name for name in LIBRARIES if find_spec(name)]
    if not found:
        pytest.skip("neither polars nor pandas is installed")
    return found[0]


def test_without_a_library_the_error_says_what_to_install(result, monkeypatch):
    monkeypatch.setattr("driftprobe.frames.find_spec", lambda name: None)
    for wanted, install in ((None, "pip install polars"), ("pandas", "pip install pandas")):
        with pytest.raises(UsageError) as caught:
            result.to_frame(wanted)
        assert_five_parts(caught.value, what="no library of data frames", where="to_frame", measured="not installed")
        assert caught.value.next_step == install
    with pytest.raises(UsageError, match="unknown library"):
        result.to_frame("duckdb")


def test_a_result_is_shown_in_one_line_and_as_its_map(result):
    assert repr(result).startswith("Result(MISMATCH, first at layer 1 q_rope; 1 trace in ")
    assert result._repr_html_() == inline.render(result.judgement)
    assert result.explain() == reasoning.render(result.judgement, result.traces)


def test_a_clean_result_has_no_first_failure_in_its_line(tmp_path):
    write(tmp_path, prompt_trace("p0_short", "kv_aligned", same))
    assert repr(analyze(tmp_path)).startswith("Result(NO_DRIFT; 1 trace in ")


# ---- the notebook


def test_the_notebook_runs(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("pandas")
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples/notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "kept without outputs: they would grow stale"
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert (
        len(shown) == 3 and "MISMATCH" in shown[0] and "layer 0 q_rope" in shown[0] and "STRUCTURAL_DRIFT" in shown[2]
    )
    assert any("rope_position" in output.get("text", "") for output in outputs)
    assert (tmp_path / "artifacts/notebook/verdict.json").is_file()
