"""Plants one fault of each family in the user's own model and shows what the probe makes of it.

A fault with strengths is planted at the subtlest first, and more strongly until the probe fires: what is shown is the
smallest strength that it saw. Judgement sees the trace alone, as ever.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from driftprobe.api import builtin_prompts, make_engine, run
from driftprobe.artifacts import write_reports
from driftprobe.causes import agree
from driftprobe.engines.base import Engine
from driftprobe.errors import DriftprobeError, EngineError, UsageError
from driftprobe.faults import FAULTS, Expected, Fault
from driftprobe.options import RunOptions
from driftprobe.plan import Mode, Prompt
from driftprobe.prompts import make_prompts
from driftprobe.result import Result
from driftprobe.selftest.render import reports
from driftprobe.selftest.result import SelfTest, TapLimit, Trial, limits_of, where

__all__ = ["SelfTest", "TapLimit", "Trial", "run_self_test", "self_test"]

PROMPT = "p6_len_16"
"""The built-in prompt that faults are planted at: long enough for every fault, short enough to be quick."""
_IDS = 16

Told = Callable[[int, int, str], None]
"""Told how many families are done, of how many, and what is next."""


@dataclass(frozen=True, slots=True)
class _Bench:
    """What every trial has in common."""

    engine: Engine
    prompt: Prompt
    options: RunOptions
    folder: Path


def self_test(
    model: Any = "builtin:tiny", *, dtype: str | None = None, attn: str | None = None, tokenizer: Any = None,
    prompt: str | Sequence[int] | None = None, ladder: str = "auto", out: str | Path | None = None,
) -> SelfTest:  # fmt: skip
    """Plant one fault of each family in a model, and say which the probe saw and what it could have seen.

    `model`, `dtype`, `attn`, `tokenizer` and `ladder` are as in `probe`; `prompt` is text or token ids in place of the
    built-in prompt of 16 tokens. `out` is a folder for SELF_TEST.md, self_test.json and the clean run. Raises
    UsageError for input that cannot be used, EngineError where the model fails without a fault.
    """
    engine = make_engine(model, dtype=dtype, attn=attn, tokenizer=tokenizer)
    given = None if prompt is None else make_prompts({"prompt": prompt}, engine)[0]
    return run_self_test(engine, given, ladder=ladder, out=None if out is None else Path(out))


def run_self_test(
    engine: Engine, prompt: Prompt | None = None, *, ladder: str = "auto", out: Path | None = None,
    told: Told = lambda _done, _of, _what: None,
) -> SelfTest:  # fmt: skip
    """Run the self-test on an engine; see `self_test`."""
    families = list(dict.fromkeys(map(_family, FAULTS.values())))
    options = RunOptions(modes=(Mode.KV_ALIGNED,), ladder=ladder)
    with tempfile.TemporaryDirectory(prefix="driftprobe-") as scratch:
        bench = _Bench(engine, prompt or _prompt(engine), options, Path(scratch) / "run")
        told(0, len(families) + 1, "no fault")
        clean = _once(bench if out is None else replace(bench, folder=out))
        trials = []
        for done, family in enumerate(families, start=1):
            told(done, len(families) + 1, family)
            trials.append(_trial(family, bench))
    facts = engine.facts
    limits = limits_of(clean.judgement.modes["kv_aligned"].prompts)
    found = SelfTest(facts.model, facts.dtype, clean.verdict, clean.reason, tuple(trials), limits)
    if out is not None:
        write_reports(out, reports(found))
    return found


def _prompt(engine: Engine) -> Prompt:
    """Return the built-in prompt, or token ids for a model without a tokenizer."""
    try:
        return builtin_prompts(engine, [PROMPT])[0]
    except DriftprobeError:
        count = max(engine.facts.vocabulary, 2)
        return Prompt("ids", tuple(1 + (7 * i) % (count - 1) for i in range(_IDS)))


def _family(fault: Fault) -> str:
    return fault.family or "other"


def _once(bench: _Bench) -> Result:
    return run(bench.engine, [bench.prompt], bench.options, bench.folder)


def _trial(family: str, bench: _Bench) -> Trial:
    """Plant the family's first fault that can act here."""
    reasons = []
    for fault in (fault for fault in FAULTS.values() if _family(fault) == family):
        try:
            return _planted(fault, bench)
        except (UsageError, EngineError) as error:
            reasons.append(f"{fault.name}: {error.measured}")
    return Trial(family, reason="; ".join(reasons))


def _planted(fault: Fault, bench: _Bench) -> Trial:
    """Plant a fault, the subtlest strength first, until the probe fires. Raises UsageError where it cannot act."""
    trial = None
    for strength in sorted(fault.strengths, key=fault.strengths.index, reverse=True):
        try:
            with bench.engine.plant(fault.name, strength) as expected:
                found = _judged(fault, strength, expected, _once(bench))
        except UsageError:
            if strength == fault.strengths[0]:
                if trial is None:
                    raise
                break
            continue  # too subtle to change a single bit
        trial = found
        if found.fired:
            break
    assert trial is not None, "the default strength acts or raises"
    return trial


def _judged(fault: Fault, strength: float, expected: Expected, result: Result) -> Trial:
    first = result.first_failure
    found = first.diagnosis if first is not None else None
    return Trial(
        family=_family(fault),
        fault=fault.name,
        strength=strength if len(fault.strengths) > 1 or fault.unit else None,
        unit=fault.unit,
        verdict=result.verdict.value,
        fired=result.verdict.value == fault.verdict,
        found_at=where(first.layer, first.tensor) if first is not None else "none",
        expected_at=where(expected.layer, expected.tensor) if fault.verdict == "MISMATCH" else "none",
        excess=first.excess if first is not None and math.isfinite(first.excess) else None,
        cause=found.cause if found is not None else "",
        expected_cause=expected.cause,
        cause_agrees=found is not None and found.cause == expected.cause
        and agree(expected.cause, expected.parameters, found.parameters),
        reason="" if result.verdict.value == fault.verdict else f"{result.verdict.value}: {result.reason}",
    )  # fmt: skip
