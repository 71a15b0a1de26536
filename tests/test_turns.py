"""Small faults of a rotation: another base, a stretched position, in layers whose inputs are equal and where not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from driftprobe.fingerprint import Array, Float64
from driftprobe.local import Bench
from driftprobe.matched import MIN_Z, match_filters
from driftprobe.trace import EngineFacts

BF16 = np.dtype(ml_dtypes.bfloat16)
POSITION, HEADS, DIM, BASE = 40, 8, 32, 10_000.0


def frequencies(base: float = BASE) -> Float64:
    return np.asarray(base ** (-np.arange(DIM // 2) / (DIM // 2)))


def turned(x: Float64, angle: Float64, pairing: str) -> Float64:
    half = DIM // 2
    first, second = (
        (slice(0, half), slice(half, None)) if pairing == "halves" else (slice(0, None, 2), slice(1, None, 2))
    )
    y = x.copy()
    y[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    y[..., second] = x[..., second] * np.cos(angle) + x[..., first] * np.sin(angle)
    return y


def laid_out(angle: Float64, pairing: str, noise: float, fits: bool = True) -> tuple[Bench, list[Any]]:
    """Return a bench of three layers, the other side rotated by `angle`, its input off by `noise`, relatively."""
    rng = np.random.default_rng(7)
    arrays: dict[int, Array] = {}
    constants: dict[tuple[int | None, str], Any] = {}
    pairs = {}

    def kept(layer: int, name: str, p: Float64, d: Float64) -> Iterator[tuple[tuple[int, int, str], Any]]:
        both = [v.astype(BF16) for v in (p, d)]
        records = [SimpleNamespace(step=0, layer=layer, tensor=name, dtype="bfloat16", logical_tok_idx=POSITION)
                   for _ in both]  # fmt: skip
        arrays.update({id(record): array for record, array in zip(records, both, strict=True)})
        drift = SimpleNamespace(equal=bool((both[0] == both[1]).all()))
        yield (0, layer, name), SimpleNamespace(reference=records[0], candidate=records[1], drift=drift)

    for layer in range(3):
        x = rng.standard_normal((1, HEADS, DIM)).astype(BF16).astype(np.float64)
        other = (x * (1 + noise * rng.standard_normal(x.shape))).astype(BF16).astype(np.float64)
        plain = turned(x, POSITION * frequencies(), pairing)
        pairs.update(kept(layer, "q_proj", x, other))
        pairs.update(kept(layer, "q_rope", plain if fits else 2 * plain, turned(other, angle, pairing)))
        constants[(layer, "rope.inv_freq")] = record = SimpleNamespace()
        arrays[id(record)] = frequencies()
    facts = EngineFacts(name="toy", dtype="bfloat16", accumulate="float32")
    payloads = SimpleNamespace(get=lambda record: arrays[id(record)])
    return Bench(facts, pairs, payloads, constants), list(pairs.values())  # type: ignore[arg-type]


@pytest.mark.parametrize("pairing", ["halves", "neighbours"])
@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize(("cause", "factor"), [("rope_base", 1.02), ("rope_scaling", 1.002)])
def test_a_small_fault_is_found_and_named_whether_the_inputs_agree_or_not(cause, factor, noise, pairing):
    base = frequencies(BASE * factor) if cause == "rope_base" else frequencies() * factor
    on, pairs = laid_out(POSITION * base, pairing, noise)
    (match,) = match_filters(pairs, on)
    assert (match.tensor, match.layer, match.cause) == ("q_rope", 0, cause)
    assert match.parameters["factor"] == pytest.approx(factor, rel=3 * match.error)
    assert abs(match.z) > MIN_Z
    assert match.error == pytest.approx(abs(match.share / match.z))


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_rounding_is_no_turn(noise):
    on, pairs = laid_out(POSITION * frequencies(), "halves", noise)
    assert not match_filters(pairs, on)


def test_inputs_that_differ_tell_nothing_where_the_result_is_not_its_input_turned():
    on, pairs = laid_out(POSITION * frequencies(BASE * 1.02), "halves", 0.01, fits=False)
    assert not match_filters(pairs, on)


def test_a_turn_under_a_quarter_of_a_roundoff_is_none():
    """Clear it may be: many elements, each turned by less than a kernel's own habit of rounding."""
    on, pairs = laid_out(POSITION * frequencies() * (1 + 0.2 * 2.0**-8 / POSITION), "halves", 0.0)
    assert not match_filters(pairs, on)
    assert math.isclose(frequencies()[0], 1.0)
