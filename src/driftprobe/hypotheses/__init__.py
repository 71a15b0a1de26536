"""The fault dictionary: each hypothesis says what the failing tensor would be if its fault were there.

A hypothesis reads a scene, and yields one prediction for each set of parameters that it thinks possible. It sees
numbers alone, never names, labels or seeds. `diagnose.py` judges the predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from driftprobe.hypotheses import attention, modules, statespace
from driftprobe.hypotheses.base import Prediction
from driftprobe.scene import Scene

Hypothesis = Callable[[Scene], Iterator[Prediction]]
HYPOTHESES: tuple[Hypothesis, ...] = (*attention.HYPOTHESES, *modules.HYPOTHESES, *statespace.HYPOTHESES)

__all__ = ["HYPOTHESES", "Hypothesis", "Prediction"]
