"""What one measured case comes to: plain data that goes into a line of JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Parameters = Mapping[str, object]
OK, CANNOT_ACT, ERROR = "ok", "cannot act", "error"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What must be found."""

    verdict: str
    layer: int | None = None
    tensor: str | None = None
    reading: str = ""
    cause: str = ""
    parameters: Parameters = field(default_factory=dict)
    family: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What driftprobe said."""

    verdict: str
    reason: str = ""
    layer: int | None = None
    tensor: str | None = None
    reading: str = ""
    cause: str = ""
    parameters: Parameters = field(default_factory=dict)
    detected: bool = False
    """The wanted verdict; for benign and clean runs: MISMATCH."""
    tap_exact: bool = False
    cause_exact: bool = False
    """The wanted cause with every parameter within its tolerance."""
    reading_exact: bool = False


@dataclass(frozen=True, slots=True)
class RuleAnswer:
    """What one of the other rules said."""

    detected: bool
    layer: int | None = None
    tensor: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case, measured."""

    case: str
    status: str
    """`ok`, `cannot act` (the fault or variation changes nothing here, and says why) or `error`."""
    detail: str = ""
    seconds: float = 0.0
    wanted: Wanted | None = None
    black_box: Answer | None = None
    """The ladder off: the run in its own dtype alone."""
    ladder: Answer | None = None
    """With the ladder; None where there is no rung."""
    rules: Mapping[str, RuleAnswer | None] = field(default_factory=dict)
    floors: float | None = None
    """How strong the fault is at the tap where it must show first, in multiples of the run's floor there."""
    change: float | None = None
    """The largest relative change that the fault makes at any tap, at the highest precision there is."""
    roundoff: float | None = None
    """The unit roundoff of that precision, as it was really reached."""
