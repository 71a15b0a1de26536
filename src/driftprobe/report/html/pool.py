"""Numbers and columns for the page's data: short, encoded once, and counted, so that a page's size is known.

Two modes of a run hold the same numbers more often than not; a column that stands in the pool already costs nothing.
"""

from __future__ import annotations

import json
import math
from typing import Any

from driftprobe.report.text import clip, printable

NAME = 160
"""Characters of a name that the page shows."""


def name(text: str) -> str:
    """Return a name from a trace on one line, without what no screen shows, of bearable length."""
    return clip(printable(text), NAME)


def short(value: float | None, digits: int = 3) -> float | int | str | None:
    """Return a number of few significant digits for JSON; `inf`, `-inf` and `nan` in those words, None as it is."""
    if value is None:
        return None
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e6 else rounded


def encode(value: Any) -> str:
    """Return compact JSON in ASCII, keys as they come."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


class Pool:
    """Columns by number, each kept once."""

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.size = 0
        """Bytes of all columns."""
        self._known: dict[str, int] = {}

    def add(self, column: Any) -> int:
        """Return the number of a column, which is added where it is new."""
        text = encode(column)
        if text not in self._known:
            self._known[text] = len(self.encoded)
            self.encoded.append(text)
            self.size += len(text) + 1
        return self._known[text]

    def json(self) -> str:
        """Return all columns as one JSON array."""
        return "[" + ",".join(self.encoded) + "]"


class Words:
    """Strings by number, each kept once."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def add(self, word: str) -> int:
        """Return the number of a name from a trace, made fit to be shown."""
        return self._known.setdefault(name(word), len(self._known))

    def listed(self) -> list[str]:
        """Return the strings in the order of their numbers."""
        return list(self._known)
