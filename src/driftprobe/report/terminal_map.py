"""The map for a terminal: layers down, taps across, one character a cell, no wider and no longer than a screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from string import ascii_letters

from driftprobe.judgement import Cell, Judgement, Status
from driftprobe.report.facts import all_prompts, sort_cells
from driftprobe.report.text import clip, printable

EQUAL, WITHIN, UNTOLD, BEYOND = "·o?#"
LEGEND = f"{EQUAL} equal   {WITHIN} rounding   {BEYOND} more than rounding   {UNTOLD} not told   blank: not recorded"
MOST_LINES = 24
"""Lines of layers; a deeper model has several layers a line, the gravest of which is shown."""
NAME = 24
"""Characters of a tap's name in the key."""


@dataclass(frozen=True, slots=True)
class TerminalMap:
    """The lines of a map, those of layers and of taps outside the layers alike."""

    head: str
    """A letter for each column."""
    lines: tuple[tuple[str, str], ...]
    """A label and one character a cell."""
    key: tuple[str, ...]
    """The letters and the taps that they stand for, wrapped to the width."""
    cut: int
    """Taps for which there was no room."""


def terminal_map(judgement: Judgement, width: int) -> TerminalMap | None:
    """Return the gravest cell of every prompt, mode and step at each layer and tap; None where nothing was compared.

    `width` is in characters. Where the precision ladder decided, its cells are the ones that count.
    """
    cells = [cell for item in all_prompts(judgement) for cell in sort_cells(item.decided_by.cells)]
    if not cells:
        return None
    worst: dict[tuple[int | None, str], str] = {}
    for cell in cells:
        where, mark = (cell.layer, cell.tensor), _mark(cell)
        worst[where] = max(worst.get(where, " "), mark, key=_GRAVITY.index)
    inside = list(dict.fromkeys(cell.tensor for cell in cells if cell.layer is not None))
    layers = sorted({layer for layer, _ in worst if layer is not None})
    outside = {_name(tap): mark for (layer, tap), mark in worst.items() if layer is None}
    before = {_name(cell.tensor) for cell in takewhile(lambda cell: cell.layer is None, cells)}
    groups = _groups(layers)
    label = max([len(name) for name in (*map(_span, groups), *outside)], default=0)
    taps = inside[: max(1, min(len(ascii_letters), width - label - 4))]
    rows = [
        (_span(group), "".join(max((worst.get((n, tap), " ") for n in group), key=_GRAVITY.index) for tap in taps))
        for group in groups
    ]
    rows = [*(row for row in outside.items() if row[0] in before), *rows,
            *(row for row in outside.items() if row[0] not in before)]  # fmt: skip
    letters = ascii_letters[: len(taps)]
    return TerminalMap(
        " " * (label + 2) + letters,
        tuple((name.rjust(label), marks) for name, marks in rows),
        _key(letters, taps, width),
        len(inside) - len(taps),
    )


_GRAVITY = (" ", EQUAL, WITHIN, UNTOLD, BEYOND)


def _mark(cell: Cell) -> str:
    if cell.drift.equal:
        return EQUAL
    return {Status.PASS: WITHIN, Status.UNKNOWN: UNTOLD, Status.FAIL: BEYOND}[cell.status]


def _name(tap: str) -> str:
    return clip(printable(tap), NAME)


def _groups(layers: Sequence[int]) -> list[Sequence[int]]:
    size = max(1, math.ceil(len(layers) / MOST_LINES))
    return [layers[i : i + size] for i in range(0, len(layers), size)]


def _span(group: Sequence[int]) -> str:
    return str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}"


def _key(letters: str, taps: Sequence[str], width: int) -> tuple[str, ...]:
    lines: list[str] = []
    for letter, tap in zip(letters, taps, strict=True):
        word = f"{letter} {_name(tap)}"
        if lines and len(lines[-1]) + 2 + len(word) <= width - 4:
            lines[-1] += f"  {word}"
        else:
            lines.append(word)
    return tuple(lines)
