"""The noise floor: what arithmetic alone does at each tap of this run, measured from the control arms.

The controls are P' and D' (the same run again), E1..Em (the same token in a longer prefill) and, where the engine can
perturb itself, N1..N2 (every op's result off by a rounding error). The floor is never below a small multiple of the
unit roundoff of the coarsest dtype on the path. See docs/how-it-decides.md and docs/decisions/0002-noise-arms.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from driftprobe.compare import Pair
from driftprobe.fingerprint import CAST_ROUNDOFF, UNIT_ROUNDOFF
from driftprobe.taps import BY_NAME, Scope, execution_order, place
from driftprobe.trace import EngineFacts, Header

LIMIT = 4.0
"""Excess above which a drift is not arithmetic (docs/decisions/0003-limit.md says what was measured)."""
BOUND_WITH_NOISE = 2.0
"""Unit roundoffs that a floor has at least, where arms N have measured what rounding does."""
BOUND_WITHOUT_NOISE = 8.0
"""The same where they have not; grows with √(1 + layer), as independent roundings add up."""
SUM_BOUND = 32.0
"""Beside it, unit roundoffs of the dtype that sums are kept in: float32, or the model's own where that is finer."""
UNRELATED = math.sqrt(2.0)
"""Drift of two tensors of one size that have nothing to do with each other; the floor where LIMIT floors are 1 or more.

Rounding that may change a tensor by its whole size (an fp8 cache without a scale, layers on) leaves nothing to expect
of it: multiples of a small error's size no longer hold.
"""
NEIGHBOURS = 1
"""Layers on either side whose controls count too, so that one lucky zero makes no floor of zero."""
UNKNOWN_DTYPE = "bfloat16"
"""Assumed where a trace does not say its dtype: the coarsest that engines commonly compute in."""

Place = tuple[int | None, str]
Controls = dict[str, tuple[Pair, ...]]
"""Control arm -> its pairs with the arm that it repeats, extends or perturbs."""
_NOISE = re.compile("N[0-9]+")
_EXTENSION = re.compile("E[0-9]+")


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
    """Floors of one trace, by tap; `bounds` is what rounding explains without the controls that could be faulty."""

    by_place: dict[Place, Floor]
    bounds: dict[Place, Floor]


@dataclass(frozen=True, slots=True)
class _Coarsest:
    """The dtype with the largest unit roundoff on the path, and where it comes in if that is not everywhere."""

    dtype: str
    origin: str = ""

    def __str__(self) -> str:
        return self.dtype + (f" ({self.origin})" if self.origin else "")


def _coarsest_by_place(
    facts: EngineFacts, recorded: dict[Place, set[str]], ranks: dict[Place, int | None]
) -> dict[Place, _Coarsest]:
    """Return the coarsest dtype on the path to each place: the model's, a cast's or a recorded tensor's before it.

    A cast whose name is a tap's comes in at that tap (`k_cache`); any other is everywhere (`matmul`).
    """
    everywhere = [dtype for name, dtype in facts.casts.items() if name not in BY_NAME]
    now, found = _coarser(None, (facts.dtype, *everywhere), ""), {}
    for where in sorted(recorded, key=lambda p: execution_order(p[0], p[1], ranks.get(p))):
        now = _coarser(now, (facts.casts.get(where[1], ""),), f"cast at {place(*where)}")
        now = _coarser(now, sorted(recorded[where] & UNIT_ROUNDOFF.keys()), f"recorded at {place(*where)}")
        found[where] = now or _Coarsest(UNKNOWN_DTYPE, "assumed")
    return found


def _coarser(now: _Coarsest | None, dtypes: Iterable[str], origin: str) -> _Coarsest | None:
    for dtype in dtypes:
        if dtype in CAST_ROUNDOFF and (now is None or CAST_ROUNDOFF[dtype] > CAST_ROUNDOFF[now.dtype]):
            now = _Coarsest(dtype, origin if now is not None else "")
    return now


def measure_floors(
    header: Header, pairs: Iterable[Pair], controls: Controls, guilty: frozenset[str] = frozenset()
) -> Floors:
    """Return the floor at every place of `pairs` (decode's, arm A's), from the control pairs of each arm.

    Arms N raise `bounds` and with them the floor. An arm that rounding cannot explain by those bounds raises nothing:
    it may have the very fault that is looked for. `innocent` tells which pairs those are; nor do arms known to be
    `guilty`.
    """
    everything = (*pairs, *(pair for found in controls.values() for pair in found))
    recorded = _recorded_dtypes(everything)
    ranks = {(pair.reference.layer, pair.reference.tensor): pair.reference.order for pair in everything}
    noise = {arm: found for arm, found in controls.items() if _NOISE.fullmatch(arm)}
    layers = max(header.engine.layers, *(1 + layer for layer, _ in recorded if layer is not None), 0)
    coarsest = _coarsest_by_place(header.engine, recorded, ranks)
    bounds = {where: _roundoff(where, dtype, layers, bool(noise)) for where, dtype in coarsest.items()}
    bounds = _told(_raise(bounds, noise, coarsest))
    alone = Floors(bounds, bounds)
    others = {
        arm: found
        for arm, found in controls.items()
        if arm not in noise and arm not in guilty and all(innocent(pair, alone) for pair in found)
    }
    return Floors(_told(_raise(bounds, others, coarsest)), bounds)


def _told(floors: dict[Place, Floor]) -> dict[Place, Floor]:
    """Return floors with UNRELATED where rounding may change the whole tensor."""
    return {
        where: Floor(UNRELATED, f"unrelated tensors ({floor.source})")
        if 1.0 <= floor.limit < LIMIT * UNRELATED
        else floor
        for where, floor in floors.items()
    }


def is_extension(arm: str) -> bool:
    """Whether an arm is one of E1..Em: only shapes differ from P's."""
    return _EXTENSION.fullmatch(arm) is not None


def is_turned(arm: str) -> bool:
    """Whether an arm is another run of P or D with a knob of the engine turned: `P@chunks`, `D@threads`."""
    return arm[:2] in {"P@", "D@"}


def repeated(arm: str) -> str:
    """Return the arm that a control is compared with: P' and P@chunks repeat P, the others differ from P by design."""
    return arm[0] if arm.endswith("'") or is_turned(arm) else "P"


def is_control(arm: str) -> bool:
    """Whether an arm is a repetition, an extension, a turned knob or a noise arm."""
    return arm.endswith("'") or is_turned(arm) or is_extension(arm) or _NOISE.fullmatch(arm) is not None


def innocent(pair: Pair, floors: Floors) -> bool:
    """Whether rounding explains a control pair's drift, by the bound that does not lean on that control.

    A drift that cannot be told is not held against its arm.
    """
    bound = floors.bounds.get((pair.reference.layer, pair.reference.tensor))
    drift = pair.drift.at_least
    return bound is None or drift is None or drift <= bound.limit


def _recorded_dtypes(pairs: Iterable[Pair]) -> dict[Place, set[str]]:
    recorded: dict[Place, set[str]] = {}
    for pair in pairs:
        dtypes = {record.dtype for record in (pair.reference, pair.candidate) if record.dtype is not None}
        recorded.setdefault((pair.reference.layer, pair.reference.tensor), set()).update(dtypes)
    return recorded


def _roundoff(where: Place, coarsest: _Coarsest, layers: int, noise_measured: bool) -> Floor:
    depth = _depth(where, layers)
    multiple = BOUND_WITH_NOISE if noise_measured else multiple_without_noise(coarsest.dtype, depth)
    return Floor(multiple * CAST_ROUNDOFF[coarsest.dtype], f"{multiple:.3g} u of {coarsest}")


def multiple_without_noise(dtype: str, depth: int) -> float:
    """Return the bound in unit roundoffs of a dtype, `depth` layers in, where no arm N has measured it."""
    sums = min(1.0, UNIT_ROUNDOFF["float32"] / CAST_ROUNDOFF[dtype])
    return (BOUND_WITHOUT_NOISE + SUM_BOUND * sums) * math.sqrt(1 + depth)


def _depth(where: Place, layers: int) -> int:
    layer, tensor = where
    if layer is not None:
        return layer
    tap = BY_NAME.get(tensor)
    return 0 if tap is not None and tap.scope is Scope.INPUT else layers


def _raise(floors: dict[Place, Floor], controls: Controls, coarsest: dict[Place, _Coarsest]) -> dict[Place, Floor]:
    """Return floors raised to the largest finite control drift at each place and its neighbouring layers.

    A neighbour behind a cast that a place is before tells nothing of it: its drift is that of a coarser dtype.
    """
    raised = dict(floors)
    unit = {where: CAST_ROUNDOFF[found.dtype] for where, found in coarsest.items()}
    for arm, pairs in controls.items():
        for item in pairs:
            drift, here = item.drift.at_least, (item.reference.layer, item.reference.tensor)
            if drift is None or not math.isfinite(drift):
                continue
            for where in _around(*here):
                if where in raised and unit[here] <= unit[where] and drift > raised[where].value:
                    raised[where] = Floor(drift, f"arm {arm}")
    return raised


def _around(layer: int | None, tensor: str) -> list[Place]:
    if layer is None:
        return [(None, tensor)]
    return [(layer + offset, tensor) for offset in range(-NEIGHBOURS, NEIGHBOURS + 1)]
