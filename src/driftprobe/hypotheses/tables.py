"""Hypotheses about modules that look up a position: a rotary table's cosines, or a learned embedding (mode `paths`).

Their result is a row of a table that the model's constants give, so the row itself says which position was asked for.

Axes: F frequencies, D channels, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from driftprobe.fingerprint import Float64
from driftprobe.hypotheses.rotation import angles
from driftprobe.hypotheses.view import Guess, Guesses, View
from driftprobe.judgement import Status
from driftprobe.taps import BY_NAME
from driftprobe.trace import CACHE_BEYOND

_BEYOND = 64
"""Positions behind the text that are looked at, beside as many again as the text has: padding, and rows too many."""
_COUNTED = 8
"""Rows that pass from which a learned table's offset is read: two would do, if no two rows were alike."""
_RECOGNISED = 0.05
"""How far, relative, a row of cosines may be from the table's: rounding in bfloat16, and more."""


@dataclass(frozen=True)
class Table:
    """Every row that the module can give, as it is computed in float64 and, of cosines, with angles in float32 too."""

    variants_SD: tuple[Float64, ...]
    cause: str
    offset: int = 0
    """Which row position 0 has: the first rows of a learned table may be kept for something else."""

    def nearest(self, row_D: Float64) -> tuple[int, Float64]:
        """Return the position whose row is nearest to one, and that row."""
        found = [(float(gaps.min()), int(gaps.argmin()), rows)
                 for rows in self.variants_SD for gaps in [np.square(rows - row_D).sum(-1)]]  # fmt: skip
        _, at, rows = min(found, key=lambda one: one[0])
        return at, rows[at]


def table_of(view: View) -> Table | None:
    """Return the table that the failing module reads, or None where it is none, or the trace does not hold it."""
    result = view.result()
    if view.tensor in BY_NAME or result is None or result.ndim != 2:
        return None
    learned = view.constant(f"{view.tensor}.table")
    if learned is not None:
        return _learned(view, learned) if learned.shape[1] == result.shape[1] else None
    for table in _rotary_tables(view, result.shape[1]):
        _, row = table.nearest(result[0])
        if np.square(row - result[0]).sum() <= _RECOGNISED**2 * np.square(row).sum():
            return table
    return None


def _learned(view: View, rows_SD: Float64) -> Table | None:
    """Return a learned table of positions; None where the rows that pass do not count the positions one by one.

    Any embedding is a table (of tokens, of token types); only what both sides agree on says what this one is asked for.
    """
    passed = [at for at, status in sorted(view.scene.positions.items()) if status is Status.PASS][:_COUNTED]
    table = Table((rows_SD,), "learned_position")
    sides = [view.scene.rows(arm, view.layer, view.tensor) for arm in (view.arm, view.other)]
    offsets = {table.nearest(rows[at][0])[0] - at for rows in sides for at in passed if at in rows}
    return replace(table, offset=offsets.pop()) if len(passed) > 1 and len(offsets) == 1 else None


def _rotary_tables(view: View, width: int) -> Iterator[Table]:
    """Yield the tables of cosines of every set of frequencies in the model, in every usual order of channels."""
    known: dict[bytes, tuple[Float64, float]] = {}
    for layer in range(view.scene.judged.engine.layers):
        frequencies = view.scene.constant(layer, "rope.inv_freq")
        if frequencies is not None:
            known.setdefault(frequencies.tobytes(), (frequencies, view.number("rope.scaling", layer) or 1.0))
    count = 2 * len(view.scene.judged.token_ids) + _BEYOND
    for frequencies, gain in known.values():
        turns = [np.stack(found) for found in zip(*(tuple(angles(p, frequencies)) for p in range(count)), strict=True)]
        orders = (lambda c: np.tile(c, 2), lambda c: np.repeat(c, 2, axis=-1), lambda c: c)
        for order in orders if width == 2 * len(frequencies) else orders[2:]:
            tables = tuple(gain * order(np.cos(turn)) for turn in turns)
            if tables[0].shape[1] == width:
                yield Table(tables, "rope_position")


def looked_up(view: View) -> Float64 | None:
    """Return the table's row of the token's own position; None where the failing module reads no table of positions."""
    table, result = table_of(view), view.result()
    if table is None or result is None:
        return None
    at, row = table.nearest(result[0])
    own = view.scene.position + table.offset
    if at == own:
        return row[None]
    return table.variants_SD[0][own][None] if 0 <= own < len(table.variants_SD[0]) else None


def guesses(view: View) -> Guesses:
    """Yield the row of another position than the other side has; rows too many in the cache move it by their number."""
    table, result, other = table_of(view), view.result(), view.of_other()
    if table is None or result is None or other is None or other.shape != result.shape:
        return
    (used, row), (expected, _) = table.nearest(result[0]), table.nearest(other[0])
    offset = used - expected
    if not offset:
        return
    extra = view.scene.measured(CACHE_BEYOND, view.arm).get(view.scene.position, 0)
    if offset == extra:
        yield Guess("keys_extra", {"count": extra}, row[None])
    else:
        positions = {"used": used - table.offset, "expected": expected - table.offset, "offset": offset}
        yield Guess(table.cause, positions, row[None])
