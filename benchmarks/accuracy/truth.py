"""How strong a planted fault is: what it changes at each tap, measured against the same arm of the clean model.

This is the truth that detection is scored by; nothing of it reaches the trace or the judgement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from driftprobe.compare import PayloadSource, exact_drift, pair
from driftprobe.fingerprint import UNIT_ROUNDOFF, Array, canonical_bytes
from driftprobe.floor import is_control, is_extension, measure_floors, repeated
from driftprobe.plan import Plan
from driftprobe.trace import EngineFacts, Record, Trace

Place = tuple[str, int, int | None, str]
"""Arm, step, layer, tensor."""
Taps = Mapping[Place, Array]
ARMS = ("P", "D")
"""The two arms whose difference a verdict is about."""


def _is_measured(arm: str) -> bool:
    """Whether an arm's change is a fault's: of the compared two, or of a longer prefill, which P is held against."""
    return arm in ARMS or is_extension(arm)


def run_clean(engine: Any, plan: Plan, tokens: Sequence[int]) -> dict[Place, Array]:
    """Return every tap of arms P, D and E of a model as it is, over a given sequence of tokens."""
    layers = frozenset(layer for where in engine.taps.values() for layer in where)
    found = {}
    for arm in plan.arms:
        if _is_measured(arm.name):
            for item in engine.run(arm, tokens, layers):
                if hasattr(item, "tensor"):
                    found[(item.read.arm, item.read.step, item.layer, item.tensor)] = item.array
    return found


def captured(trace: Trace, payloads: PayloadSource) -> dict[Place, Array]:
    """Return every tap of arms P, D and E of a trace that carries its tensors whole."""
    found = {}
    for record in trace.records:
        array = payloads.get(record) if _is_measured(record.arm) else None
        if array is not None:
            found[_place(record)] = array
    return found


def _place(record: Record) -> Place:
    return record.arm, record.step, record.layer, record.tensor


def changes(clean: Taps, faulty: Taps) -> dict[Place, float]:
    """Return how far each tap of the faulty run is from the clean one's, relative; infinite where shapes differ."""
    found = {}
    for place, array in faulty.items():
        before = clean.get(place)
        if before is None:
            continue
        value = exact_drift(before, array).value if before.shape == array.shape else math.inf
        found[place] = math.inf if value is None else value
    return found


def apart(found: Mapping[Place, float]) -> tuple[dict[Place, float], dict[Place, float]]:
    """Return the changes of P and D, and those of longer prefills where P itself is bit for bit as it was.

    Where P changes too, a longer prefill's change is no difference between the two, and P's own is what decode meets.
    """
    compared = {place: value for place, value in found.items() if place[0] in ARMS}
    longer = {place: value for place, value in found.items()
              if place not in compared and compared.get(("P", *place[1:])) == 0.0}  # fmt: skip
    return compared, longer


def bound(trace: Trace, payloads: PayloadSource, layer: int | None, tensor: str | None) -> float | None:
    """Return the floor that a longer prefill is held to at one tap, relative: what rounding explains without it.

    The floor of P and D would not do: a longer prefill that is not found guilty raises it over its own change.
    """
    noise = {arm for arm in {record.arm for record in trace.records} if is_control(arm) and arm[0] == "N"}
    controls = {arm: pair(trace, repeated(arm), arm, payloads).matched for arm in sorted(noise)}
    floors = measure_floors(trace.header, pair(trace, "P", "D", payloads).matched, controls).bounds
    return next((floor.value for where, floor in floors.items() if where == (layer, tensor)), None)


def same(clean: Taps, run: Taps) -> bool:
    """Whether every tensor of a run is the clean one's, bit for bit (a NaN is itself)."""
    return all(place in clean and _same_bits(clean[place], array) for place, array in run.items())


def _same_bits(left: Array, right: Array) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and canonical_bytes(left) == canonical_bytes(right)


def at(found: Mapping[Place, float], layer: int | None, tensor: str | None) -> float:
    """Return the largest change at one tap, over arms and steps."""
    return max((value for (_, _, where, name), value in found.items() if (where, name) == (layer, tensor)), default=0.0)


def roundoff(facts: EngineFacts) -> float:
    """Return the unit roundoff that a run really has: its dtype's, or that of a coarser cast inside."""
    names = [facts.dtype, *facts.casts.values()]
    return max(UNIT_ROUNDOFF[name] for name in names if name in UNIT_ROUNDOFF)
