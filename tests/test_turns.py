"""Small faults of a rotation: another base, a stretched position, in layers whose inputs are equal and where not."""

from __future__ import annotations

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


def turned(x: Float64, angle: Float64, pairing: str, *, coarse: bool = False) -> Float64:
    half = DIM // 2
    first, second = (
        (slice(0, half), slice(half, None)) if pairing == "halves" else (slice(0, None, 2), slice(1, None, 2))
    )
    y, kept = x.copy(), BF16 if coarse else np.float64
    cos, sin = (np.asarray(f(angle), dtype=kept).astype(np.float64) for f in (np.cos, np.sin))
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


def laid_out(
    angle: Float64, pairing: str, noise: float, *, fits: bool = True, layers: int = 3, position: int = POSITION,
    coarse: bool = False,
) -> tuple[Bench, list[Any]]:  # fmt: skip
    """Return a bench of layers, the other side rotated by `angle`, its input off by `noise`, relatively.

    With `coarse` the other side's cosines and sines are kept in bfloat16.
    """
    rng = np.random.default_rng(7)
    arrays: dict[int, Array] = {}
    constants: dict[tuple[int | None, str], Any] = {}
    pairs = {}

    def kept(layer: int, name: str, p: Float64, d: Float64) -> Iterator[tuple[tuple[int, int, str], Any]]:
        both = [v.astype(BF16) for v in (p, d)]
        where = {"step": 0, "layer": layer, "tensor": name, "logical_tok_idx": position, "pos_id": position}
        records = [SimpleNamespace(dtype="bfloat16", **where) for _ in both]
        arrays.update({id(record): array for record, array in zip(records, both, strict=True)})
        drift = SimpleNamespace(equal=bool((both[0] == both[1]).all()))
        yield (0, layer, name), SimpleNamespace(reference=records[0], candidate=records[1], drift=drift)

    for layer in range(layers):
        x = rng.standard_normal((1, HEADS, DIM)).astype(BF16).astype(np.float64)
        other = (x * (1 + noise * rng.standard_normal(x.shape))).astype(BF16).astype(np.float64)
        plain = turned(x, position * frequencies(), pairing)
        pairs.update(kept(layer, "q_proj", x, other))
        pairs.update(kept(layer, "q_rope", plain if fits else 2 * plain, turned(other, angle, pairing, coarse=coarse)))
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


@pytest.mark.parametrize(("turn", "found"), [(0.9, False), (1.3, True)])
def test_a_turn_under_a_roundoff_is_none_however_clear(turn, found):
    """Many heads and layers, the fastest pair turned by less than, or more than, one roundoff."""
    stretched = POSITION * frequencies() * (1 + turn * 2.0**-8 / POSITION)
    on, pairs = laid_out(stretched, "halves", 0.0, layers=24)
    assert bool(match_filters(pairs, on)) is found


@pytest.mark.parametrize("position", [7, 23, 40])
def test_cosines_kept_more_coarsely_on_one_side_are_no_fault(position):
    """A kernel with tables in float32 against one with tables in bfloat16: each pair is off in all heads and layers."""
    for pairing in ("halves", "neighbours"):
        on, pairs = laid_out(position * frequencies(), pairing, 0.0, layers=24, position=position, coarse=True)
        assert not match_filters(pairs, on)


def test_of_two_pairings_prefills_own_is_taken():
    """Each pairing's turn can look like one of the other's, with another sign."""
    on, pairs = laid_out(POSITION * frequencies() * 1.002, "neighbours", 0.0)
    (match,) = match_filters(pairs, on)
    assert match.parameters["factor"] == pytest.approx(1.002, rel=3 * match.error)
