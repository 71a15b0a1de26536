"""Runs a model with a planted fault and returns what must be found beside what was found."""

from __future__ import annotations

import atexit
import tempfile
from pathlib import Path
from typing import Any

from driftprobe.api import run
from driftprobe.engines.hf import HFEngine
from driftprobe.faults import Expected
from driftprobe.judgement import TraceJudgement
from driftprobe.options import RunOptions
from driftprobe.plan import Mode, Prompt
from driftprobe.result import Result


def with_fault(
    model: Any, fault: str, ids: list[int], *, strength: float | None = None, steps: int = 1, mode: str = "kv_aligned",
    ladder: str = "off", keep: bool = False,
) -> tuple[Expected, TraceJudgement, Result]:  # fmt: skip
    """Run one prompt in one mode with a fault in the model; nothing in the trace says so.

    The traces are gone when this returns, or with `keep` when the tests end.
    """
    engine, folder = HFEngine(model), tempfile.TemporaryDirectory()
    try:
        with engine.plant(fault, strength) as expected:
            options = RunOptions(modes=(Mode(mode),), steps=steps, ladder=ladder)
            result = run(engine, [Prompt("p", tuple(ids))], options, Path(folder.name) / "run")
    finally:
        atexit.register(folder.cleanup) if keep else folder.cleanup()
    return expected, result.judgement.modes[mode].prompts[0], result
