"""Hypotheses about positions: for which position, base, pairing or dimensions the candidate rotated q or k."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from driftprobe.causes import Parameters
from driftprobe.fingerprint import UNIT_ROUNDOFF, Float64
from driftprobe.hypotheses.base import Prediction
from driftprobe.hypotheses.rotation import Estimate, Rotary, angles, estimate, recognise, rotated, unrotated
from driftprobe.judgement import Status
from driftprobe.scene import Scene

_NEAR = 4
"""Positions off within which a step is taken for miscounted, rather than for scaled, where one step is all there is."""
_STRETCH = 4
_LARGEST_BASE = 9.3
"""ln of 10⁴ and a bit: how many times larger or smaller another base may be."""


def rotations(scene: Scene) -> Iterator[Prediction]:
    """Yield what `q_rope` or `k_rope` would be, were the candidate's own input rotated otherwise than prefill's."""
    if scene.failure.tensor not in {"q_rope", "k_rope"}:
        return
    letter = scene.failure.tensor[0]
    known, before = recognise(scene, letter), unrotated(scene, scene.failure.arm, letter)
    after = rotated(scene, scene.failure.arm, letter)
    if known is None or before is None or after is None or before.shape != after.shape:
        return
    rotary, position = known
    alone = _other_agrees(scene, "k" if letter == "q" else "q")
    if alone:
        yield _prediction(scene, "rope_missing", {"of": letter}, before)
        twice = replace(rotary, gain=rotary.gain**2)
        yield from _turned(scene, "rope_twice", {"of": letter}, twice, before, 2 * position)
    yield from _of_position(scene, rotary, position, before, after, letter, alone=alone)
    yield from _of_base(scene, rotary, position, before, after)
    yield from _of_pairing(scene, rotary, position, before)
    yield from _of_dims(scene, rotary, position, before)


def _prediction(scene: Scene, cause: str, parameters: Parameters, states: Float64, fitted: int = 0) -> Prediction:
    return Prediction(cause, parameters, scene.failure.layer, scene.failure.tensor, states[None], fitted)


def _turned(scene: Scene, cause: str, parameters: Parameters, rotary: Rotary, before: Float64, position: float,
            fitted: int = 0) -> Iterator[Prediction]:  # fmt: skip
    for turn in angles(position, rotary.frequencies_F):
        yield _prediction(scene, cause, parameters, rotary.turned(before, turn), fitted)


def _other_agrees(scene: Scene, letter: str) -> bool:
    """Whether the other of q and k is rotated as in prefill, so that the position itself is right."""
    cells = scene.judged.aligned_cells if scene.failure.arm == "A" else scene.judged.cells
    where = (scene.step, scene.failure.layer, f"{letter}_rope")
    return any(c.status is Status.PASS for c in cells if (c.step, c.layer, c.tensor) == where)


def _of_position(scene: Scene, rotary: Rotary, position: int, before: Float64, after: Float64, letter: str,
                 *, alone: bool) -> Iterator[Prediction]:  # fmt: skip
    found = _position(rotary, before, after, position)
    if not math.isfinite(found.value):
        return
    whole = round(found.value)
    rounded = 0.0 if whole == position else _rounding(scene, rotary)
    if abs(found.value - whole) > max(4.0 * found.error, 1e-6 * max(position, 1), rounded):
        factor = found.value / position if position else 0.0
        yield from _turned(scene, "rope_scaling", {"factor": factor}, rotary, before, found.value, 1)
        return
    if alone and whole in {0, 2 * position} and rotary.gain == 1.0:
        return  # not rotated, or rotated twice
    if _scales(scene, rotary, position, whole, letter):
        yield from _turned(scene, "rope_scaling", {"factor": whole / position}, rotary, before, whole)
    else:
        told = {"used": whole, "expected": position, "offset": whole - position}
        yield from _turned(scene, "rope_position", told, rotary, before, whole)


def _rounding(scene: Scene, rotary: Rotary) -> float:
    """Return how far off a position is found where cosine, sine and the result are rounded once each.

    Either turns the fastest pair by a unit roundoff at most, in all heads alike. What few pairs leave over does not
    show it: one number fits two of them almost exactly.
    """
    record = scene.record(scene.failure.arm, scene.failure.layer, scene.failure.tensor)
    unit = UNIT_ROUNDOFF.get((record.dtype if record is not None else None) or "", 0.0)
    return 2.0 * unit / max(float(np.abs(rotary.frequencies_F).max(initial=0.0)), 1e-300)


def _position(rotary: Rotary, before: Float64, after: Float64, position: int) -> Estimate:
    cross, still = rotary.cross(before, after), np.zeros_like(rotary.frequencies_F)
    span = float(_STRETCH * position + 64)
    return estimate(cross, still, rotary.frequencies_F, -span / _STRETCH, span)


def _scales(scene: Scene, rotary: Rotary, position: int, used: int, letter: str) -> bool:
    """Whether a position is wrong by a factor, and not by an offset: told by the other steps, where there are any."""
    own = scene.position
    seen = dict(_of_steps(scene, rotary, letter)) if position == own and used else {}
    if len(seen) > 1:
        first = seen[own]
        by_offset = max(abs((found - at) - (first - own)) for at, found in seen.items())
        by_factor = max(abs(found - at * first / own) for at, found in seen.items())
        return by_factor < min(by_offset, max(abs(found - first) for found in seen.values()))
    if abs(used - position) <= _NEAR or used <= 0 or not position:
        return False
    return used % position == 0 or position % used == 0


def _of_steps(scene: Scene, rotary: Rotary, letter: str) -> Iterator[tuple[int, float]]:
    """Yield each step's position, and the one that the candidate rotated for."""
    for step in sorted({r.step for r in scene.trace.records if r.arm == scene.failure.arm}):
        before, after = (f(scene, scene.failure.arm, letter, step) for f in (unrotated, rotated))
        if before is not None and after is not None and before.shape == after.shape:
            at = scene.position + step - scene.step
            yield at, _position(rotary, before, after, at).value


def _of_base(scene: Scene, rotary: Rotary, position: int, before: Float64, after: Float64) -> Iterator[Prediction]:
    """Fit ln of the base's factor: pair i of n turns by position × frequency × factor^(-i/n)."""
    if not position:
        return
    frequencies = rotary.frequencies_F
    share = np.arange(len(frequencies)) / len(frequencies)
    cross = rotary.cross(before, after)
    rate = float((position * frequencies * share).max(initial=0.0))
    grid = np.linspace(-_LARGEST_BASE, _LARGEST_BASE, int(min(max(rate * 400.0, 512), 100_000)))
    parts = np.array_split(grid, len(grid) // 4096 + 1)
    turns = [position * frequencies * np.exp(-part[:, None] * share) for part in parts]
    scores = np.concatenate([(cross * np.exp(-1j * turn)).real.sum(axis=1) for turn in turns])
    x = float(grid[int(scores.argmax())])
    for _ in range(40):
        turn = position * frequencies * np.exp(-x * share)
        left, slope = cross * np.exp(-1j * turn), -share * turn
        curve = float((left.real * slope**2).sum())
        if curve <= 0.0:
            return
        x += float((left.imag * slope).sum()) / curve
    other = replace(rotary, frequencies_F=frequencies * np.exp(-x * share))
    yield from _turned(scene, "rope_base", {"factor": float(np.exp(x))}, other, before, position, 1)


def _of_pairing(scene: Scene, rotary: Rotary, position: int, before: Float64) -> Iterator[Prediction]:
    halves = not rotary.halves
    out = halves if rotary.halves == rotary.halves_out else rotary.halves_out
    other = replace(rotary, halves=halves, halves_out=out)
    told = {"pairing": "half-split" if halves else "interleaved"}
    yield from _turned(scene, "rope_pairing", told, other, before, position)


def _of_dims(scene: Scene, rotary: Rotary, position: int, before: Float64) -> Iterator[Prediction]:
    for count in range(1, len(rotary.frequencies_F)):
        fewer = np.where(np.arange(len(rotary.frequencies_F)) < count, rotary.frequencies_F, 0.0)
        other = replace(rotary, frequencies_F=fewer)
        yield from _turned(scene, "rope_dims", {"dims": 2 * count}, other, before, position)
