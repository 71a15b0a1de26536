"""Runs one case of paths: both ladder settings from one capture, and what the fault really changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as Folder
from typing import Any

from benchmarks.accuracy import models, truth
from benchmarks.accuracy.cases import FAULT, Case
from benchmarks.accuracy.path_faults import CANDIDATE, PATH_FAULTS, Names, faulty
from benchmarks.accuracy.paths import PADDED_ROW, PAIRS, Pair, Text
from benchmarks.accuracy.rules import Tapped
from driftprobe import probe_paths
from driftprobe.compare import PayloadSource
from driftprobe.engines.hf.paths import PathEngine
from driftprobe.errors import EngineError, UsageError
from driftprobe.faults import Expected
from driftprobe.trace import Trace

POSITIONS = 16
"""Positions that are compared in a run of a case."""


@dataclass(frozen=True)
class PathRun:
    """A case's model, and its pair of paths with the fault and without."""

    model: Any
    clean: Pair
    pair: Pair
    expected: Expected | None
    rows: tuple[int | None, int | None]
    """The batch row that holds the text, of a padded batch that is the reference: a user must say so."""


def prepare(case: Case) -> PathRun:
    """Return what a case runs. Raises UsageError where its model has no such path."""
    model = models.engine(*case.model).model
    text = Text(models.tokens(case.length, case.seed), case.steps)
    clean = PAIRS[case.path](text)
    if case.kind != FAULT:
        return PathRun(model, clean, clean, None, (None, None))
    fault = PATH_FAULTS[case.name]
    strength = fault.strengths[0] if case.strength is None else case.strength
    pair, expected = faulty(fault, Names(model), text, case.path, case.side, strength)
    acts_in_candidate = fault.of_steps == (case.side == CANDIDATE)
    clean = clean if acts_in_candidate else clean[::-1]
    batch_first = case.path.startswith("padded") and not acts_in_candidate
    return PathRun(model, clean, pair, expected, (PADDED_ROW if batch_first else None, None))


def capture(run: PathRun, folder: Folder) -> None:
    """Run the pair as a user would, every tensor kept, the ladder climbed."""
    try:
        probe_paths(run.model, reference=run.pair[0], candidate=run.pair[1], name="case", positions=POSITIONS,
                    row=run.rows, payload="all", ladder="on", out=folder)  # fmt: skip
    except EngineError as error:
        if isinstance(error.__cause__, UsageError):  # the path itself says that it is nothing for this model
            raise error.__cause__ from error
        raise


def captured(trace: Trace, payloads: PayloadSource) -> dict[truth.Place, Any]:
    """Return every row of both sides, `(arm, position, layer, tensor)` -> tensor."""
    found = {}
    for record in trace.records:
        array = payloads.get(record) if record.arm in truth.ARMS else None
        if array is not None:
            found[(record.arm, record.logical_tok_idx, record.layer, record.tensor)] = array
    return found


def clean_rows(run: PathRun, rung: str) -> dict[truth.Place, Any]:
    """Return the same rows of the pair without the fault; `rung` is empty for the model's own dtype."""
    engine = PathEngine(run.model, *run.clean, rows=run.rows)
    if rung:
        with engine.at(rung):
            return dict(_rows(engine))
    return dict(_rows(engine))


def _rows(engine: PathEngine) -> Iterator[tuple[truth.Place, Any]]:
    compared = engine.scout(POSITIONS)
    for arm in truth.ARMS:
        for row in engine.run(arm, compared):
            yield (arm, row.position, row.layer, row.tensor), row.array


def tapped(trace: Trace, base: truth.Taps, rung: Mapping[truth.Place, Any]) -> Iterator[Tapped]:
    """Yield every pair of rows, taps in the order in which their modules ran."""
    orders = {(r.layer, r.tensor): r.order for r in trace.records if r.arm == "P"}
    places = sorted((p for p in base if p[0] == "P"), key=lambda p: (orders[(p[2], p[3])] or 0, p[1]))
    for place in places:
        candidate = base.get(("D", *place[1:]))
        if candidate is not None:
            yield Tapped(place[2], place[3], base[place], candidate, rung.get(place))
