"""How strong a planted fault is: what it changes at each tap, measured against the same arm of the clean model.

This is the truth that detection is scored by; nothing of it reaches the trace or the judgement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from driftprobe.compare import PayloadSource, exact_drift
from driftprobe.fingerprint import UNIT_ROUNDOFF, Array, canonical_bytes
from driftprobe.plan import Plan
from driftprobe.trace import EngineFacts, Record, Trace

Place = tuple[str, int, int | None, str]
"""Arm, step, layer, tensor."""
Taps = Mapping[Place, Array]
ARMS = ("P", "D")


def run_clean(engine: Any, plan: Plan, tokens: Sequence[int]) -> dict[Place, Array]:
    """Return every tap of arms P and D of a model as it is, over a given sequence of tokens."""
    layers = frozenset(layer for where in engine.taps.values() for layer in where)
    found = {}
    for arm in plan.arms:
        if arm.name in ARMS:
            for item in engine.run(arm, tokens, layers):
                if hasattr(item, "tensor"):
                    found[(item.read.arm, item.read.step, item.layer, item.tensor)] = item.array
    return found


def captured(trace: Trace, payloads: PayloadSource) -> dict[Place, Array]:
    """Return every tap of arms P and D of a trace that carries its tensors whole."""
    found = {}
    for record in trace.records:
        array = payloads.get(record) if record.arm in ARMS else None
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
