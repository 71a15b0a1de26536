"""The bands of a map: how far a tap is beyond, or within, what arithmetic explains, and the colour of each.

Calm blues below the floor's limit, oranges and reds above it: told apart by people who do not see red and green as
different, and in print by their lightness. What is not told is violet, what was not recorded is hatched, never green.
"""

from __future__ import annotations

from dataclasses import dataclass

from driftprobe.floor import LIMIT
from driftprobe.judgement import Cell, Status


@dataclass(frozen=True, slots=True)
class Band:
    """One step of the legend."""

    name: str
    says: str
    """Multiples of the floor, in words."""
    colour: str
    ink: str
    """What is readable on it."""


_DARK, _LIGHT = "#1c2126", "#fff6ea"
EQUAL = Band("e", "equal", "#e9edf1", _DARK)
UNTOLD = Band("u", "not told", "#d9d3e8", _DARK)
WITHIN = (
    (0.1, Band("b0", "< 0.1", "#d8e5f1", _DARK)),
    (0.3, Band("b1", "< 0.3", "#b9d2e9", _DARK)),
    (1.0, Band("b2", "< 1", "#94bbdf", _DARK)),
    (float("inf"), Band("b3", f"≤ {LIMIT:g}", "#3f7fbd", _LIGHT)),
)
"""Bands below the limit, each with the excess that it ends before."""
BEYOND = (
    (1e12, Band("f5", "> 10¹²", "#6a1208", _LIGHT)),
    (1e6, Band("f4", "> 10⁶", "#981f08", _LIGHT)),
    (1e3, Band("f3", "> 10³", "#c2400c", _LIGHT)),
    (10.0, Band("f2", "> 10", "#df6714", _LIGHT)),
    (0.0, Band("f1", f"> {LIMIT:g}", "#f0a03c", _DARK)),
)
"""Bands beyond it, each with the excess that it begins behind."""
LEGEND = (EQUAL, *(band for _, band in WITHIN), *(band for _, band in reversed(BEYOND)), UNTOLD)
MISSING = "repeating-linear-gradient(45deg,#c4cad1 0 1px,transparent 1px 4px)"
"""Where nothing was recorded."""
TONES = {"calm": "#1f6f8b", "grave": "#b5390b", "open": "#6a51a3"}
"""A verdict's own colour: a pass, a mismatch, N/A."""


def band_of(cell: Cell) -> Band:
    """Return the band of a cell: by its status first, then by its excess."""
    excess = cell.excess
    if cell.drift.equal:
        return EQUAL
    if cell.status is Status.UNKNOWN or excess is None:
        return UNTOLD
    if cell.status is Status.FAIL:
        return next((band for above, band in BEYOND if excess > above), BEYOND[-1][1])
    return next((band for below, band in WITHIN if excess < below), WITHIN[-1][1])
