"""Faults of layers that keep states: state-space models, short convolutions, linear attention."""

from __future__ import annotations

from driftprobe.faults.base import Fault

FAULTS: tuple[Fault, ...] = (
    Fault("conv_window_short", "prefill leaves a convolution state without its oldest input that still counts",
          "MISMATCH", "conv_state", 0, "contents", "conv_window", "state-space", (1.0, 2.0), "inputs",
          min_prompt=4, min_kv_heads=0),
    Fault("state_not_carried", "decode starts from an empty recurrent state", "MISMATCH", "ssm_state", 0, "contents",
          "state_lost", "state-space", min_prompt=2, min_kv_heads=0),
    Fault("state_faded", "decode starts from a recurrent state that has faded", "MISMATCH", "ssm_state", 0, "contents",
          "state_scaled", "state-space", (0.5, 0.9, 0.99), "times the state", min_prompt=3, min_kv_heads=0),
)  # fmt: skip
