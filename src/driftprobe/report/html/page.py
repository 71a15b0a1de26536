"""The page itself: one HTML file from the words, the data, a style sheet and scripts, under a strict content policy.

The policy allows the page's own scripts and style by their hashes and nothing else: no request, no frame, no form, no
inline handler. Assets are part of this package; every string of a trace is escaped by the template, or stands in JSON
in which no `<` is left.
"""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files

from jinja2 import DictLoader, Environment, StrictUndefined, Template
from markupsafe import Markup

from driftprobe.floor import LIMIT
from driftprobe.report.html.story import Story

SCRIPTS = ("base.js", "map.js", "record.js", "charts.js", "rows.js", "close.js", "main.js")
"""The page's own scripts, in the order in which they are joined."""


def fill(story: Story, data: str) -> str:
    """Return the page. `data` is JSON."""
    style, library, script = asset("page.css"), asset("plot.min.js"), own_script()
    return _template().render(
        story=story,
        limit=f"{LIMIT:g}",
        policy=content_policy((library, script), style),
        style=Markup(style),
        library=Markup(library),
        script=Markup(script),
        data=Markup(inert(data)),
    )


def content_policy(scripts: tuple[str, ...], style: str) -> str:
    """Return the Content-Security-Policy that lets these texts work and nothing else."""
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'"
    )


def inert(json: str) -> str:
    """Return JSON that cannot end the script element it stands in: `<`, `>` and `&` as escapes."""
    return json.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def asset(name: str) -> str:
    """Return the text of a file that is part of this package."""
    return files("driftprobe.report.html").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def own_script() -> str:
    """Return the page's own scripts as one, which shares nothing with the page."""
    return '"use strict";(() => {\n' + "\n".join(map(asset, SCRIPTS)) + "\n})();\n"


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


@cache
def _template() -> Template:
    loader = DictLoader({"page.html": asset("page.html.j2")})
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")
