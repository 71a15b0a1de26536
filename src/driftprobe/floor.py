"""The noise floor: what arithmetic alone does at each tap of this run, measured from the control arms.

The controls are P' and D' (the same run again), E1..Em (the same token in a longer prefill) and, where the engine can
perturb itself, N1..N2 (every op's result off by a rounding error). The floor is never below a small multiple of the
unit roundoff of the coarsest dtype on the path. See docs/how-it-decides.md and docs/decisions/0002-noise-arms.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from driftprobe.compare import Pair
from driftprobe.fingerprint import UNIT_ROUNDOFF
from driftprobe.taps import BY_NAME, Scope
from driftprobe.trace import EngineFacts, Header

LIMIT = 4.0
"""Excess above which a drift is not arithmetic (docs/decisions/0003-limit.md says what was measured)."""
BOUND_WITH_NOISE = 2.0
"""Unit roundoffs that a floor has at least, where arms N have measured what rounding does."""
BOUND_WITHOUT_NOISE = 8.0
"""The same where they have not; grows with √(1 + layer), as independent roundings add up."""
NEIGHBOURS = 1
"""Layers on either side whose controls count too, so that one lucky zero makes no floor of zero."""
UNKNOWN_DTYPE = "bfloat16"
"""Assumed where a trace does not say its dtype: the coarsest that engines commonly compute in."""

Place = tuple[int | None, str]


@dataclass(frozen=True, slots=True)
class Floor:
    """The largest drift that arithmetic explains at one tap, and what set it."""

    value: float
    source: str
    """`arm N1`, `arm E31`, … or `2 u of float32`."""

    @property
    def limit(self) -> float:
        """The drift above which this tap fails: the detection limit here, as a relative error."""
        return LIMIT * self.value


@dataclass(frozen=True, slots=True)
class Floors:
    """Floors of one trace, by tap; `bound` is what rounding explains without the controls that could be faulty."""

    by_place: dict[Place, Floor]
    bounds: dict[Place, Floor]


def coarsest_dtype(facts: EngineFacts, records_dtype: str | None) -> str:
    """Return the dtype with the largest unit roundoff on the path: the model's, or a declared cast's."""
    known = [d for d in (facts.dtype, records_dtype, *facts.casts.values()) if d in UNIT_ROUNDOFF]
    return max(known, key=lambda dtype: UNIT_ROUNDOFF[dtype]) if known else UNKNOWN_DTYPE


def measure_floors(header: Header, places: Iterable[Place], controls: dict[str, tuple[Pair, ...]]) -> Floors:
    """Return the floor at every place from the control pairs of each arm (P or D against arm).

    A control that rounding cannot explain (arms E beyond `bounds`) raises no floor; `innocent` tells which those are.
    """
    noise = {arm: pairs for arm, pairs in controls.items() if arm.startswith("N")}
    others = {arm: pairs for arm, pairs in controls.items() if not arm.startswith("N")}
    at_places = tuple(places)
    bounds = {place: _roundoff(header, place, bool(noise)) for place in at_places}
    bounds = _raise(bounds, noise)
    return Floors(_raise(bounds, others, ceilings=bounds), bounds)


def innocent(pair: Pair, floors: Floors) -> bool:
    """Whether rounding explains a control pair's drift, by the bound that does not lean on that control."""
    place = (pair.reference.layer, pair.reference.tensor)
    bound = floors.bounds.get(place)
    return bound is None or pair.drift.value is None or pair.drift.value <= bound.limit


def _roundoff(header: Header, place: Place, noise_measured: bool) -> Floor:
    dtype = coarsest_dtype(header.engine, None)
    if noise_measured:
        multiple = BOUND_WITH_NOISE
    else:
        layer = place[0] if place[0] is not None else _depth(header, place[1])
        multiple = BOUND_WITHOUT_NOISE * math.sqrt(1 + layer)
    return Floor(multiple * UNIT_ROUNDOFF[dtype], f"{multiple:.3g} u of {dtype}")


def _depth(header: Header, tensor: str) -> int:
    tap = BY_NAME.get(tensor)
    return 0 if tap is None or tap.scope is Scope.INPUT else header.engine.layers


def _raise(
    floors: dict[Place, Floor], controls: dict[str, tuple[Pair, ...]], ceilings: dict[Place, Floor] | None = None
) -> dict[Place, Floor]:
    """Return floors raised to the largest control drift at each place and its neighbouring layers."""
    raised = dict(floors)
    for arm, pairs in controls.items():
        for item in pairs:
            layer, tensor = item.reference.layer, item.reference.tensor
            drift = item.drift.value
            ceiling = ceilings.get((layer, tensor)) if ceilings else None
            if drift is None or not math.isfinite(drift) or (ceiling is not None and drift > ceiling.limit):
                continue
            for place in _around(layer, tensor):
                if place in raised and drift > raised[place].value:
                    raised[place] = Floor(drift, f"arm {arm}")
    return raised


def _around(layer: int | None, tensor: str) -> list[Place]:
    if layer is None:
        return [(None, tensor)]
    return [(layer + offset, tensor) for offset in range(-NEIGHBOURS, NEIGHBOURS + 1)]
