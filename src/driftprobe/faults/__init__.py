"""Planted faults: what each breaks and what must be found. How they are planted is each engine's own business.

A fault is a known answer for the probe: the verdict, the first tap, the 2×2 reading, and the root cause with its
parameters. Nothing in the trace says that a fault was planted, except a label that judgement never reads.
"""

from __future__ import annotations

from difflib import get_close_matches

from driftprobe.errors import UsageError
from driftprobe.faults import attention, cache, modules, statespace
from driftprobe.faults.base import Expected, Fault

FAULTS: dict[str, Fault] = {
    fault.name: fault for fault in (*attention.FAULTS, *cache.FAULTS, *modules.FAULTS, *statespace.FAULTS)
}

__all__ = ["FAULTS", "Expected", "Fault", "find_fault"]


def find_fault(name: str) -> Fault:
    """Return a fault by name. Raises UsageError for an unknown one."""
    fault = FAULTS.get(name)
    if fault is None:
        raise UsageError(
            "unknown fault", where="--fault", measured=name, allowed=_likely(name),
            next_step="`driftprobe faults` says what each one breaks",
        )  # fmt: skip
    return fault


def _likely(name: str) -> str:
    """Return the names that were most likely meant, or how many there are."""
    likely = get_close_matches(name, FAULTS, n=4, cutoff=0.5)
    return ", ".join(likely) + "?" if likely else f"one of {len(FAULTS)} names"
