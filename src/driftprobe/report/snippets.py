"""Evidence snippets: single records as JSON, at most 25 words each."""

from __future__ import annotations

import json
from collections.abc import Sequence

from driftprobe.floor import repeated
from driftprobe.judgement import Cell, Judgement
from driftprobe.report.facts import PROJECTIONS, main_mode, sort_cells
from driftprobe.trace import Record, Trace

MAX_WORDS = 25
"""Words, as `str.split` counts them, of the longest snippet: the seed report's own limit."""

Fields = dict[str, str | int | None]


def snippets(judgement: Judgement, traces: Sequence[Trace]) -> tuple[str, ...]:
    """Return the first failure's two records, or else the projections of the first prompt, as JSON."""
    return tuple(shorten(_fields(record)) for record in _failed(judgement, traces) or _projections(judgement))


def about(judgement: Judgement, traces: Sequence[Trace]) -> str:
    """Say what the snippets show."""
    if _failed(judgement, traces):
        return "The two records of the first failure: the one compared with, then the one that differs from it."
    if _projections(judgement):
        return "The first projections of the first prompt: of each tensor prefill's record, then decode's."
    return "No pair of records was compared, so there is none to cite."


def shorten(fields: Fields) -> str:
    """Return a JSON object of at most MAX_WORDS words: on one line, then with clipped names, where it is too long."""
    text = json.dumps(fields, indent=2)
    if len(text.split()) > MAX_WORDS:
        text = json.dumps(fields, separators=(",", ":"))
    room = MAX_WORDS
    while len(text.split()) > MAX_WORDS and room > 1:
        room -= 1
        text = json.dumps({name: _clip(value, room) for name, value in fields.items()}, separators=(",", ":"))
    return text


def _clip(value: str | int | None, words: int) -> str | int | None:
    if not isinstance(value, str) or len(value.split()) <= words:
        return value
    return " ".join(value.split()[:words]) + "…"


def _fields(record: Record) -> Fields:
    return {
        "prompt": record.prompt,
        "layer": record.layer,
        "tensor": record.tensor,
        "hash": record.hash,
        "phase": record.phase,
        "step": record.step,
    }


def _failed(judgement: Judgement, traces: Sequence[Trace]) -> tuple[Record, ...]:
    """Return the first failure's records: the arm's that was compared with, and the failing one's of another hash."""
    failure = judgement.first_failure
    if failure is None:
        return ()
    place = (failure.prompt, failure.step, failure.layer, failure.tensor)
    if failure.rung:
        cells = (cell for ladder in judgement.ladders for cell in ladder.judged.cells)
        mine = [c for c in cells if (c.prompt, c.step, c.layer, c.tensor) == place and not c.drift.equal]
        return (mine[0].reference, mine[0].candidate) if mine else ()
    for trace in traces:
        here = [r for r in trace.records if (r.prompt, r.step, r.layer, r.tensor) == place]
        against = repeated(failure.arm) if failure.of_control else "P"
        for reference in (r for r in here if r.arm == against and r.phase != "prefill_row"):
            for other in here:
                if (other.arm, other.phase) == (failure.arm, failure.phase) and other.hash != reference.hash:
                    return (reference, other)
    return ()


def _projections(judgement: Judgement) -> tuple[Record, ...]:
    mode = judgement.modes.get(main_mode(judgement))
    cells: Sequence[Cell] = sort_cells(mode.prompts[0].cells) if mode and mode.prompts else ()
    found = [cell for cell in cells if cell.tensor in PROJECTIONS]
    chosen = [cell for cell in found if cell.layer == found[0].layer and cell.step == 0] or list(cells[:1])
    return tuple(record for cell in chosen for record in (cell.reference, cell.candidate))
