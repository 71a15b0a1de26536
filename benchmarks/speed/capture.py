"""Capture, traced ÷ untraced: driftprobe's own arms, through its own engine and writer, onto the disk.

The prefill's time is that of a whole capture of one arm: hooks put in and taken out, header, records, footer. The
decode step's runs from the call that is listened to until its records are on the disk.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.speed.figures import Ratio, in_turn
from benchmarks.speed.subject import IDS, TOKENS, Bare
from driftprobe.capture import CaptureOptions, capture
from driftprobe.engines.hf import HFEngine
from driftprobe.plan import Arm, Mode, Pass, Phase, Plan, Prompt, Read, make_plan

_PREFILL = Arm("P", (Pass(0, TOKENS, (Read("P", Phase.PREFILL_LAST, 0, TOKENS - 1),)),))
_DECODE = Arm("D", (Pass(0, TOKENS), Pass(TOKENS, TOKENS + 1, (Read("D", Phase.DECODE, 0, TOKENS),))))


class _Clocked(HFEngine):
    """Notes when the last call that is listened to began."""

    began = 0.0

    def _listen(self, *args: Any, **kw: Any) -> Any:
        self.began = time.perf_counter()
        return super()._listen(*args, **kw)


class Traced:
    """The same model under driftprobe."""

    def __init__(self, model: Any, *, scores: bool) -> None:
        self.engine = _Clocked(model)
        prompt = Prompt("p", IDS[:TOKENS])
        plan = make_plan(Mode.AS_DESIGNED, prompt, steps=1, seed=0, max_positions=self.engine.facts.max_positions)
        self.plan = replace(plan, scores=scores)

    def prefill(self) -> float:
        """Return the seconds of a captured prefill."""
        started = time.perf_counter()
        return self._captured(_PREFILL) - started

    def decode(self) -> float:
        """Return the seconds of a captured decode step."""
        return self._captured(_DECODE) - self.engine.began

    def _captured(self, arm: Arm) -> float:
        """Capture one arm and return when its trace was complete."""
        plan: Plan = replace(self.plan, arms=(arm,))
        with tempfile.TemporaryDirectory() as folder:
            capture(plan, self.engine, IDS, Path(folder), CaptureOptions(payload="none"), lambda _line: None)
            return time.perf_counter()


def measure(model: Any, repetitions: int) -> dict[str, dict[str, Ratio]]:
    """Return `prefill` and `decode` → what is traced → traced ÷ untraced."""
    bare = Bare(model)
    traced = {"scores off": Traced(model, scores=False), "scores on": Traced(model, scores=True)}
    return {
        "prefill": in_turn(bare.prefill, {name: each.prefill for name, each in traced.items()}, repetitions),
        "decode": in_turn(bare.decode, {name: each.decode for name, each in traced.items()}, repetitions),
    }
