"""Whether something has become grossly slower: ratios alone, so that a slow or busy machine fails nothing.

What is held to a limit is the least quotient of the run: other work on the machine makes quotients larger, hardly
smaller. The limits stand between what is measured today and what was measured before it was made fast.
"""

from __future__ import annotations

import numpy as np

from benchmarks.fingerprint import best
from benchmarks.speed import capture, process
from benchmarks.speed.figures import row
from benchmarks.speed.subject import llama
from driftprobe.fingerprint import BUILT, fingerprint, reference_fingerprint

LIMITS = {
    "capture, prefill, scores off": 1.25,
    "capture, prefill, scores on": 1.35,
    "capture, decode, scores off": 1.6,
    "capture, decode, scores on": 1.7,
    "fingerprint ÷ NumPy, time": 0.15,
    "--help ÷ idle Python": 12.0,
}
REPETITIONS = 5


def measure() -> dict[str, float]:
    """Return the least quotient of each."""
    import torch

    torch.set_num_threads(1)
    found = {
        f"capture, {phase}, {what}": min(ratio.quotients)
        for phase, each in capture.measure(llama(), REPETITIONS).items()
        for what, ratio in each.items()
    }
    if BUILT:
        array = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32)
        ours, numpy = (
            best(lambda: fingerprint(array), array.size),
            best(lambda: reference_fingerprint(array), array.size),
        )
        found["fingerprint ÷ NumPy, time"] = ours / numpy
    found["--help ÷ idle Python"] = min(process.start_of_help(REPETITIONS).quotients)
    return found


def judge(found: dict[str, float]) -> list[str]:
    """Return what is beyond its limit, in words."""
    return [f"{name}: {found[name]:.2f}, at most {limit:g}" for name, limit in LIMITS.items()
            if name in found and not found[name] <= limit]  # fmt: skip


def main() -> int:
    """Print what was measured and what is beyond its limit; return the exit code."""
    found = measure()
    print(row(["", "least quotient", "limit"]), "|---|---|---|", sep="\n")
    for name, quotient in found.items():
        print(row([name, f"{quotient:.2f}", LIMITS[name]]))
    slow = judge(found)
    for line in slow:
        print(f"grossly slower: {line}")
    return int(bool(slow))
