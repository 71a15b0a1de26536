"""Hypotheses about modules: norms, projections, MLP and experts, the residual stream, logits, state-space layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from driftprobe.hypotheses.base import Prediction
from driftprobe.scene import Scene

HYPOTHESES: tuple[Callable[[Scene], Iterator[Prediction]], ...] = ()
