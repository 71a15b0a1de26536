"""What a hypothesis yields."""

from __future__ import annotations

from dataclasses import dataclass, field

from driftprobe.causes import Parameters
from driftprobe.fingerprint import Float64


@dataclass(frozen=True)
class Prediction:
    """What the candidate's tensor at one tap would be under one cause."""

    cause: str
    parameters: Parameters
    layer: int | None
    tensor: str
    predicted: Float64
    """Same shape as the candidate's tensor."""
    fitted: int = field(default=0)
    """How many real numbers were fitted to the candidate itself; more of them need a better fit."""
