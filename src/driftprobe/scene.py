"""What a hypothesis looks at: the tensors of both sides of one trace, by tap, and the model's constants.

Axes legend: see taps.py. All numbers are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from driftprobe.compare import PayloadSource
from driftprobe.fingerprint import Float64, to_float64
from driftprobe.judgement import Failure, Status, TraceJudgement
from driftprobe.taps import CANDIDATE
from driftprobe.trace import CONSTANTS, Record, Trace

_Place = tuple[str, int, int | None, str]
"""Arm, step, layer, tensor."""


@dataclass(frozen=True)
class Scene:
    """One failure, and all that its trace holds."""

    trace: Trace
    judged: TraceJudgement
    failure: Failure
    payloads: PayloadSource
    _records: dict[_Place, Record] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for record in self.trace.records:
            if record.phase != "prefill_row" and self._here(record):
                self._records.setdefault((record.arm, record.step, record.layer, record.tensor), record)

    @property
    def step(self) -> int:
        """The failing step."""
        return self.failure.step

    @property
    def position(self) -> int:
        """Absolute position of the failing step's token."""
        known = self.failure.position
        return self.trace.header.prompt_len + self.failure.step if known is None else known

    def _here(self, record: Record) -> bool:
        """Whether a record is of the failing position, where one step holds many (mode `paths`)."""
        return self.failure.phase != CANDIDATE or record.logical_tok_idx in (None, self.failure.position)

    def record(self, arm: str, layer: int | None, tensor: str, step: int | None = None) -> Record | None:
        """Return an arm's record of a tap at a step (the failing one), or None."""
        return self._records.get((arm, self.step if step is None else step, layer, tensor))

    def tensor(self, arm: str, layer: int | None, tensor: str, step: int | None = None) -> Float64 | None:
        """Return an arm's whole tensor at a tap, or None where the trace does not hold it."""
        record = self.record(arm, layer, tensor, step)
        array = None if record is None else self.payloads.get(record)
        return None if array is None else to_float64(array)

    def reference(self, layer: int | None, tensor: str, step: int | None = None) -> Float64 | None:
        """Return prefill's tensor (arm P)."""
        return self.tensor("P", layer, tensor, step)

    def candidate(self, layer: int | None, tensor: str, step: int | None = None) -> Float64 | None:
        """Return the tensor of the arm that fails."""
        return self.tensor(self.failure.arm, layer, tensor, step)

    def rows(self, arm: str, layer: int | None, tensor: str) -> dict[int, Float64]:
        """Return an arm's whole tensors at a tap by position, of every position that the trace holds (mode `paths`)."""
        found = {}
        for record in self.trace.records:
            if (record.arm, record.layer, record.tensor) == (arm, layer, tensor):
                array = self.payloads.get(record)
                if array is not None and record.logical_tok_idx is not None:
                    found[record.logical_tok_idx] = to_float64(array)
        return found

    @property
    def positions(self) -> dict[int, Status]:
        """Position -> how the failing tap was judged there (mode `paths`)."""
        where = (self.failure.layer, self.failure.tensor)
        return {
            cell.reference.logical_tok_idx: cell.status
            for cell in self.judged.cells
            if (cell.layer, cell.tensor) == where and cell.reference.logical_tok_idx is not None
        }

    def measured(self, event: str, arm: str) -> dict[int, int]:
        """Return what an event of an arm says by position (mode `paths`); empty without one."""
        found = [e.measured for e in self.trace.events if (e.event, e.arm) == (event, arm)]
        numbers = (found[0] if found else {}).items()  # isdigit() alone holds for "²", which int() refuses
        return {int(p): value for p, value in numbers if p.isascii() and p.isdecimal()}

    @property
    def of_paths(self) -> bool:
        """Whether two paths are compared, a record for every position."""
        return self.failure.phase == CANDIDATE

    def constant(self, layer: int | None, name: str) -> Float64 | None:
        """Return a constant of the model (`q_proj.weight`, `rope.inv_freq`, `attn_norm.eps`), or None."""
        return self.tensor(CONSTANTS, layer, name, 0)
