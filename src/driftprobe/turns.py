"""How a rotated tensor moves under a small fault of its rotation, and what a difference of its inputs makes of it.

RoPE (Su et al. 2021) turns pair i of F pairs by position × frequency i, frequency i being base^(−i/F). A stretched
position turns every pair by a share of its angle; another base turns pair i by its angle times −i/F times the base's
logarithmic change. Both pairings are tried: dimension i with i + F, or with its neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from driftprobe.fingerprint import Float64
from driftprobe.local import Bench, Place, sources

STRETCH, BASE = "stretch", "base"
FITS = 0.02
"""How well prefill's result must be its input turned: a few roundings of bfloat16."""


@dataclass(frozen=True)
class Turn:
    """One way in which a rotation may be wrong by little, and what of the difference may be due to it."""

    kind: str
    pairing: str
    gap: Float64
    """d − p, less what the inputs' difference makes of it."""
    direction: Float64
    """How the tensor moves as the fault grows."""
    size: Float64
    """How large the pair is that an element belongs to: what its rounding error is relative to."""


def turns(place: Place, p: Float64, d: Float64, on: Bench) -> Iterator[Turn]:
    """Yield every turn of a rotated tensor; none where its frequencies or its position are not known."""
    frequencies = on.constant(place[1], "rope.inv_freq")
    position = on.pairs[place].reference.logical_tok_idx
    if frequencies is None or not position or 2 * frequencies.size > p.shape[-1]:
        return
    angle = frequencies.reshape(-1) * position
    count = angle.size
    rates = {STRETCH: angle, BASE: -angle * np.arange(count) / count}
    for pairing in _SLICES:
        gap = _gap(place, p, d, on, (pairing, angle))
        if gap is not None:
            size = _on_both(pairing, p, count, np.hypot)
            for kind, rate in rates.items():
                yield Turn(kind, pairing, gap, _quarter(pairing, p, rate), size)


def _gap(place: Place, p: Float64, d: Float64, on: Bench, turn: tuple[str, Float64]) -> Float64 | None:
    """Return d − p less the turned difference of the inputs; None where prefill's result is not its input turned."""
    given = sources(place, on.pairs)
    if given and all(on.pairs[source].drift.equal for source in given):
        return d - p
    x, other = (side(*given[0]) if len(given) == 1 else None for side in (on.reference, on.candidate))
    if x is None or other is None or x.shape != p.shape or other.shape != d.shape:
        return None
    gain = on.constant(place[1], "rope.scaling")
    size = 1.0 if gain is None else float(gain.reshape(-1)[0])
    mine, moved = (_turned(turn, values, size) for values in (x, other))
    if float(np.square(p - mine).sum()) > FITS**2 * float(np.square(p).sum()):
        return None
    apart: Float64 = (d - p) - (moved - mine)
    return apart


def _turned(turn: tuple[str, Float64], x: Float64, gain: float) -> Float64:
    pairing, angle = turn
    result = x.copy()
    rotated, (first, second) = result[..., : 2 * angle.size], _slices(pairing, angle.size)
    a, b = rotated[..., first].copy(), rotated[..., second].copy()
    rotated[..., first] = gain * (a * np.cos(angle) - b * np.sin(angle))
    rotated[..., second] = gain * (b * np.cos(angle) + a * np.sin(angle))
    return result


def _quarter(pairing: str, p: Float64, rate: Float64) -> Float64:
    """Return how the rotated tensor moves as each pair turns at its rate: a quarter turn on, times the rate."""
    result = np.zeros_like(p)
    rotated, (first, second) = p[..., : 2 * rate.size], _slices(pairing, rate.size)
    result[..., : 2 * rate.size][..., first] = -rotated[..., second] * rate
    result[..., : 2 * rate.size][..., second] = rotated[..., first] * rate
    return result


def _on_both(pairing: str, p: Float64, count: int, of: np.ufunc) -> Float64:
    result = np.zeros_like(p)
    rotated, (first, second) = p[..., : 2 * count], _slices(pairing, count)
    both = of(rotated[..., first], rotated[..., second])
    result[..., : 2 * count][..., first] = result[..., : 2 * count][..., second] = both
    return result


_SLICES = ("halves", "neighbours")


def _slices(pairing: str, count: int) -> tuple[slice, slice]:
    """Return where the first and the second dimensions of all pairs are."""
    if pairing == "halves":
        return slice(0, count), slice(count, None)
    return slice(0, None, 2), slice(1, None, 2)
