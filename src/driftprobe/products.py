"""Matrix products whose inputs differ: what the matrix makes of the inputs' difference is computed and taken off.

The local test needs inputs that are bit for bit equal; behind the first op that rounds otherwise there are none. With
its matrix W a linear op can be tested all the same: d − p − W·(x_d − x_p) is its own rounding, on both sides, or a
fault. Matrices are large and not in a trace. So a first look says which ops behave as no linear op with these inputs
does (`Cell.unlike`), their matrices are added to the trace (`wanted_matrices`), and it is judged again. Controls are
not looked at: a fault that only they have is left to the floor.

Arrays are `[T, …]`, with T = 1 token and its heads in one axis or two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from driftprobe.compare import Pair
from driftprobe.fingerprint import UNIT_ROUNDOFF, Float64
from driftprobe.judgement import Cell, Judgement, TraceJudgement
from driftprobe.local import Bench, Ground, Local, Place, coarse, product_excess
from driftprobe.taps import BY_NAME, ExecutionOrder, execution_order, linear_taps

LOOKS = 8
"""Ops of one trace whose matrices are asked for: those most unlike what their inputs make of them."""
FITS = 1.0
"""Excess over its own rounding up to which a side is its matrix times its input. One side must be, or the op does more:
it quantises what it is given, or adds a branch, and what is left of the two sides is no rounding of the result."""
GAIN = 2.0
"""Ratio of result's to input's drift from which an op is looked at: a matrix treats differences as it does vectors."""
LEAN = 0.5
"""Cosine of a result's difference with the result from which it is looked at: in 64 dimensions chance gives 0.12."""
PEAK = 6.0
"""Ratio of the largest difference to their root mean square from which it is looked at: 10⁵ normal ones have 4.5."""


Wanted = dict[str, list[tuple[int | None, str]]]
"""Ops whose matrices are asked for, layer and tap, by the file of the trace that lacks them."""


def replayed(pair: Pair, on: Bench) -> Local | None:
    """Return the local test of a linear op, its inputs' difference taken off; None where the trace has no matrix of it.

    None as well where neither side is its matrix times its input, within its own rounding (`FITS`).
    """
    place = _place(pair)
    source = _input(place, on)
    weight = on.constant(place[1], f"{place[2]}.weight")
    if source is None or weight is None or weight.ndim != 2 or not _testable(pair, on):
        return None
    p, d = on.reference(*place), on.candidate(*place)
    before = _left(p, on.reference(*source), weight, place, on)
    after = _left(d, on.candidate(*source), weight, place, on)
    if p is None or d is None or before is None or after is None or before.shape != after.shape:
        return None
    terms, roundings = weight.shape[1], _roundings(place, on)
    larger = np.maximum(np.abs(p), np.abs(d))  # the inputs differ, and so may what is rounded
    both, *alone = (product_excess(place, y, gap, terms, on) / roundings
                    for y, gap in ((larger, after - before), (p, before), (d, after)))  # fmt: skip
    if min(alone) > FITS:
        return None
    return Local(both, (source[2],), Ground.PRODUCT)


def unlike(pair: Pair, on: Bench) -> float | None:
    """Return how much more a linear op's result differs than its input does, if it is so in a way that asks for a look.

    That is where the difference is larger than the input's, relatively, lies along the result while the input's does
    not, or stands in few elements. None for any other tap.
    """
    place = _place(pair)
    source = _input(place, on)
    known = {(place[1], f"{place[2]}.{name}") for name in ("weight", "low_norm.eps")} & on.constants.keys()
    if source is None or known or not _testable(pair, on):
        return None
    y, moved, x, other = (side(*at) for at in (place, source) for side in (on.reference, on.candidate))
    if y is None or moved is None or x is None or other is None or y.shape != moved.shape or x.shape != other.shape:
        return None
    gap, given = moved - y, other - x
    if not (np.isfinite(gap).all() and np.isfinite(given).all() and y.any() and x.any()):
        return None
    u = UNIT_ROUNDOFF[on.facts.dtype]
    drift, before = _norm(gap) / _norm(y), _norm(given) / _norm(x)
    share, share_before = float((gap * y).sum() / np.square(y).sum()), float((given * x).sum() / np.square(x).sum())
    grows = drift > GAIN * float(np.hypot(before, u))
    leans = abs(share) > LEAN * drift and abs(share - share_before) > max(u, abs(share) / 2)
    peaks = float(np.abs(gap).max()) > PEAK * _norm(gap) / gap.size**0.5 and drift > u
    return drift / float(np.hypot(before, u)) if grows or leans or peaks else None


def wanted_matrices(judgement: Judgement, looks: int = LOOKS) -> Wanted:
    """Return the layer and tap of every op whose matrices would tell more, by the file of the trace that lacks them.

    They are the first failure's, for its diagnosis, and those of up to `looks` ops before it that are most `unlike`.
    """
    wanted: Wanted = {}
    for mode in judgement.modes.values():
        for judged in mode.prompts:
            for file, place in _wanted(judged, looks):
                wanted.setdefault(file, [])
                if place not in wanted[file]:
                    wanted[file].append(place)
    return wanted


def _wanted(judged: TraceJudgement, looks: int) -> Iterator[tuple[str, tuple[int | None, str]]]:
    first = judged.first_failure
    if first is not None:
        yield judged.decided_by.file, (first.layer, first.tensor)
    failing = next(iter(judged.failures), None)
    until = None if failing is None or failing.rung else execution_order(failing.layer, failing.tensor, failing.order)
    yield from ((judged.file, place) for place in _most_unlike(judged.cells, until)[:looks])


def _most_unlike(cells: Iterable[Cell], until: ExecutionOrder | None) -> list[tuple[int | None, str]]:
    best: dict[tuple[int | None, str], float] = {}
    for cell in cells:
        if cell.unlike is not None and (
            until is None or execution_order(cell.layer, cell.tensor, cell.reference.order) < until
        ):
            place = (cell.layer, cell.tensor)
            best[place] = max(cell.unlike, best.get(place, 0.0))
    return sorted(best, key=lambda place: -best[place])


def _place(pair: Pair) -> Place:
    return (pair.reference.step, pair.reference.layer, pair.reference.tensor)


def _testable(pair: Pair, on: Bench) -> bool:
    """Whether a pair is of an op that stores results more coarsely than it sums them, and differs."""
    return coarse(on.facts) and bool(on.facts.accumulate) and not pair.drift.equal


def _input(place: Place, on: Bench) -> Place | None:
    """Return the recorded tap that a linear op multiplies; None for any other op, or where the inputs are equal."""
    step, layer, tensor = place
    names = linear_taps(tensor) if tensor in BY_NAME or (step, layer, linear_taps(tensor)[0]) in on.pairs else ()
    within = [(step, None if name == "final_norm" else layer, name) for name in names]
    found = next((source for source in within if source in on.pairs), None)
    return None if found is None or on.pairs[found].drift.equal else found


def _left(result: Float64 | None, given: Float64 | None, weight: Float64, place: Place, on: Bench) -> Float64 | None:
    """Return what is left of a result when W·x is taken off, in its own shape; None where the shapes do not fit."""
    if result is None or given is None or given.shape[0] != result.shape[0] or not np.isfinite(result).all():
        return None
    x = given.reshape(len(given), -1)
    if x.shape[1] != weight.shape[1] or result[0].size != weight.shape[0]:
        return None
    y = x @ weight.T
    bias = on.constant(place[1], f"{place[2]}.bias")
    if bias is not None:
        y = y + bias.reshape(-1)
    if place[2] == "logits":
        y = _capped(y, *(on.constant(None, f"logits.{name}") for name in ("scale", "softcap")))
    left: Float64 = result - y.reshape(result.shape)
    return left


def _roundings(place: Place, on: Bench) -> int:
    """Return how often a result is rounded: once, and for logits once more by a scale, three times by a soft-cap."""
    after = {"logits.scale": 1, "logits.softcap": 3} if place[2] == "logits" else {}
    return 1 + sum(count for name, count in after.items() if (None, name) in on.constants)


def _capped(y: Float64, scale: Float64 | None, cap: Float64 | None) -> Float64:
    """Return logits as a model ends them: scaled, then held under a soft-cap (Gemma 2, 2024)."""
    y = y if scale is None else y * float(scale.reshape(-1)[0])
    held: Float64 = y if cap is None else float(cap.reshape(-1)[0]) * np.tanh(y / float(cap.reshape(-1)[0]))
    return held


def _norm(values: Float64) -> float:
    return float(np.sqrt(np.square(values).sum()))
