"""Numbers in JSON documents: those that are not finite are written as the words `nan`, `inf` and `-inf`."""

from __future__ import annotations

import math
from typing import Any

WORDS = ("nan", "inf", "-inf")


def finite(value: Any) -> Any:
    """Return a JSON value with every number that is not finite as the word for it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def number(value: float | str | None) -> float | None:
    """Return the number that was written. Raises ValueError for a text that is none of the three words."""
    if isinstance(value, str) and value not in WORDS:
        raise ValueError(f"{value[:40]!r} is no number")
    return None if value is None else float(value)
