"""Planted faults: what each breaks and what must be found. How they are planted is each engine's own business.

A fault is a known answer for the probe: the verdict, the first tap, the 2×2 reading, and the root cause with its
parameters. Nothing in the trace says that a fault was planted, except a label that judgement never reads.
"""

from __future__ import annotations

from driftprobe.errors import UsageError
from driftprobe.faults import attention, modules, statespace
from driftprobe.faults.base import Expected, Fault

FAULTS: dict[str, Fault] = {fault.name: fault for fault in (*attention.FAULTS, *modules.FAULTS, *statespace.FAULTS)}

__all__ = ["FAULTS", "Expected", "Fault", "find_fault"]


def find_fault(name: str) -> Fault:
    """Return a fault by name. Raises UsageError for an unknown one."""
    fault = FAULTS.get(name)
    if fault is None:
        raise UsageError(
            "unknown fault", where="--fault", measured=name, allowed=", ".join(FAULTS),
            next_step="`driftprobe faults` says what each one breaks",
        )  # fmt: skip
    return fault
