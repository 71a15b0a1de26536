"""What a fault declares, and what must be found where it was planted."""

from __future__ import annotations

from dataclasses import dataclass, field

from driftprobe.causes import Parameters


@dataclass(frozen=True, slots=True)
class Fault:
    """One planted fault and what must be found in `kv_aligned` mode."""

    name: str
    breaks: str
    verdict: str
    """`MISMATCH`, or `N/A` where the two sides are no longer the same experiment."""
    tensor: str | None
    """Tap of the first failure in a plain decoder with RoPE; None where there is none to name."""
    layer: int | None
    """Layer of the first failure."""
    reading: str
    """The 2×2 reading of D and A: `contents`, `computation`, or `none`."""
    cause: str = ""
    """The root cause that must be named, of `causes.CAUSES`."""
    family: str = ""
    strengths: tuple[float, ...] = (1.0,)
    """How strong it can be planted, gross to subtle; the first is the default. 1.0 alone: it is there or it is not."""
    unit: str = ""
    """What a strength is: `times the scale`, `added to epsilon`, `bits`."""
    min_prompt: int = 1
    """Tokens that a prompt must have for the fault to change anything."""
    min_layers: int = 1
    min_kv_heads: int = 1
    sample: int = 6
    """Tokens of the short run that must show whether it changes anything."""
    beyond_window: bool = False
    """Whether it acts only on a text longer than the model's sliding window."""
    side: str = "decode"
    """The side that is broken: `decode`, or `prefill`."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be found where a fault was planted in one model: known to the planter, never to the trace."""

    layer: int | None
    tensor: str | None
    """The first tap, of those that this model has."""
    reading: str
    cause: str
    parameters: Parameters = field(default_factory=dict)
    """By the words of `causes.CAUSES`. What depends on the prompt (a row's number) is
    filled in while it runs: read it afterwards, and run one prompt at a time."""
