"""The docs site builds with every link and anchor whole, asks nothing of the network, and shows its mathematics."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(
    find_spec("mkdocs") is None or find_spec("latex2mathml") is None, reason="mkdocs is not installed: `make docs`"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src",
           "embed": "src", "object": "data", "link": "href"}  # fmt: skip
"""Element -> the attribute that a browser follows by itself."""


def build(folder: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=root,
        capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder  # without --quiet, which would keep warnings from being counted


class Fetches(HTMLParser):
    """Collects what a browser would fetch for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        known = dict(attributes)
        target = known.get(FETCHED.get(tag, ""))
        if target and known.get("rel") not in {"canonical", "next", "prev"}:
            self.found.append(target)
        self.found += re.findall(r"url\(([^)]*)\)", known.get("style") or "")


def fetched(page: str) -> list[str]:
    parser = Fetches()
    parser.feed(page)
    return parser.found


def pages(site: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(site.rglob("*.html")):
        yield path.relative_to(site).as_posix(), path.read_text(encoding="utf-8")


def test_every_page_of_the_docs_is_a_page_of_the_site(site: Path) -> None:
    wanted = {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in DOCS.rglob("*.md")}
    first = (site / "index.html").read_text(encoding="utf-8")
    assert wanted and all((site / page).is_file() for page in wanted)
    assert all(f'href="{page}"' in first for page in wanted), "not in the navigation"


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    for name, page in pages(site):
        for target in fetched(page):
            assert not re.match(r"(https?:)?//", target), f"{name}: {target}"
        assert "mermaid" not in page, f"{name}: that script would be fetched"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(url\(|@import\s+)[\"']?(https?:)?//", text), sheet.name


def test_what_is_fetched_is_seen() -> None:
    assert fetched('<link href="https://x/y.css"><script src=//z></script>') == ["https://x/y.css", "//z"]


def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    for name, page in pages(site):
        if name == "404.html":
            continue
        for target in re.findall(r'<a [^>]*href="([^"#]+)', page):
            if not re.match(r"[a-z]+:", target):
                assert ((site / name).parent / target).exists(), f"{name}: {target}"


def test_mathematics_is_markup_and_no_source(site: Path) -> None:
    page = (site / "mathematics.html").read_text(encoding="utf-8")
    source = (DOCS / "mathematics.md").read_text(encoding="utf-8")
    drawn = re.findall(r"<math\b.*?</math>", page, flags=re.DOTALL)
    assert len(drawn) == source.count("```math") > 20
    assert not any("\\" in formula for formula in drawn), "a command that was not understood"


@pytest.mark.parametrize("link", ["faults.md#no-such-heading", "no-such-page.md", "../no/such/file.c"])
def test_a_broken_link_breaks_the_build(link: str, tmp_path: Path) -> None:
    for name in ("examples", "include", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("node_modules"))
    for name in ("README.md", "CHANGELOG.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    with (tmp_path / "docs/faults.md").open("a", encoding="utf-8") as page:
        page.write(f"\n[nowhere]({link})\n")
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode != 0 and link.removeprefix("../") in done.stdout + done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")
def test_it_opens_from_the_disk_and_is_searched_without_a_network(site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
    asked: list[str] = []
    said: list[str] = []
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(120_000)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        for name in ("index.html", "mathematics.html", "decisions/0005-matched-filters.html"):
            tab.goto((site / name).as_uri())
        assert tab.evaluate("document.fonts.size") == 0
        tab.goto((site / "index.html").as_uri())
        tab.click("input.md-search__input")
        tab.type("input.md-search__input", "roundoff")
        tab.wait_for_selector(".md-search-result__link[href*=matched-filters]", state="attached")
        tab.set_viewport_size({"width": 400, "height": 800})
        for name in ("index.html", "mathematics.html", "troubleshooting.html", "how-it-decides.html"):
            tab.goto((site / name).as_uri())
            wide = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{name} is {wide} pixels wider than a telephone"
        browser.close()
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked
    assert not said
