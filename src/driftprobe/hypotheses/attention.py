"""Hypotheses about attention: positions, the cache, its extent, heads and scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from driftprobe.hypotheses.base import Prediction
from driftprobe.scene import Scene

HYPOTHESES: tuple[Callable[[Scene], Iterator[Prediction]], ...] = ()
