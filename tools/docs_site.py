"""What MkDocs does not do by itself for the docs site (`make docs`, mkdocs.yml).

The README is the site's first page. A link out of docs/ leads to a copy of that file in the site, so that no link needs
the network. Fences named `math` hold LaTeX, as on code hosts, and become MathML, which browsers draw by themselves.
Decisions, and pages that no list of mkdocs.yml names, join the navigation.
"""

from __future__ import annotations

import os
import posixpath
import re
from html import escape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "source"
"""Folder of the site in which files from outside docs/ lie."""
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^(```.*?^```[^\S\n]*$)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Teach the fences LaTeX, and complete the navigation."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": as_mathml}]
    docs = Path(config.docs_dir)
    listed = set(_pages(config.nav))
    more = [page.name for page in sorted(docs.glob("*.md")) if page.name not in listed]
    decisions = [f"decisions/{page.name}" for page in sorted(docs.glob("decisions/*.md"))]
    added: list[Any] = [*config.nav, *([{"More": more}] if more else []), {"Decisions": decisions}]
    config.nav = added
    return config


def _pages(nav: Any) -> list[str]:
    """Return every page that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav or ()) for page in _pages(item)]


def as_mathml(source: str, language: str, css_class: str, options: Any, md: Any, **rest: Any) -> str:
    """Return a fence of LaTeX as MathML, a formula a line; lines that go on are indented."""
    formulas = re.sub(r"\n\s+", " ", source.strip()).splitlines()
    drawn = "".join(convert(formula, display="block") for formula in formulas)
    return f'<div class="{css_class}" role="group" aria-label="{escape(source, quote=True)}">{drawn}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the first page, and every file outside docs/ that a page links to."""
    first = File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md"))
    files.append(first)
    for page in [*files.documentation_pages()]:
        text = Path(page.abs_src_path or "").read_text(encoding="utf-8")
        for target in _targets(text, _own_place(page.src_uri)):
            uri = _place_in_site(target)
            if files.get_file_from_path(uri) is None and (ROOT / target).is_file():
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let each link of a page lead to where its target lies in the site."""
    here, shown = _own_place(page.file.src_uri), page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        target = _place_in_site(posixpath.normpath(posixpath.join(posixpath.dirname(here), link[2])))
        return f"{link[1]}{posixpath.relpath(target, posixpath.dirname(shown) or os.curdir)}{link[3]}"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)


def _own_place(uri: str) -> str:
    """Return where a page of the site lies in the repository."""
    return (
        "README.md"
        if uri == "index.md"
        else uri.removeprefix(f"{SOURCE}/")
        if uri.startswith(SOURCE)
        else f"docs/{uri}"
    )


def _place_in_site(path: str) -> str:
    """Return where a file of the repository lies in the site."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{SOURCE}/{path}"


def _targets(text: str, here: str) -> list[str]:
    """Return the files outside docs/ that a page links to, from the repository's root."""
    links = [link[2] for part in _FENCE.split(text) if not part.startswith("```") for link in _LINK.finditer(part)]
    found = (posixpath.normpath(posixpath.join(posixpath.dirname(here), link)) for link in links)
    return [path for path in found if not path.startswith("docs/") and path != "README.md"]
