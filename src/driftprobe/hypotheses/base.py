"""What a hypothesis yields."""

from __future__ import annotations

from dataclasses import dataclass, field

from driftprobe.causes import Parameters
from driftprobe.fingerprint import Float64

MIN_EXPLAINED = 0.99
"""Share of the squared difference that a cause must explain, beside leaving no more than the floor's limit over."""
DECODE, PREFILL = "decode", "prefill"
"""The two sides: the arm that fails, and arm P."""


@dataclass(frozen=True)
class Prediction:
    """What the tensor of the side at fault would be at one tap under one cause."""

    cause: str
    parameters: Parameters
    layer: int | None
    tensor: str
    predicted: Float64
    """Same shape as the captured tensor."""
    fitted: int = field(default=0)
    """How many real numbers were fitted to the tensor itself. One that fits as many as the tensor has elements proves
    nothing by fitting: it is taken only where nothing else fits."""
    side: str = DECODE
    """The side that it is of."""
