"""Plants faults of modules: norms, projections, MLP and experts, the residual stream, logits."""

from __future__ import annotations

from driftprobe.engines.hf.planting import experts, logits, mlp, norms, projections, residual
from driftprobe.engines.hf.planting.base import Planter

PLANTERS: dict[str, Planter] = {
    **norms.PLANTERS,
    **projections.PLANTERS,
    **mlp.PLANTERS,
    **experts.PLANTERS,
    **residual.PLANTERS,
    **logits.PLANTERS,
}
