"""How a rotated tensor moves under a small fault of its rotation, and what a difference of its inputs makes of it.

RoPE (Su et al. 2021) turns pair i of F pairs by position × frequency i, frequency i being base^(−i/F). A stretched
position turns every pair by a share of its angle; another base turns pair i by its angle times −i/F times the base's
logarithmic change. Of two pairings, dimension i with i + F or with its neighbour, prefill's own result tells which.

Arrays are `[T, H, D]`, with T = 1: tokens, heads, head dimension.
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
    record = on.pairs[place].reference
    position = record.logical_tok_idx if record.pos_id is None else record.pos_id
    if frequencies is None or not position or 2 * frequencies.size > p.shape[-1]:
        return
    angle = frequencies.reshape(-1) * position
    count = angle.size
    rates = {STRETCH: angle, BASE: -angle * np.arange(count) / count}
    for pairing, gap in _gaps(place, p, d, on, angle):
        size = _sizes(pairing, p, count)
        for kind, rate in rates.items():
            yield Turn(kind, pairing, gap, _quarter(pairing, p, rate), size)


def _gaps(place: Place, p: Float64, d: Float64, on: Bench, angle: Float64) -> Iterator[tuple[str, Float64]]:
    """Yield d − p less the turned difference of the inputs, for the pairing by which prefill turned its own.

    Inputs that are equal make no difference: there both pairings are tried where prefill's result fits neither.
    """
    given = sources(place, on.pairs)
    x, other = (side(*given[0]) if len(given) == 1 else None for side in (on.reference, on.candidate))
    if x is None or other is None or x.shape != p.shape or other.shape != d.shape:
        return
    gain = on.constant(place[1], "rope.scaling")
    size = 1.0 if gain is None else float(gain.reshape(-1)[0])
    turned = {pairing: [_turned(pairing, angle, values, size) for values in (x, other)] for pairing in _PAIRINGS}
    off = {pairing: float(np.square(p - mine).sum()) for pairing, (mine, _) in turned.items()}
    best = min(off, key=off.__getitem__)
    if off[best] <= FITS**2 * float(np.square(p).sum()):
        mine, moved = turned[best]
        yield best, (d - p) - (moved - mine)
    elif on.pairs[given[0]].drift.equal:
        yield from ((pairing, d - p) for pairing in _PAIRINGS)


def _turned(pairing: str, angle: Float64, x: Float64, gain: float) -> Float64:
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


def _sizes(pairing: str, p: Float64, count: int) -> Float64:
    """Return for each element how large its pair is; 0 for what is not turned."""
    result = np.zeros_like(p)
    rotated, (first, second) = p[..., : 2 * count], _slices(pairing, count)
    both = np.hypot(rotated[..., first], rotated[..., second])
    result[..., : 2 * count][..., first] = result[..., : 2 * count][..., second] = both
    return result


_PAIRINGS = ("halves", "neighbours")


def _slices(pairing: str, count: int) -> tuple[slice, slice]:
    """Return where the first and the second dimensions of all pairs are."""
    if pairing == "halves":
        return slice(0, count), slice(count, None)
    return slice(0, None, 2), slice(1, None, 2)
