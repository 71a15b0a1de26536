"""Prints what the main job finds and costs on builtin:tiny: clean runs, planted faults, wall time as a ratio.

    python benchmarks/main_job.py clean     verdict, largest excess and detection limit by dtype, kernel, prompt, steps
    python benchmarks/main_job.py faults    fault by found verdict, first tap and 2x2 reading
    python benchmarks/main_job.py wall      `driftprobe run` beside a bare script that does the same two forward passes

Each prints a Markdown table and exits with 1 where a row is not what it must be.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from driftprobe import Verdict, probe
from driftprobe.faults import FAULTS
from driftprobe.judgement import TraceJudgement
from driftprobe.taps import place

BARE = """
import pathlib, torch, transformers, driftprobe
folder = str(pathlib.Path(driftprobe.__file__).parent / "models" / "tiny")
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
ids = torch.tensor([list(b"A decoder reads a prompt in one ")])
with torch.no_grad():
    out = model(ids, use_cache=True)
    model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
"""
REPEATS = 5


def main() -> int:
    """Print the table that was asked for."""
    tables = {"clean": clean, "faults": faults, "wall": wall}
    if len(sys.argv) != 2 or sys.argv[1] not in tables:
        print(__doc__, file=sys.stderr)
        return 2
    good = True
    for row, fine in tables[sys.argv[1]]():
        print("| " + " | ".join(row) + " |", flush=True)
        good = good and fine
    return 0 if good else 1


Row = tuple[list[str], bool]


def clean() -> Iterator[Row]:
    """Clean runs; none may be MISMATCH or N/A."""
    yield ["dtype", "attention", "steps", "prompt", "verdict", "largest excess", "detection limit"], True
    yield ["---"] * 7, True
    for dtype in ("float32", "bfloat16", "float16"):
        for attn in ("eager", "sdpa"):
            for steps in (1, 8):
                result = probe("builtin:tiny", dtype=dtype, attn=attn, steps=steps, payload="none")
                for item in result.judgement.modes["kv_aligned"].prompts:
                    fine = result.verdict in {Verdict.NO_DRIFT, Verdict.STRUCTURAL_DRIFT}
                    yield [dtype, attn, str(steps), item.prompt, item.verdict.value, _excess(item), _limit(item)], fine


def faults() -> Iterator[Row]:
    """Planted faults; each must be found as it says."""
    names = ["fault", "dtype", "prompts", "verdict", "first failure", "2×2 reading", "as declared", "root cause"]
    yield names, True
    yield ["---"] * len(names), True
    for fault in FAULTS.values():
        result = probe("builtin:tiny", mode="kv_aligned", fault=fault.name)
        found = [p for p in result.judgement.modes["kv_aligned"].prompts if p.prompt_len >= fault.min_prompt]
        first = result.first_failure
        at = place(first.layer, first.tensor) if first else "none"
        fine = all(_as_declared(item, fault.name) for item in found)
        yield [fault.name, "float32", str(len(found)), result.verdict.value, at, found[-1].reading.value,
               "yes" if fine else "NO", first.root_cause if first else result.reason], fine  # fmt: skip


def wall() -> Iterator[Row]:
    """Wall time of the whole process, median of interleaved repeats, and the ratio."""
    runs: dict[str, list[float]] = {"bare script": [], "driftprobe run": []}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from driftprobe.cli import main; main()", "run", "--quiet"]
        for _ in range(REPEATS):
            for name, words in (("bare script", [sys.executable, "-c", BARE]), ("driftprobe run", command)):
                started = time.perf_counter()
                subprocess.run(words, cwd=folder, check=True, capture_output=True)
                runs[name].append(time.perf_counter() - started)
    bare = statistics.median(runs["bare script"])
    yield ["process", "median s", "min to max s", "ratio"], True
    yield ["---"] * 4, True
    for name, seconds in runs.items():
        middle = statistics.median(seconds)
        yield [name, f"{middle:.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}", f"{middle / bare:.2f}"], True


def _excess(item: TraceJudgement) -> str:
    return f"×{max((cell.excess for cell in item.cells if cell.excess is not None), default=0.0):.2g}"


def _limit(item: TraceJudgement) -> str:
    return f"{item.limits.smallest:.1e} to {item.limits.largest:.1e}" if item.limits else "none"


def _as_declared(item: TraceJudgement, name: str) -> bool:
    fault, first = FAULTS[name], item.first_failure
    if item.verdict.value != fault.verdict:
        return False
    if fault.verdict != "MISMATCH":
        return True
    return first is not None and (first.layer, first.tensor, item.reading.value) == (
        fault.layer,
        fault.tensor,
        fault.reading,
    )


if __name__ == "__main__":
    sys.exit(main())
