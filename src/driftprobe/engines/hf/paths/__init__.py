"""Running two callables on one model, any `torch.nn.Module`, and listening to every forward call that they make."""

from __future__ import annotations

from driftprobe.engines.hf.paths.calls import Locate
from driftprobe.engines.hf.paths.engine import Compared, PathEngine, Row

__all__ = ["Compared", "Locate", "PathEngine", "Row"]
