"""The map inside a notebook: a verdict, its cause, and layers by taps as one small table of HTML.

Styles stand in the elements, because notebooks drop style sheets they do not trust; there is no script. Whatever a
trace brings in is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import takewhile

from driftprobe.judgement import Cell, Judgement, Verdict
from driftprobe.report import facts
from driftprobe.report.colours import LEGEND, MISSING, TONES, band_of
from driftprobe.report.text import clip, printable

MOST_ROWS = 40
"""Rows of layers; of a deeper model several layers share a row, which shows the gravest."""
MOST_TAPS = 48
NAME = 60
"""Characters of a name that are shown."""
_BOX = "width:1.1em;height:1.1em;padding:0;border:1px solid rgba(128,128,128,.35)"
_TONE = {Verdict.MISMATCH: TONES["grave"], Verdict.NOT_AVAILABLE: TONES["open"]}


def render(judgement: Judgement) -> str:
    """Return the HTML of a judgement: one `div`, at every depth small enough to be kept in a notebook."""
    tone = _TONE.get(judgement.verdict, TONES["calm"])
    said = f'<b style="color:{tone}">{_safe(judgement.verdict.value)}</b> {_safe(facts.reason(judgement))}'
    parts = [
        f'<p style="margin:0 0 .3em">{said}</p>',
        *_cause(judgement),
        *_map([cell for item in facts.all_prompts(judgement) for cell in item.decided_by.cells]),
        f'<p style="margin:.3em 0 0;font-size:85%">{_safe(facts.limits_words(judgement))}</p>',
    ]
    return f'<div class="driftprobe" style="font-family:sans-serif">{"".join(parts)}</div>'


def _safe(text: str, width: int = 600) -> str:
    return escape(clip(printable(text), width), quote=True)


def _cause(judgement: Judgement) -> Iterable[str]:
    first = judgement.first_failure
    if first is not None:
        yield (
            f'<p style="margin:0 0 .3em"><b>First failure</b> {_safe(facts.where(first))}<br>'
            f"<b>Cause</b> {_safe(first.root_cause)}</p>"
        )


_Place = tuple[int | None, str]


def _map(cells: Sequence[Cell]) -> Iterable[str]:
    """Yield the table, the gravest of all prompts, modes and steps in each place, and its legend."""
    if not cells:
        return
    ordered = facts.sort_cells(cells)
    worst: dict[_Place, Cell] = {}
    for cell in ordered:
        where = (cell.layer, cell.tensor)
        worst[where] = max(worst.get(where, cell), cell, key=_gravity)
    inside = list(dict.fromkeys(cell.tensor for cell in ordered if cell.layer is not None))
    before = dict.fromkeys(cell.tensor for cell in takewhile(lambda cell: cell.layer is None, ordered))
    outside = [tensor for layer, tensor in worst if layer is None]
    layers = sorted({layer for layer, _ in worst if layer is not None})
    rows = [_alone(tensor, worst[None, tensor], len(inside)) for tensor in outside if tensor in before]
    rows += [_row(group, inside[:MOST_TAPS], worst) for group in _groups(layers)]
    rows += [_alone(tensor, worst[None, tensor], len(inside)) for tensor in outside if tensor not in before]
    head = "".join(f'<th style="{_TURNED}">{_safe(tap, NAME)}</th>' for tap in inside[:MOST_TAPS])
    yield (
        '<table style="border-collapse:collapse;font-size:80%;width:auto"><caption style="text-align:left">'
        "drift in multiples of its floor, the gravest of every prompt, mode and step</caption>"
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{_legend()}"
    )
    if len(inside) > MOST_TAPS:
        yield f"<p>{len(inside) - MOST_TAPS} more taps are not shown.</p>"


_TURNED = "writing-mode:vertical-rl;transform:rotate(180deg);font-weight:normal;padding:2px;text-align:left"


def _gravity(cell: Cell) -> tuple[int, float]:
    band = band_of(cell)
    return LEGEND.index(band), cell.excess or 0.0


def _groups(layers: Sequence[int]) -> list[Sequence[int]]:
    size = -(-len(layers) // MOST_ROWS) or 1
    return [layers[i : i + size] for i in range(0, len(layers), size)]


def _row(group: Sequence[int], taps: Sequence[str], worst: dict[_Place, Cell]) -> str:
    name = f"layer {group[0]}" if len(group) == 1 else f"layers {group[0]}–{group[-1]}"
    boxes = []
    for tap in taps:
        here = [worst[layer, tap] for layer in group if (layer, tap) in worst]
        boxes.append(_box(max(here, key=_gravity)) if here else f'<td style="{_BOX};background:{MISSING}"></td>')
    return f"<tr>{_label(name)}{''.join(boxes)}</tr>"


def _alone(tensor: str, cell: Cell, width: int) -> str:
    rest = f'<td colspan="{width - 1}"></td>' if width > 1 else ""
    return f"<tr>{_label(tensor)}{_box(cell)}{rest}</tr>"


def _label(name: str) -> str:
    return f'<th style="text-align:right;font-weight:normal;padding:0 .5em;white-space:nowrap">{_safe(name, NAME)}</th>'


def _box(cell: Cell) -> str:
    words = _safe(f"{facts.where(cell)}: {facts.drift_words(cell)}", 200)
    return f'<td title="{words}" style="{_BOX};background:{band_of(cell).colour}"></td>'


def _legend() -> str:
    steps = "".join(
        f'<span style="background:{band.colour};color:{band.ink};padding:0 .5em">{_safe(band.says)}</span>'
        for band in LEGEND
    )
    return f'<p style="margin:.3em 0 0;font-size:80%">{steps} <span style="background:{MISSING}">&emsp;</span> none</p>'
