"""Hypotheses about attention: positions, heads, scores, and the extent of what is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from driftprobe.hypotheses.base import Prediction
from driftprobe.hypotheses.heads import heads
from driftprobe.hypotheses.positions import rotations
from driftprobe.hypotheses.scores import scores, sinks
from driftprobe.scene import Scene

HYPOTHESES: tuple[Callable[[Scene], Iterator[Prediction]], ...] = (rotations, scores, sinks, heads)
