"""report.html without a browser: whole, safe, small, rebuilt byte for byte, its figures those of the judgement."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from typing import Any

import pytest

from driftprobe.judgement import Status, Verdict
from driftprobe.report.html import page_data
from driftprobe.report.html.page import SCRIPTS, asset, inert
from driftprobe.report.html.pool import Words, short
from driftprobe.report.html.prints import Prints
from driftprobe.report.html.views import all_views, chosen, first_look
from html_pages import HOSTILE, cases, data_of, hostile_run, page_of, toy_run
from report_traces import broken_from, judged, run

LARGEST = 3_000_000
"""Bytes of a page that everybody can open."""


class Reader(HTMLParser):
    """What a browser would make of a page: its elements, and the text of those that hold some."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append((tag, ""))
        self.inside = True

    def handle_data(self, data: str) -> None:
        if self.inside:
            tag, text = self.texts[-1]
            self.texts[-1] = (tag, text + data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def words(page: str) -> str:
    """The page's text, tags and data left out."""
    body = page[page.index("<body>") : page.index('<script type="application/json"')]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


@pytest.fixture(scope="module", params=cases())
def page(request: pytest.FixtureRequest) -> str:
    return cases()[request.param]


def test_the_verdict_comes_first_in_plain_words() -> None:
    for name, verdict, lead, hypothesis in (
        ("fault", "MISMATCH", "A bug: prefill and decode differ by more than rounding can explain.", "H₁ holds"),
        ("rounding", "STRUCTURAL_DRIFT", "No bug found: prefill and decode differ, and rounding", "H₀ holds"),
        ("wrong token", "N/A", "It cannot be told whether prefill and decode agree.", "Neither H₀ nor H₁"),
    ):
        judgement, traces, payloads = toy_run(name)
        assert judgement.verdict.value == verdict
        text = words(page_of(judgement, traces, payloads))
        places = [text.index(part) for part in (verdict, lead, hypothesis, "Cause", "First failure", "Detection limit",
                                                "Impact", "Why", "The map")]  # fmt: skip
        assert places == sorted(places), name
        assert places[1] < 200


def test_a_shut_gate_and_a_first_failure_are_named() -> None:
    assert "Gates that are shut" in words(page_of(*toy_run("wrong token")))
    judgement, traces, payloads = toy_run("fault")
    text = words(page_of(judgement, traces, payloads))
    assert judgement.first_failure is not None
    assert "layer 1 q_rope of p0, step 0" in text
    assert "Gates that are shut" not in text


def test_it_is_one_file_that_asks_for_nothing(page: str) -> None:
    reader = Reader(page)
    for tag, attributes in reader.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "audio", "video"}, tag
        assert not {"src", "href", "srcset", "action", "style"} & attributes.keys() or attributes == {
            "class": "skip", "href": "#map-title"
        }  # fmt: skip
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in "".join(reader.text("style"))


def test_the_policy_names_exactly_the_scripts_and_the_style_that_are_there(page: str) -> None:
    reader = Reader(page)
    policy = next(a["content"] for t, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    scripts = [text for (tag, text), (_, attributes) in zip(reader.texts, reader.elements, strict=True)
               if tag == "script" and "type" not in attributes]  # fmt: skip
    expected = {f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
                for text in (*scripts, *reader.text("style"))}  # fmt: skip
    assert set(re.findall(r"'sha256-[^']+'", policy)) == expected
    assert len(scripts) == 2
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


def test_it_is_small(page: str) -> None:
    assert len(page.encode()) < 700_000


def test_it_is_rebuilt_byte_for_byte() -> None:
    judgement, traces, payloads = toy_run("fault")
    again, same, others = toy_run("fault")
    assert page_of(judgement, traces, payloads) == page_of(again, same, others)


def test_hostile_strings_are_text_and_nothing_else() -> None:
    page = page_of(*hostile_run())
    reader = Reader(page)
    assert [tag for tag, _ in reader.elements].count("script") == 3
    assert [tag for tag, _ in reader.elements].count("style") == 1
    assert "img" not in [tag for tag, _ in reader.elements]
    assert "49" not in words(page).split(), "a template in a name was run"
    data = page[page.index('id="data">') : page.index("</script>", page.index('id="data">'))]
    assert not set("<>&\u2028\u2029\u202e") & set(data.removeprefix('id="data">'))
    assert {view["prompt"] for view in data_of(page)["views"]} >= {HOSTILE[0], HOSTILE[1]}
    assert "\u202e" not in page and "\\u202e" in page


def test_a_page_stays_small_whatever_a_stranger_names_things() -> None:
    long = "n" * 100_000
    traces = tuple(
        replace(trace, records=tuple(replace(r, hash=f"{r.hash}{long}") for r in trace.records))
        for trace in run(broken_from(0, "q_rope"), prompts=(long,), run=long)[1]
    )
    assert len(page_of(judged(traces), traces).encode()) < 1_000_000


def test_json_cannot_end_its_element() -> None:
    assert json.loads(inert(json.dumps(list(HOSTILE)))) == list(HOSTILE)
    assert "<" not in inert(json.dumps(list(HOSTILE)))


def test_every_cell_is_in_the_data_with_its_figures() -> None:
    judgement, traces, payloads = toy_run("fault", steps=2)
    data = json.loads(page_data(judgement, traces, payloads))
    assert data["leftOut"] == [0, 0]
    seen = {}
    for view in data["views"]:
        columns = {key: data["columns"][view[key]] for key in ("layer", "tap", "drift", "floor", "status", "p", "d")}
        for layer, tap, drift, floor, status, p, d in zip(*columns.values(), strict=True):
            where = (view["arm"], view["step"], None if layer < 0 else layer, data["taps"][tap][0])
            seen[where] = (drift, floor, status, data["prints"][p][0], data["prints"][d][0])
    item = judgement.modes["kv_aligned"].prompts[0]
    expected = {
        (arm, c.step, c.layer, c.tensor): (
            short(c.drift.value), short(c.floor.value), "e" if c.drift.equal else c.status.value[0],
            c.reference.hash[2:], c.candidate.hash[2:],
        )
        for arm, cells in (("D", item.cells), ("A", item.aligned_cells)) for c in cells
    }  # fmt: skip
    assert seen == expected
    assert {entry[2] for entry in seen.values()} == {"e", "p", "f"}


def test_the_first_look_is_the_first_failure() -> None:
    judgement, traces, payloads = toy_run("fault", steps=2)
    data = json.loads(page_data(judgement, traces, payloads))
    view, cell = data["views"][data["start"][0]], data["start"][1]
    first = judgement.first_failure
    assert first is not None
    assert (data["columns"][view["layer"]][cell], data["taps"][data["columns"][view["tap"]][cell]][0]) == (
        first.layer, first.tensor
    )  # fmt: skip


def test_the_first_look_of_a_clean_run_is_its_largest_excess() -> None:
    judgement, *_ = toy_run("rounding")
    views = all_views(judgement)
    index, cell = first_look(views, judgement)
    largest = max(c.excess or 0 for v in views for c in v.cells if v.arm == "D")
    assert (views[index].arm, views[index].cells[cell].excess) == ("D", largest)


def test_a_shift_is_seen_in_the_rows() -> None:
    judgement, traces, payloads = toy_run("shift")
    data = json.loads(page_data(judgement, traces, payloads))
    view = next(v for v in data["views"] if v["arm"] == "D")
    rows = data["rows"][view["rows"]]
    assert [0, "k", [[0, 1, "0"], [1, 4, ">", -1]]] in rows
    assert all(v["rows"] is None for v in data["views"] if v["arm"] == "A")


def test_the_attention_of_a_failing_layer_is_there_where_its_tensors_are() -> None:
    judgement, traces, payloads = toy_run("fault")
    view = next(v for v in json.loads(page_data(judgement, traces, payloads))["views"] if v["arm"] == "D")
    assert view["attention"]["layer"] == 1
    assert view["attention"]["p"] != view["attention"]["d"]
    assert "attention" not in json.loads(page_data(*run()[:1], run()[1], toy_run("hidden")[2]))["views"][0]


def test_guilty_controls_are_no_band() -> None:
    judgement, traces, payloads = toy_run("rounding")
    view = json.loads(page_data(judgement, traces, payloads))["views"][0]
    assert view["guilty"] == []
    _, traces = run(lambda arm, layer, tap, array: array * 2 if arm == "E1" and tap != "embed" else array)
    data = json.loads(page_data(judged(traces), traces, payloads))
    assert data["views"][0]["guilty"] == ["E1"]
    assert set(data["columns"][data["views"][0]["high"]]) == {None}


def test_what_does_not_fit_is_left_out_and_said() -> None:
    judgement, *_ = toy_run("fault", steps=3)
    views = all_views(judgement)
    start, _ = first_look(views, judgement)
    kept = chosen(views, start, budget=1)
    assert kept == [views[start]]
    some = chosen(views, start, budget=sum(8 * 36 for _ in views[0].cells))
    assert all(view.failing for view in some) and views[start] in some


def test_the_gravest_fingerprints_are_kept_first() -> None:
    judgement, *_ = toy_run("fault")
    views = all_views(judgement)
    failing = [c for v in views for c in v.cells if c.status is Status.FAIL]
    needed = Prints(Words(), budget=10**9)
    needed.take([replace(views[0], cells=tuple(failing))])
    prints = Prints(Words(), budget=len(needed.json()))
    prints.take(views)
    assert prints.left_out > 0
    assert all(prints.number(record) >= 0 for c in failing for record in (c.reference, c.candidate))
    assert len(prints.json()) <= len(needed.json()) + 2


@pytest.mark.parametrize(("value", "expected"), [
    (None, None), (0.0, 0), (float("inf"), "inf"), (float("-inf"), "-inf"), (float("nan"), "nan"),
    (1.23456e-7, 1.23e-7), (42.0, 42), (-3.14159, -3.14),
])  # fmt: skip
def test_numbers_are_short_and_json(value: float | None, expected: Any) -> None:
    assert short(value) == expected
    json.dumps(short(value), allow_nan=False)


def test_a_run_of_32_layers_fits() -> None:
    """Every tensor of every arm its own, so that nothing is shared: two modes, two prompts."""
    taps = ("x_in", "attn_norm", "q_proj", "k_proj", "v_proj", "q_rope", "k_rope", "k_cache", "v_cache", "attn_scores",
            "attn_probs", "attn_ctx", "attn_out", "x_mid", "ffn_norm", "mlp_out", "x_out")  # fmt: skip
    from html_pages import CHANGES
    from make_trace import toy

    traces = tuple(toy(CHANGES["rounding"], arms=("E1",), layers=32, taps=taps, mode=mode, prompt=f"p{i}")[0]
                   for i, mode in enumerate(("as_designed", "kv_aligned")))  # fmt: skip
    page = page_of(judged(traces), traces)
    assert len(page.encode()) < LARGEST
    assert len(data_of(page)["views"]) == 3


def test_every_asset_is_text_of_this_package() -> None:
    for name in (*SCRIPTS, "page.css", "page.html.j2", "plot.min.js", "plot.LICENSES.txt"):
        assert asset(name)
    for name in (*SCRIPTS, "plot.min.js"):
        assert "</script" not in asset(name) and "<!--" not in asset(name)
        assert (
            not re.search(r"\beval\(|new Function\(|\binnerHTML|document\.write", asset(name)) or name == "plot.min.js"
        )


def test_verdicts_have_words() -> None:
    from driftprobe.report.html import story

    for table in (story._HEADLINES, story._HYPOTHESES, story._TONES):
        assert set(table) == set(Verdict)
