"""Faults of modules: norms, projections, MLP and experts, the residual stream, logits, state-space layers."""

from __future__ import annotations

from driftprobe.faults.base import Fault

FAULTS: tuple[Fault, ...] = (
    Fault("norm_epsilon", "decode adds 0.01 to the epsilon of every norm", "MISMATCH", "attn_norm", 0,
          "computation", "norm_epsilon", "norms", (0.01,), "added to epsilon"),
)  # fmt: skip
