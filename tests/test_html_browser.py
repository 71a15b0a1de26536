"""report.html in a real Chromium: silent, asking for nothing, worked by pointer and keyboard, safe from a stranger."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from driftprobe.judgement import Status
from html_pages import HOSTILE, cases, hostile_run, page_of, toy_run
from report_traces import rounding, run
from test_report_sharper import under_the_limit

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")
SHIFTS = """
new Promise((done) => {
  let sum = 0;
  new PerformanceObserver((list) => list.getEntries().forEach((e) => { if (!e.hadRecentInput) sum += e.value; }))
    .observe({ type: "layout-shift", buffered: true });
  setTimeout(() => done(sum), 60);
})
"""

BREAK_OUT = """async () => {
  const tried = {}, far = "https://example.org/x.png";
  const attempt = async (name, what) => {
    try { await what(); tried[name] = "done"; } catch { tried[name] = "refused"; }
  };
  const script = document.createElement("script"), style = document.createElement("style");
  await attempt("markup", () => { document.body.innerHTML = "<p>x</p>"; });
  await attempt("script", () => { script.text = "window.hit=1"; document.body.append(script); });
  await attempt("handler", () => { document.body.setAttribute("onclick", "window.hit=2"); document.body.click(); });
  await attempt("request", () => fetch(far));
  await attempt("image", () => new Promise((ok, no) => {
    const image = new Image();
    [image.onload, image.onerror, image.src] = [ok, no, far];
  }));
  style.textContent = "body { display: none }";
  document.head.append(style);
  tried.style = getComputedStyle(document.body).display;
  return { ...tried, hit: window.hit ?? null };
}"""
"""What markup from a trace would try, had it got past the escaping."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        found = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Tab:
    """A page with what it said and asked for."""

    def __init__(self, browser: Any, file: Path, **more: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | more))
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.url = file.resolve().as_uri()
        self.page.goto(self.url)
        self.page.wait_for_selector("html[data-ready]")

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def quiet(self) -> None:
        assert self.said == []
        assert self.asked == [self.url]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    tabs = []

    def open_page(text: str, **more: Any) -> Tab:
        file = tmp_path / "report.html"
        file.write_text(text, encoding="utf-8", newline="\n")
        tabs.append(Tab(browser, file, **more))
        return tabs[-1]

    yield open_page
    for tab in tabs:
        tab.context.close()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", cases())
def test_a_page_is_silent_asks_for_nothing_and_fits(opened: Any, name: str, width: int) -> None:
    scheme = "dark" if width == 400 else "light"
    tab = opened(cases()[name], viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.quiet()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.page.evaluate(SHIFTS) < 0.02
    assert tab.page.locator("#map g.cells rect").count() > 0
    assert tab.page.locator("h1").is_visible()


def test_dark_and_light_differ_and_print_is_light(opened: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    tab = opened(cases()["fault"], color_scheme="dark")
    dark = tab.page.evaluate(background)
    tab.page.emulate_media(color_scheme="light")
    assert tab.page.evaluate(background) != dark
    tab.page.emulate_media(media="print", color_scheme="dark")
    assert tab.page.evaluate(background) == "rgb(255, 255, 255)"
    assert len(tab.page.pdf(format="A4")) > 20_000
    tab.quiet()


def test_a_click_opens_the_record_of_that_cell(opened: Any) -> None:
    judgement, traces, payloads = toy_run("fault")
    tab = opened(page_of(judgement, traces, payloads))
    assert "layer 1 q_rope" in tab.text("#record h3"), "the first failure is what is seen first"
    tab.page.locator('#map rect[aria-label^="layer 0 attn_ctx:"]').click()
    assert tab.text("#record h3") == "layer 0 attn_ctx"
    cell = next(c for c in judgement.modes["kv_aligned"].prompts[0].cells if (c.layer, c.tensor) == (0, "attn_ctx"))
    record = tab.text("#record")
    for part in (
        cell.reference.hash,
        cell.candidate.hash,
        f"set by {cell.floor.source}",
        "ulp",
        "head ",
        "within the floor",
    ):
        assert part in record, part
    assert cell.status is Status.PASS
    tab.quiet()


def test_the_keyboard_reaches_every_cell(opened: Any) -> None:
    tab = opened(cases()["fault"])
    page = tab.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('#map rect')"):
            break
    label = "document.activeElement.getAttribute('aria-label').split(':')[0]"
    assert page.evaluate(label) == "layer 1 q_rope"
    for key, expected in (("ArrowUp", "layer 0 q_rope"), ("ArrowUp", "embed"), ("ArrowDown", "layer 0 q_rope"),
                          ("ArrowRight", "layer 0 k_rope"), ("Home", "layer 0 x_in")):  # fmt: skip
        page.keyboard.press(key)
        assert page.evaluate(label) == expected
    assert tab.text("#record h3") == "layer 1 q_rope", "arrows alone open nothing"
    page.keyboard.press("Enter")
    assert tab.text("#record h3") == "layer 0 x_in"
    assert page.evaluate(label) == "layer 0 x_in", "the cell keeps the focus"
    tab.quiet()


def test_the_selectors_change_the_pictures(opened: Any) -> None:
    tab = opened(cases()["steps"])
    assert "taps beyond rounding" in tab.text("#choice-say")
    tab.page.select_option("#choose-step", "2")
    assert tab.text('.prints tr:has-text("token id")').split()[-1] == "9", "the record is that of the step"
    hashes = tab.text("#record table")
    tab.page.select_option("#choose-arm", "A")
    assert tab.page.input_value("#choose-step") == "2", "what was chosen before stays"
    assert tab.text("#record table") != hashes
    assert "aligned" in tab.text("#record table")
    tab.page.select_option("#depth-tap", "q_rope")
    assert "of 2 taps" in tab.text("#depth-say")
    tab.quiet()


def test_cells_have_the_colour_of_their_excess_and_missing_ones_are_hatched(opened: Any) -> None:
    tab = opened(cases()["missing"])
    fills = tab.page.eval_on_selector_all("#map g.missing rect", "all => all.map(r => getComputedStyle(r).fill)")
    assert fills == ['url("#hatch")']
    assert tab.page.locator('#map rect[aria-label^="layer 1 attn_out"]').count() == 0
    tab = opened(cases()["fault"])
    fill = "rect => rect.getAttribute('fill')"
    get = lambda label: tab.page.eval_on_selector(f'#map rect[aria-label^="{label}:"]', fill)  # noqa: E731
    assert get("embed") == "var(--e)"
    assert get("layer 0 attn_ctx").startswith("var(--b")
    assert get("layer 1 q_rope").startswith("var(--f")


def test_a_shift_is_a_line_beside_the_diagonal(opened: Any) -> None:
    tab = opened(cases()["shift"])
    assert "hold the row 1 before" in tab.text("#rows-say")
    assert "row 0 empty" in tab.text("#rows-say")
    ends = {
        stroke: [float(n) for n in re.findall(r"-?[\d.]+", path)]
        for stroke, path in tab.page.eval_on_selector_all(
            "#diagonal svg path", "all => all.map(p => [getComputedStyle(p).stroke && p.getAttribute('stroke')"
            " || p.parentElement.getAttribute('stroke'), p.getAttribute('d')])"
        )
    }  # fmt: skip
    (x1, y1, x2, y2), (left, low, *_) = ends["var(--row-own-line)"], ends["var(--row-moved-line)"]
    on_the_diagonal = y1 + (left - x1) * (y2 - y1) / (x2 - x1)
    assert low > on_the_diagonal + 20, "one row lower than the diagonal, which is further down the screen"
    tab.quiet()


def test_hostile_strings_do_nothing(opened: Any) -> None:
    tab = opened(page_of(*hostile_run()))
    options = tab.page.eval_on_selector_all("#choose-prompt option", "all => all.map(o => o.textContent)")
    assert HOSTILE[0] in options and HOSTILE[1] in options
    for option in range(len(options)):
        tab.page.select_option("#choose-prompt", index=option)
        for rect in tab.page.locator("#map g.cells rect").all()[::5]:
            rect.dispatch_event("click")
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("window.hit") is None
    assert tab.page.evaluate("document.images.length + document.querySelectorAll('iframe, link, object').length") == 0
    assert tab.page.evaluate("document.scripts.length") == 3
    tab.quiet()


def test_the_policy_stops_what_escaping_would_have_missed(opened: Any) -> None:
    """Markup, scripts, styles and requests from within: the browser refuses each."""
    tab = opened(cases()["clean"])
    refused = tab.page.evaluate(BREAK_OUT)
    assert refused == {"markup": "refused", "script": "refused", "request": "refused", "image": "refused",
                       "handler": "refused", "style": "block", "hit": None}  # fmt: skip


def test_a_cell_that_fails_under_its_limit_is_not_called_beyond_it(opened: Any) -> None:
    judgement, trace, arrays = under_the_limit()
    tab = opened(page_of(judgement, (trace,), arrays))
    assert tab.text("#record .tag") == "under the limit, yet no rounding"
    assert "a rotation keeps distances, and what its input's difference" in tab.text("#record dl")
    assert "One cell fails under the limit" in tab.text("#sharper")
    assert "All 37 taps stay under the limit, 1 of them no rounding all the same" in tab.text("#depth-say")
    label = tab.page.get_attribute('#map rect[aria-label^="layer 0 q_rope"]', "aria-label")
    assert label.startswith("layer 0 q_rope: under the limit, yet no rounding")
    tab.page.locator('#map rect[aria-label^="layer 0 q_proj:"]').click()
    assert tab.text("#record .tag") == "within the floor"
    tab.quiet()
    assert not opened(cases()["fault"]).page.locator("#sharper").is_visible()


def test_nothing_crosses_the_words_of_the_ladder_and_of_the_arms(opened: Any) -> None:
    """A legend stands above the ladder, and the upward axis of the arms is named above its frame."""
    judgement, traces = run(rounding)
    tab = opened(page_of(judgement, traces), viewport={"width": 400, "height": 900})
    assert not tab.page.locator("#ladder-legend").is_visible(), "no ladder, no legend"
    edges = "all => all.filter(e => e.tagName === 'line' || /put in/.test(e.textContent)).map(e => "
    words = tab.page.eval_on_selector_all("#arms text", edges + "e.getBoundingClientRect().bottom)")
    rules = tab.page.eval_on_selector_all("#arms [aria-label$=rule] line", edges + "e.getBoundingClientRect().top)")
    assert len(words) == 1 and rules
    assert words[0] <= min(rules)
    tab.quiet()


def test_without_scripts_the_words_are_there(opened: Any, browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(cases()["fault"], encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    assert "A bug:" in page.inner_text("h1")
    assert "The pictures are drawn by scripts" in page.inner_text("noscript")
    context.close()
