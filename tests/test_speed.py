"""`make bench`: what its ratios are made of, and that CI's quick form fails on a gross regression."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.speed import quick
from benchmarks.speed.figures import Ratio, in_turn


def test_a_machine_that_slows_down_slows_both_sides() -> None:
    clock = iter(range(1, 1000))
    found = in_turn(lambda: float(next(clock)), {"twice": lambda: 2.0 * next(clock)}, 5)["twice"]
    assert found.quotients == (2.0,) * 5


def test_the_first_round_does_not_count() -> None:
    times = iter([9.0, 2.0, 2.0, 2.0])
    assert in_turn(lambda: 1.0, {"x": lambda: next(times)}, 3)["x"].quotients == (2.0, 2.0, 2.0)


def test_a_ratio_is_told_with_its_spread() -> None:
    ratio = Ratio((1.0, 1.1, 1.2, 1.3, 1.4), 0.5)
    assert (ratio.median, str(ratio)) == (1.2, "1.20 (1.10–1.30)")
    assert ratio.as_json()["base_seconds"] == 0.5


def test_ci_fails_on_a_gross_regression_and_not_on_what_is_usual() -> None:
    usual = dict.fromkeys(quick.LIMITS, 0.1)
    assert quick.judge(usual) == []
    for name, limit in quick.LIMITS.items():
        assert quick.judge(usual | {name: 2 * limit}) == [f"{name}: {2 * limit:.2f}, at most {limit:g}"]
        assert quick.judge(usual | {name: float("nan")})
