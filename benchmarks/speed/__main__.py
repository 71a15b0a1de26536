"""`make bench`: everything that docs/performance.md tells, measured here and written there. `--quick` is CI's.

    python -m benchmarks.speed                 every part but the longest two; writes docs/performance.md and .json
    python -m benchmarks.speed --only run      one part or several; what the others measured before stays in the files
    python -m benchmarks.speed --quick         under a minute; writes nothing, ends with 1 on a gross regression

Every figure is a ratio of two things measured in turn in the same run: median, and first to last quartile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fingerprint import best
from benchmarks.speed import breakdown, capture, long, peers, process, quick
from benchmarks.speed.figures import Ratio
from benchmarks.speed.report import render
from benchmarks.speed.subject import llama
from driftprobe.fingerprint import BUILT, DTYPES, fingerprint

DOCS = Path(__file__).resolve().parents[2] / "docs"
DTYPES_TRACED = ("float32", "bfloat16")
SIZES = (1 << 20, 1 << 26)
ANALYSIS = ("--records", "1000000", "--kind", "lean", "--rounds", "3")
"""What benchmarks/analysis_scale.py is asked for by the part `analysis`."""
SCALE = (
    "--records",
    "1000000",
    "10000000",
    "16000000",
    "--kind",
    "lean",
    "--rounds",
    "1",
    "--layers",
    "126",
    "--jsonl-only",
)
"""And by the part `scale` (`make bench-scale`): ten times as many; one trace is 126 layers x 20 taps x 64 steps."""
LAST = ("scale", "long")
"""Parts that take longest, and are run only when they are asked for."""


def captures(repetitions: int) -> dict[str, Any]:
    """Return dtype → phase → what is traced → ratio."""
    import torch

    torch.set_num_threads(1)
    return {dtype: capture.measure(llama(dtype), repetitions) for dtype in DTYPES_TRACED}


def fingerprints() -> list[dict[str, Any]]:
    """Return a row for each dtype and size: GB/s of one thread and of reading alone, and how much sooner two are."""
    found = []
    for dtype, size in ((dtype, size) for dtype in DTYPES_TRACED for size in SIZES):
        array = np.random.default_rng(0).normal(size=size).astype(np.float32).astype(DTYPES[dtype])
        words = array.view(np.uint64)
        ours, reading = best(lambda array=array: fingerprint(array), size), best(words.max, size)  # type: ignore[misc]
        rates = {"fingerprint_gb_s": array.nbytes / ours / 1e9, "reading_gb_s": array.nbytes / reading / 1e9}
        rounded = {name: round(rate, 2) for name, rate in rates.items()}
        by_two = best(lambda array=array: fingerprint(array, threads=2), size)  # type: ignore[misc]
        found.append(
            {
                "dtype": dtype,
                "elements": size,
                **rounded,
                "share": round(reading / ours, 3),
                "two": round(ours / by_two, 2),
            }
        )
    return found


def analysis(asked: Sequence[str] = ANALYSIS) -> dict[str, Any]:
    """Return what benchmarks/analysis_scale.py measures, as it prints it; in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "analysis.json"
        command = [sys.executable, "-m", "benchmarks.analysis_scale", *asked, "--json", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"reason": (done.stderr.strip().splitlines() or ["it failed"])[-1][:200]}
        return {"table": done.stdout.strip(), "figures": json.loads(out.read_text(encoding="utf-8"))}


def machine() -> dict[str, Any]:
    """Return what the figures depend on beside this code."""
    import torch
    import transformers

    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    return {
        "cpu": cpu or platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "core": BUILT, "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _plain(value: Any) -> Any:
    if isinstance(value, Ratio):
        return value.as_json()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def parts_of(repetitions: int) -> dict[str, Callable[[], Any]]:
    """Return every part by its name, in the order in which they are run."""
    return {
        "capture": lambda: captures(repetitions),
        "breakdown": lambda: breakdown.measure(repetitions),
        "peers": lambda: {name: peers.measure(name, max(repetitions // 3, 1)) for name in peers.PEERS},
        "fingerprint": fingerprints,
        "run": lambda: process.runs(max(repetitions // 4, 1)),
        "starts": lambda: process.starts(max(repetitions // 2, 1)),
        "analysis": analysis,
        "long": long.measure,
        "scale": lambda: analysis(SCALE),
    }


def merged(before: dict[str, Any], name: str, found: Any, seconds: float) -> dict[str, Any]:
    """Return what was measured before with one part anew; each tells its own machine: parts may come from several."""
    return {**before, name: {"machine": machine(), "seconds": round(seconds), "found": _plain(found)}}


def _known(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def main() -> None:
    """Measure, and write or judge. Each part is written when it is done: a bench that is stopped goes on from there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="CI's: gross regressions alone; writes nothing")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=tuple(parts_of(1)), help=", ".join(parts_of(1)))
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of performance.md and performance.json")
    parser.add_argument("--repetitions", type=int, default=9)
    given = parser.parse_args()
    if given.quick:
        sys.exit(quick.main())
    given.out.mkdir(parents=True, exist_ok=True)
    figures, page = given.out / "performance.json", given.out / "performance.md"
    for name, part in parts_of(given.repetitions).items():
        if name not in given.only if given.only else name in LAST:
            continue
        started = time.perf_counter()
        measured = part()
        took = time.perf_counter() - started
        print(f"{name}: {took:.0f} s", file=sys.stderr, flush=True)
        known = merged(_known(figures), name, measured, took)
        figures.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        page.write_text(render(known), encoding="utf-8")


if __name__ == "__main__":
    main()
