"""Words, numbers and Markdown tables. Every name that a trace brings in goes through `prose` or `code`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

NOT_TOLD = "not told"
"""Printed where a number cannot be given; the reason stands beside it."""
_PLAIN = re.compile(r"[\w .,:;=+/()'’×−…@%#–-]+")
"""What may stand in a code span of a table as it is: no backtick, pipe, angle bracket or line break."""
_MARKUP = re.compile(r"[\\`|*~\[\]]|(?<!\w)_|_(?!\w)")


def number(value: float | None) -> str:
    """Return a number with three significant digits; `nan`, `inf` and `-inf` in those words."""
    if value is None:
        return NOT_TOLD
    return f"{value:#.3g}" if value else "0"


def times(excess: float | None) -> str:
    """Return an excess as `×0.74`."""
    return NOT_TOLD if excess is None else f"×{number(excess)}"


def tidy(excess: float | None) -> str:
    """Return an excess for a narrow column: two digits below 1000, then powers of ten."""
    if excess is None or not math.isfinite(excess):
        return "?" if excess is None else number(excess)
    return f"{excess:.2g}" if excess < 1000 else f"{excess:.0e}".replace("e+0", "e").replace("e+", "e")


def count(amount: int, noun: str, plural: str = "") -> str:
    """Return `1 record`, `2 records`."""
    return f"{amount} {noun if amount == 1 else plural or noun + 's'}"


def truth(value: bool | None) -> str:
    """Return `True`, `False`, or that it cannot be told."""
    return NOT_TOLD if value is None else str(value)


def printable(text: str) -> str:
    """Return text on one line: line breaks, tabs and what no terminal shows become escapes, `\\n` and the like."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def prose(text: str) -> str:
    """Return text that Markdown and HTML take for plain words, on one line, safe in a table."""
    safe = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(lambda found: "\\" + found[0], safe)


def code(text: str) -> str:
    """Return text as a code span where that is safe, as escaped words otherwise."""
    return f"`{text}`" if _PLAIN.fullmatch(text) and text.strip() == text else prose(text)


def clip(text: str, width: int) -> str:
    """Return text of at most `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], aligned: str = "") -> str:
    """Return a Markdown table; its cells are taken as they are, so escape names first.

    `aligned` holds one letter a column: `l`, or `r` for numbers.
    """
    marks = ["--:" if mark == "r" else "---" for mark in (aligned or "l" * len(head)).ljust(len(head), "l")]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))


def bullets(items: Iterable[str]) -> str:
    """Return a Markdown list."""
    return "\n".join(f"- {item}" for item in items)


def blocks(parts: Iterable[str]) -> str:
    """Return paragraphs with a blank line between them; empty ones are left out."""
    return "\n\n".join(part for part in parts if part)


def listed(items: Sequence[str], shown: int) -> str:
    """Return the first items and how many more there are."""
    more = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {more} more" if more > 0 else "")
