"""What a self-test found: one trial a family of faults, and the detection limit of every tap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from driftprobe.judgement import TraceJudgement, Verdict
from driftprobe.taps import execution_order, place


@dataclass(frozen=True, slots=True)
class Trial:
    """One family of faults, and the fault of it that was planted."""

    family: str
    fault: str = ""
    """Empty where no fault of the family can act in this model or at this prompt."""
    strength: float | None = None
    """The smallest of the fault's strengths that the probe saw; None where it has none."""
    unit: str = ""
    verdict: str = ""
    fired: bool = False
    """Whether the verdict is the fault's own, at this strength."""
    found_at: str = ""
    expected_at: str = ""
    excess: float | None = None
    """Drift over floor at the first failure."""
    cause: str = ""
    """The cause that was named, or empty."""
    expected_cause: str = ""
    cause_agrees: bool = False
    reason: str = ""
    """Why no fault of the family can act; or why the probe did not fire."""

    @property
    def acted(self) -> bool:
        """Whether a fault of the family was in the model at all."""
        return bool(self.fault)

    @property
    def located(self) -> bool:
        """Whether the first failure is where the fault shows first."""
        return self.fired and self.found_at == self.expected_at


@dataclass(frozen=True, slots=True)
class TapLimit:
    """The smallest relative error that the clean run could have told from rounding at one tap."""

    layer: int | None
    tensor: str
    limit: float
    """LIMIT × floor in the run itself."""
    set_by: str
    """What set the floor."""
    rung: float | None = None
    """The same at the top rung of the ladder; None where it was not climbed."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The clean run, the trials, and the limits."""

    model: str
    dtype: str
    clean: Verdict
    clean_reason: str
    trials: tuple[Trial, ...]
    limits: tuple[TapLimit, ...]

    @property
    def passed(self) -> bool:
        """Whether the clean run is no MISMATCH and no N/A, and the probe fired for every family that can act."""
        acted = [trial for trial in self.trials if trial.acted]
        healthy = self.clean in (Verdict.NO_DRIFT, Verdict.STRUCTURAL_DRIFT)
        return healthy and bool(acted) and all(trial.fired for trial in acted)

    @property
    def by_tap(self) -> dict[str, tuple[TapLimit, TapLimit]]:
        """Tap -> its smallest and its largest limit over the layers, in order of execution."""
        found: dict[str, list[TapLimit]] = {}
        for limit in sorted(
            self.limits, key=lambda item: execution_order(0 if item.layer else item.layer, item.tensor)
        ):
            found.setdefault(limit.tensor, []).append(limit)
        return {tap: (min(all_, key=_size), max(all_, key=_size)) for tap, all_ in found.items()}


def _size(limit: TapLimit) -> float:
    return limit.limit


def limits_of(judged: Iterable[TraceJudgement]) -> tuple[TapLimit, ...]:
    """Return each tap's limit, the largest over prompts and steps; at the rung too where it was climbed."""
    found: dict[tuple[int | None, str], TapLimit] = {}
    rungs: dict[tuple[int | None, str], float] = {}
    for item in judged:
        for cell in item.ladder.judged.cells if item.ladder is not None else ():
            at = (cell.layer, cell.tensor)
            rungs[at] = max(rungs.get(at, 0.0), cell.floor.limit)
        for cell in item.cells:
            at = (cell.layer, cell.tensor)
            if cell.tensor != "embed" and (at not in found or cell.floor.limit > found[at].limit):
                found[at] = TapLimit(*at, cell.floor.limit, cell.floor.source)
    return tuple(
        TapLimit(limit.layer, limit.tensor, limit.limit, limit.set_by, rungs.get(at))
        for at, limit in sorted(found.items(), key=lambda pair: execution_order(*pair[0]))
    )


def where(layer: int | None, tensor: str | None) -> str:
    """Return a tap in words, or `none`."""
    return "none" if tensor is None else place(layer, tensor)
