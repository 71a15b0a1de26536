"""How prefill rotates its queries and keys, read from its own tensors, and what any other rotation would give.

RoPE (Su et al. 2021) turns pair i of a head's dimensions by position × frequency i. A pair is taken as one complex
number here. Axes: H heads, D head dimension, F frequencies, one for each pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from driftprobe.fingerprint import Float64, l2_norm
from driftprobe.scene import Scene

Complex128 = npt.NDArray[np.complex128]
_RECOGNISED = 0.05
"""How far, relative, prefill's result may be from the rotation that explains it: rounding in bfloat16, and more."""
_BEYOND = 8
"""Positions beyond the token's own for which prefill may have rotated."""
_STEP = 0.2
"""Radians that the fastest pair turns from one point of a grid to the next."""
_MOST_PEAKS = 4096
_LAYOUTS = ((True, True), (False, False), (False, True))
"""Whether pairs are halves of the rotated dimensions, rather than neighbours, in the input and in the result."""


@dataclass(frozen=True)
class Rotary:
    """One model's rotation of one head."""

    frequencies_F: Float64
    start: int
    """First rotated dimension."""
    halves: bool
    """Whether dimension i is paired with i + F, not with its neighbour, in the input."""
    halves_out: bool
    gain: float = 1.0
    """What cosine and sine are multiplied with (YaRN: Peng et al. 2023)."""

    @property
    def dims(self) -> int:
        """How many dimensions are rotated."""
        return 2 * len(self.frequencies_F)

    def pairs(self, states_HD: Float64, *, of_result: bool = False) -> Complex128:
        """Return the rotated dimensions as complex numbers `[H, F]`."""
        rotated = states_HD[:, self.start : self.start + self.dims]
        count = len(self.frequencies_F)
        if self.halves_out if of_result else self.halves:
            return rotated[:, :count] + 1j * rotated[:, count:]
        return rotated[:, ::2] + 1j * rotated[:, 1::2]

    def turned(self, states_HD: Float64, angles_F: Float64) -> Float64:
        """Return the states with every pair turned by its angle."""
        found = states_HD.copy()
        pairs = self.gain * self.pairs(states_HD) * np.exp(1j * angles_F)
        into = found[:, self.start : self.start + self.dims]
        if self.halves_out:
            into[:] = np.concatenate([pairs.real, pairs.imag], axis=1)
        else:
            into[:, ::2], into[:, 1::2] = pairs.real, pairs.imag
        return found

    def cross(self, before_HD: Float64, after_HD: Float64) -> Complex128:
        """Return Σ_H conj(before)·after for each pair: its angle is how far it was turned."""
        found: Complex128 = (self.pairs(before_HD).conj() * self.pairs(after_HD, of_result=True)).sum(axis=0)
        return found


def angles(position: float, frequencies_F: Float64) -> Iterator[Float64]:
    """Yield position × frequencies as float64 has them, and as a model has them that computes angles in float32."""
    yield position * frequencies_F
    with np.errstate(over="ignore"):
        yield (np.float32(position) * frequencies_F.astype(np.float32)).astype(np.float64)


def unrotated(scene: Scene, arm: str, letter: str, step: int | None = None) -> Float64 | None:
    """Return what an arm's rotation of q or k was given, `[H, D]`."""
    for tap in (f"{letter}_norm", f"{letter}_proj"):
        found = scene.tensor(arm, scene.failure.layer, tap, step)
        if found is not None and found.ndim == 3:
            return np.asarray(found[0], dtype=np.float64)
    return None


def rotated(scene: Scene, arm: str, letter: str, step: int | None = None) -> Float64 | None:
    """Return an arm's rotated q or k, `[H, D]`."""
    found = scene.tensor(arm, scene.failure.layer, f"{letter}_rope", step)
    return None if found is None or found.ndim != 3 else np.asarray(found[0], dtype=np.float64)


def recognise(scene: Scene, letter: str) -> tuple[Rotary, int] | None:
    """Return how prefill rotates, and for which position, or None where no layout explains its numbers."""
    frequencies = scene.constant(scene.failure.layer, "rope.inv_freq")
    before, after = unrotated(scene, "P", letter), rotated(scene, "P", letter)
    if frequencies is None or before is None or after is None or before.shape != after.shape:
        return None
    width, dims = before.shape[1], 2 * len(frequencies)
    if not 0 < dims <= width:
        return None
    own = scene.position
    others = [p for p in range(own + _BEYOND) if p != own]
    for positions in ([own], others):
        best = min(
            (
                _judged(Rotary(frequencies, start, *layout), position, before, after)
                for position in positions
                for layout in _LAYOUTS
                for start in sorted({0, width - dims})
            ),
            key=lambda found: found[0],
        )
        if best[0] <= _RECOGNISED * l2_norm(after):
            return best[1], best[2]
    return None


def _judged(rotary: Rotary, position: int, before: Float64, after: Float64) -> tuple[float, Rotary, int]:
    cross = rotary.cross(before, after)
    size = float(np.square(np.abs(rotary.pairs(before))).sum())
    turned = (cross * np.exp(-1j * position * rotary.frequencies_F)).real.sum()
    fitted = replace(rotary, gain=_plain(float(turned / size)) if size > 0.0 else 1.0)
    return l2_norm(fitted.turned(before, position * fitted.frequencies_F) - after), fitted, position


def _plain(gain: float) -> float:
    """Return a gain of one exactly where rounding is all that it differs by."""
    return 1.0 if abs(gain - 1.0) < 1e-3 else gain


@dataclass(frozen=True)
class Estimate:
    """A number read from how far pairs were turned."""

    value: float
    error: float
    """Its standard error, from what it leaves over."""


def estimate(cross_F: Complex128, phase_F: Float64, rate_F: Float64, low: float, high: float) -> Estimate:
    """Return the x in [low, high] that turns pairs by phase + x × rate, as `cross_F` says they were turned."""
    toward = cross_F * np.exp(-1j * phase_F)
    at_X = _peaks(toward, rate_F, low, high)
    for _ in range(30):
        at_X = at_X + _newton(toward, rate_F, at_X)
    fits = (toward * np.exp(-1j * at_X[:, None] * rate_F)).real.sum(axis=1)
    x = float(at_X[int(fits.argmax())])
    left = toward * np.exp(-1j * x * rate_F)
    curve = float((left.real * rate_F**2).sum())
    noise = float(np.square(left.imag).sum() / max(np.abs(left).sum(), 1e-300) / max(len(left) - 1, 1))
    return Estimate(x, float(np.sqrt(noise / curve)) if curve > 0.0 else np.inf)


def _peaks(toward_F: Complex128, rate_F: Float64, low: float, high: float) -> Float64:
    """Return the points of a grid where the fit peaks about as high as anywhere.

    A fast pair fits as well a full turn on, and only slow pairs tell the peaks apart: where few pairs are rotated, by
    less than what a peak loses for standing between two points of the grid. So all are kept that may be the highest.
    """
    fastest = float(np.abs(rate_F).max(initial=0.0))
    steps = int(min(max((high - low) * fastest / _STEP, 64), 400_000))
    grid = np.linspace(low, high, steps + 1)
    parts = np.array_split(grid, steps // 4096 + 1)  # a grid at once would be large for a long text
    scores = np.concatenate([(toward_F * np.exp(-1j * part[:, None] * rate_F)).real.sum(axis=1) for part in parts])
    behind, before = np.append(scores[1:], -np.inf), np.append(-np.inf, scores[:-1])
    turn = fastest * (high - low) / steps / 2.0
    lost = (1.0 - np.cos(min(turn, np.pi))) * float(np.abs(toward_F).sum())
    peaks = np.flatnonzero((scores >= before) & (scores >= behind) & (scores >= scores.max() - lost))
    highest = peaks[np.argsort(-scores[peaks], kind="stable")][:_MOST_PEAKS]
    return np.asarray(grid[highest], dtype=np.float64)


def _newton(toward_F: Complex128, rate_F: Float64, at_X: Float64) -> Float64:
    """Return how far it is to the top of each peak, by Newton's method; 0 where the fit is not concave."""
    left = toward_F * np.exp(-1j * at_X[:, None] * rate_F)
    curve, slope = (left.real * rate_F**2).sum(axis=1), (left.imag * rate_F).sum(axis=1)
    return np.asarray(np.divide(slope, curve, out=np.zeros_like(at_X), where=curve > 0.0), dtype=np.float64)
