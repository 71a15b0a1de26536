"""The maps of a run: every mode, prompt and step, each a set of columns over the same layers and taps.

A view is one comparison at one step: decode's own run (arm D) or the aligned one (arm A) against prefill, in the run
itself or at a rung of the precision ladder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from driftprobe.compare import NoPayloads, by_arm, pair_arms
from driftprobe.floor import is_control, repeated
from driftprobe.judgement import Cell, Failure, Judgement, Status, TraceJudgement
from driftprobe.report.facts import all_prompts, sharper, sort_cells
from driftprobe.report.html.pool import Pool, Words, encode, name, short
from driftprobe.taps import BY_NAME, CANDIDATE
from driftprobe.trace import Trace

VIEW_BYTES = 1_200_000
"""What all maps of a page may take; those that show the least are left out, and the page says so."""
NUMBERS = 10
"""Bytes that the numbers of a cell's two fingerprints take."""
_Place = tuple[int | None, str]
Bands = dict[_Place, tuple[float, float]]
"""Place -> smallest and largest drift of the control arms there."""


@dataclass(frozen=True, slots=True)
class View:
    """One comparison at one step (in mode `paths`: one position)."""

    judged: TraceJudgement
    arm: str
    rung: str
    step: int
    position: int | None
    cells: tuple[Cell, ...]
    """In order of execution."""

    @property
    def failing(self) -> int:
        """How many cells are beyond their limit."""
        return sum(cell.status is Status.FAIL for cell in self.cells)


def all_views(judgement: Judgement) -> list[View]:
    """Return every view: by mode and prompt, the run before its rungs, arm D before arm A, by step."""
    return [
        view
        for item in all_prompts(judgement)
        for judged, rung in ((item, ""), *(((item.ladder.judged, item.ladder.rung),) if item.ladder else ()))
        for arm, cells in (("D", judged.cells), ("A", judged.aligned_cells))
        for view in _by_step(judged, arm, rung, cells)
    ]


def _by_step(judged: TraceJudgement, arm: str, rung: str, cells: Sequence[Cell]) -> Iterator[View]:
    groups: dict[tuple[int, int | None], list[Cell]] = {}
    for cell in cells:
        many = cell.candidate.phase == CANDIDATE
        groups.setdefault((cell.step, cell.candidate.logical_tok_idx if many else None), []).append(cell)
    for (step, position), mine in groups.items():
        yield View(judged, arm, rung, step, position, tuple(sort_cells(mine)))


def shows(view: View, failure: Failure | None) -> bool:
    """Whether a failure is a cell of this view."""
    return failure is not None and any(_is(cell, failure) for cell in view.cells) and view.rung == failure.rung


def _is(cell: Cell, failure: Failure) -> bool:
    same = (cell.prompt, cell.step, cell.layer, cell.tensor) == (
        failure.prompt, failure.step, failure.layer, failure.tensor
    )  # fmt: skip
    return same and (cell.candidate.phase != CANDIDATE or cell.candidate.logical_tok_idx == failure.position)


def first_look(views: Sequence[View], judgement: Judgement) -> tuple[int, int]:
    """Return which view and which of its cells a reader sees first: the first failure's, or the largest excess."""
    failure = judgement.first_failure
    if not views:
        return (0, 0)
    index = next((i for i, view in enumerate(views) if shows(view, failure) and _deepest(view, judgement)), None)
    if index is None:
        index = next((i for i, view in enumerate(views) if shows(view, failure)), None)
    if failure is None or index is None:
        modes = list(judgement.modes)
        index = max(range(len(views)), key=lambda i: (not views[i].rung, views[i].arm == "D", *_worst(views[i]),
                                                      modes.index(views[i].judged.mode)))  # fmt: skip
        cells = views[index].cells
        return index, max(range(len(cells)), key=lambda i: _gravity(cells[i]))
    return index, next(i for i, cell in enumerate(views[index].cells) if _is(cell, failure))


def _deepest(view: View, judgement: Judgement) -> bool:
    modes = [name for name in ("kv_aligned", "as_designed", *judgement.modes) if name in judgement.modes]
    failing = [m for m in modes if judgement.modes[m].first_failure is not None]
    return not failing or view.judged.mode == failing[0]


def _gravity(cell: Cell) -> tuple[int, float]:
    return ((Status.PASS, Status.UNKNOWN, Status.FAIL).index(cell.status), cell.excess or 0.0)


def _worst(view: View) -> tuple[int, float]:
    return max((_gravity(cell) for cell in view.cells), default=(0, 0.0))


def chosen(views: Sequence[View], start: int, budget: int = VIEW_BYTES) -> list[View]:
    """Return the views that fit a page, in their order: the first look, then those that fail, then the others."""
    size = 0
    kept: set[int] = set()
    order = sorted(range(len(views)), key=lambda i: (i != start, not views[i].failing, views[i].rung != "", i))
    for i in order:
        size += _size(views[i])
        if size > budget and kept:
            break
        kept.add(i)
    return [view for i, view in enumerate(views) if i in kept]


def _size(view: View) -> int:
    """Return about how many bytes a view takes: what its cells do not share with other views."""
    equal = sum(cell.drift.equal for cell in view.cells)
    told = sum(len(sharper(cell)) for cell in view.cells)
    whole = sum(cell.drift.max_abs is not None and not cell.drift.equal for cell in view.cells)
    return 300 + 8 * equal + 26 * (len(view.cells) - equal) + 30 * whole + 2 * told + NUMBERS * len(view.cells)


def guilty_arms(judged: TraceJudgement) -> list[str]:
    """Return the control arms that rounding does not explain: findings themselves, and no measure of rounding."""
    return sorted({failure.arm for failure in judged.failures if failure.of_control and is_control(failure.arm)})


def control_bands(trace: Trace, guilty: Sequence[str]) -> Bands:
    """Return what innocent control arms drift by at each place; repetitions are left out, they show no rounding."""
    bands: Bands = {}
    arms = by_arm(trace)
    for arm in sorted({record.arm for record in trace.records}):
        if not is_control(arm) or arm.endswith("'") or arm in guilty:
            continue
        for found in pair_arms(arms, repeated(arm), arm, NoPayloads()).matched:
            where, drift = (found.reference.layer, found.reference.tensor), found.drift.value
            if drift is not None:
                low, high = bands.get(where, (drift, drift))
                bands[where] = (min(low, drift), max(high, drift))
    return bands


def encode_view(view: View, bands: Bands, pool: Pool, words: Words, taps: Words) -> dict[str, Any]:
    """Return a view for the page: names, and the numbers of its columns in the pool."""
    cells = view.cells
    band = [bands.get((cell.layer, cell.tensor)) for cell in cells]
    return {
        "mode": name(view.judged.mode), "prompt": name(view.judged.prompt), "arm": view.arm, "rung": name(view.rung),
        "step": view.step, "position": view.position, "guilty": guilty_arms(view.judged),
        "layer": pool.add([-1 if cell.layer is None else cell.layer for cell in cells]),
        "tap": pool.add([taps.add(cell.tensor) for cell in cells]),
        "drift": pool.add([short(cell.drift.value) for cell in cells]),
        "floor": pool.add([short(cell.floor.value) for cell in cells]),
        "source": pool.add([words.add(cell.floor.source) for cell in cells]),
        "status": pool.add("".join(map(_status, cells))),
        "rungs": pool.add("".join(cell.drift.rung[0] for cell in cells)),
        "low": pool.add([None if item is None else short(item[0]) for item in band]),
        "high": pool.add([None if item is None else short(item[1]) for item in band]),
        "more": pool.add({str(i): more for i, cell in enumerate(cells) if (more := _more(cell))}),
    }  # fmt: skip


def _status(cell: Cell) -> str:
    return "e" if cell.drift.equal else cell.status.value[0]


def _more(cell: Cell) -> dict[str, Any]:
    """Return what whole tensors told of a cell, and what failed it if not the floor."""
    found: dict[str, Any] = {}
    if cell.drift.max_abs:
        found |= {"a": short(cell.drift.max_abs), "u": short(cell.drift.ulp), "w": cell.drift.worst}
    told = sharper(cell)
    return found | ({"t": told} if told else {})


def about_taps(taps: Iterable[str]) -> list[list[str | int]]:
    """Return each tap's name, axes, op and rank in a layer; of a module's own name only that, and −1."""
    ranks = {tap: rank for rank, tap in enumerate(BY_NAME)}
    known = ((tap, BY_NAME.get(tap)) for tap in taps)
    return [[tap, "", "", -1] if about is None else [tap, about.axes, about.op, ranks[tap]] for tap, about in known]


def size_of(encoded: Any) -> int:
    """Return how many bytes a value takes in the page."""
    return len(encode(encoded))
