"""Ratios of interleaved repetitions: what they are made of, and how they are told."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ratio:
    """One time over another, measured in turn; each repetition gives one quotient."""

    quotients: tuple[float, ...]
    seconds: float
    """Median time of what stands below the line."""

    @property
    def median(self) -> float:
        """The middle quotient."""
        return statistics.median(self.quotients)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and the last quartile of the quotients; the least and the largest of fewer than four."""
        if len(self.quotients) < 4:
            return min(self.quotients), max(self.quotients)
        low, _, high = statistics.quantiles(self.quotients, n=4, method="inclusive")
        return low, high

    def __str__(self) -> str:
        low, high = self.spread
        return f"{self.median:.2f} ({low:.2f}–{high:.2f})"

    def as_json(self) -> dict[str, object]:
        """Return it as JSON keeps it."""
        low, high = self.spread
        return {"median": round(self.median, 4), "low": round(low, 4), "high": round(high, 4),
                "repetitions": len(self.quotients), "base_seconds": round(self.seconds, 6)}  # fmt: skip


def in_turn(base: Callable[[], float], others: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, Ratio]:
    """Return each other's time over the base's: one round runs all of them once, and the first round does not count.

    The base runs before and after each of the others, so that a machine that slows down slows both.
    """
    quotients: dict[str, list[float]] = {name: [] for name in others}
    bases: list[float] = []
    for round_ in range(repetitions + 1):
        before = base()
        for name, work in others.items():
            seconds = work()
            after = base()
            if round_:
                quotients[name].append(2 * seconds / (before + after))
                bases.append(after)
            before = after
    return {name: Ratio(tuple(found), statistics.median(bases)) for name, found in quotients.items()}


def row(cells: Sequence[object]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"
