"""K and V rows for the page: runs of positions, each with what decode's rows there are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from driftprobe.judgement import Cell, RowCheck
from driftprobe.report.html.pool import Pool
from driftprobe.report.html.views import View, size_of
from driftprobe.rows import rows_by_position

ROW_BYTES = 300_000
"""What the rows of all views may take."""
_Kind = tuple[str, int]
"""`=` prefill's own, `~` the same within rounding, `>` prefill's of another position (by how far), `L` another
layer's (which), `0` empty, `x` none of these."""


def encode_rows(view: View, pool: Pool, budget: int = ROW_BYTES) -> int | None:
    """Return the number of a view's rows in their pool: `[layer, k or v, runs]` for each tensor; None where too long.

    A run is `[first position, how many, kind]`, and for `>` and `L` the distance or the layer.
    """
    if view.arm != "D":
        return None
    cells = {(cell.step, cell.layer, cell.tensor): cell for cell in view.cells}
    found: list[Any] = []
    for check in view.judged.rows:
        cell = cells.get((check.step, check.layer, check.tensor))
        if cell is not None and check.step == view.step:
            found.append([check.layer, check.tensor[0], _runs(check, cell)])
    return pool.add(found) if found and pool.size + size_of(found) <= budget else None


def _runs(check: RowCheck, cell: Cell) -> list[list[int | str]]:
    kinds = _kinds(check, cell)
    if not kinds:  # a window has left no row that both sides hold
        return []
    runs: list[list[int | str]] = []
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(kinds)) if a[1] != b[1] or a[0] + 1 != b[0]), len(kinds)]
    for first, end in pairwise(starts):
        position, (kind, number) = kinds[first]
        runs.append([position, end - first, kind, *([number] if kind in ">L" else [])])
    return runs


def _kinds(check: RowCheck, cell: Cell) -> Sequence[tuple[int, _Kind]]:
    """Return what each shared position before the step's own token holds, in order."""
    reference, candidate = rows_by_position(cell.reference), rows_by_position(cell.candidate)
    token = cell.candidate.logical_tok_idx
    shared = [p for p in sorted(reference.keys() & candidate.keys()) if token is None or p < token]
    odd: dict[int, _Kind] = {position: (">", source - position) for position, source in check.moved}
    odd |= dict.fromkeys(check.zero, ("0", 0))
    odd |= {position: ("L", layer) for position, layer in check.other_layer}
    odd |= dict.fromkeys(check.changed, ("x", 0))
    return [(p, odd.get(p, ("=" if reference[p] == candidate[p] else "~", 0))) for p in shared] if shared else []
