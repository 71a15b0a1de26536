"""Whole processes: `driftprobe run` ÷ a bare script on the same model, and how soon the other commands are there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.figures import Ratio, in_turn
from benchmarks.speed.subject import IDS, llama
from driftprobe.engines.base import BUILTIN

LENGTHS = (2, 16, 32)
"""Tokens of the prompts: those of the report that driftprobe was made for."""
BARE = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = [1 + i for i in range(int(sys.argv[2]))]
with torch.no_grad():
    cache = transformers.DynamicCache(config=model.config)
    model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    model(torch.tensor([[1]]), past_key_values=cache, use_cache=True)
"""
"""What someone writes who wants the two calls and nothing else: import, load, prefill, decode."""


def seconds_of(command: Sequence[str], *, allowed: tuple[int, ...] = (0,)) -> float:
    """Return the seconds of a process. Raises RuntimeError, with what it said, where it ends with another code."""
    started = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    took = time.perf_counter() - started
    if done.returncode not in allowed:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return took


def runs(repetitions: int, *, large: bool = True) -> dict[str, dict[str, object]]:
    """Return model → whole run ÷ bare script, with a run without the float64 rung beside it.

    Beside each ratio stand `arms_seconds`, what the arms of its last run took by its own logs, and how many `arms`.
    """
    with tempfile.TemporaryDirectory() as name:
        place, found = Path(name), {}
        models = {"builtin:tiny": BUILTIN["builtin:tiny"]}
        if large:
            models["12 × 768"] = place / "model"
            llama().save_pretrained(models["12 × 768"])
        prompts = place / "prompts.json"
        prompts.write_text(json.dumps({f"n{n}": list(IDS[:n]) for n in LENGTHS}), encoding="utf-8")
        for label, folder in models.items():
            given = ("--model", label) if label in BUILTIN else ("--model", str(folder), "--prompt-file", str(prompts))
            run = [*_command("run"), *given, "--quiet"]
            ways = {label: run, f"{label}, --ladder off": [*run, "--ladder", "off"]}
            bare = [sys.executable, "-c", BARE, str(folder), str(LENGTHS[-1])]
            ratios = in_turn(
                lambda bare=bare: seconds_of(bare),  # type: ignore[misc]
                {
                    way: lambda command=[*run, "--out", str(place / way)]: seconds_of(command)
                    for way, run in ways.items()
                },  # type: ignore[misc]
                repetitions,
            )
            found |= {way: {**ratio.as_json(), **arms_of(place / way)} for way, ratio in ratios.items()}
        return found


_TOLD = re.compile(r" *([0-9.]+) s  (arm|wrote) ")


def arms_of(out: Path) -> dict[str, object]:
    """Return how many arms a run captured, and the seconds that went into them, by its logs.

    Those of kv_aligned have every arm: one that was run once for both modes stands in the logs of both.
    """
    arms, seconds = 0, 0.0
    for log in out.rglob("*_kv_aligned*.log"):
        told = [found for line in log.read_text(encoding="utf-8").splitlines() if (found := _TOLD.match(line))]
        arms += sum(found[2] == "arm" for found in told)
        seconds += max((float(found[1]) for found in told), default=0.0)
    return {"arms": arms, "arms_seconds": round(seconds, 2)}


def starts(repetitions: int) -> dict[str, Ratio]:
    """Return command → its time ÷ that of an interpreter that does nothing."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        seconds_of([*_command("run"), "--prompts", "p0_short", "--ladder", "off", "--out", str(out), "--quiet"])
        traces = next(out.glob("*/*/traces"))
        commands = {"--help": _command("--help"), "validate": _command("validate", str(traces)),
                    "analyze": _command("analyze", str(traces))}  # fmt: skip
        idle = [sys.executable, "-c", "pass"]
        return in_turn(
            lambda: seconds_of(idle),
            {what: lambda command=command: seconds_of(command) for what, command in commands.items()},  # type: ignore[misc]
            repetitions,
        )


def start_of_help(repetitions: int) -> Ratio:
    """Return the time of `--help` ÷ that of an interpreter that does nothing."""
    idle, asked = [sys.executable, "-c", "pass"], _command("--help")
    return in_turn(lambda: seconds_of(idle), {"--help": lambda: seconds_of(asked)}, repetitions)["--help"]


def _command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from driftprobe.cli import main; main()", *words]
