"""How far pairs were turned: the estimate finds the position that all pairs agree on."""

from __future__ import annotations

import numpy as np
import pytest

from driftprobe.hypotheses.rotation import Estimate, estimate


def of(position: float, frequencies: list[float], weights: list[float]) -> Estimate:
    """The estimate from pairs that were turned by a position exactly."""
    rate = np.array(frequencies)
    toward = np.array(weights) * np.exp(1j * position * rate)
    return estimate(toward, np.zeros_like(rate), rate, -81.0, 324.0)


@pytest.mark.parametrize("position", [0.0, 16.016, 33.033, 48.0, 65.065, 65.1, 300.3])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 0.2]])
def test_two_pairs_tell_a_position_from_the_one_a_full_turn_on(position: float, weights: list[float]) -> None:
    """A fast pair fits 2π on as well, the slow one only a little less: a grid alone takes the better placed peak."""
    assert of(position, [1.0, 0.01], weights).value == pytest.approx(position, abs=1e-9)


def test_many_pairs_and_one_pair() -> None:
    assert of(65.065, list(10000.0 ** -(np.arange(8) / 8)), [1.0] * 8).value == pytest.approx(65.065, abs=1e-9)
    turns = (of(65.065, [1.0], [1.0]).value - 65.065) / (2 * np.pi)
    assert turns == pytest.approx(round(turns), abs=1e-9)  # one pair cannot tell them apart
