"""Runs a model with a planted fault and returns what must be found beside what was found."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from driftprobe.api import Result, RunOptions, run
from driftprobe.engines.hf import HFEngine
from driftprobe.faults import Expected
from driftprobe.judgement import TraceJudgement
from driftprobe.plan import Mode, Prompt


def with_fault(
    model: Any, fault: str, ids: list[int], *, strength: float | None = None, steps: int = 1, mode: str = "kv_aligned"
) -> tuple[Expected, TraceJudgement, Result]:
    """Run one prompt in one mode with a fault in the model; nothing in the trace says so."""
    engine = HFEngine(model)
    with tempfile.TemporaryDirectory() as folder, engine.plant(fault, strength) as expected:
        options = RunOptions(modes=(Mode(mode),), steps=steps)
        result = run(engine, [Prompt("p", tuple(ids))], options, Path(folder) / "run")
    return expected, result.judgement.modes[mode].prompts[0], result
