"""Long prompts: a prefill of 32,768 tokens and one decode step with every K and V row hashed, traced ÷ untraced."""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.speed.subject import VOCABULARY, llama
from driftprobe.capture import CaptureOptions, capture
from driftprobe.engines.hf import HFEngine
from driftprobe.plan import Arm, Mode, Pass, Phase, Prompt, Read, make_plan

LENGTHS = (8_192, 32_768)
LAYERS, HIDDEN = 2, 256
"""Small, so that the time goes into rows and not into the model's own attention."""


def measure(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """Return length → seconds of the traced decode step, rows that it hashed, and the process' peak memory in MB."""
    import torch

    torch.set_num_threads(1)
    return {str(length): _measured(length) for length in lengths}


def _measured(length: int) -> dict[str, float]:
    model = llama(layers=LAYERS, hidden=HIDDEN)
    model.config.max_position_embeddings = length + 64
    engine = HFEngine(model)
    ids = tuple((7 * i + 3) % VOCABULARY for i in range(length + 1))
    prompt = Prompt("long", ids[:length])
    plan = make_plan(Mode.AS_DESIGNED, prompt, steps=1, seed=0, max_positions=length + 64)
    arm = Arm("D", (Pass(0, length), Pass(length, length + 1, (Read("D", Phase.DECODE, 0, length),))))
    began: list[float] = []
    listen = engine._listen

    def clocked(*args: Any, **kw: Any) -> Any:
        began.append(time.perf_counter())
        return listen(*args, **kw)

    engine._listen = clocked  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        options = CaptureOptions(payload="none")
        path = capture(replace(plan, arms=(arm,), scores=False), engine, ids, Path(folder), options, lambda _line: None)
        took, size = time.perf_counter() - began[-1], path.stat().st_size
    rows = 2 * LAYERS * (length + 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rows": rows, "decode_seconds": round(took, 4), "us_a_row": round(1e6 * took / rows, 3),
            "trace_mb": round(size / 1e6, 1), "peak_mb": round(peak)}  # fmt: skip
