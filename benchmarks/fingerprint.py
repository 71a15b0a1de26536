"""How fast a fingerprint is: GB/s of the compiled core, of NumPy, and of reading alone, on tensors of several sizes.

    python -m benchmarks.fingerprint

Each figure is the best of several runs, in turn; the last columns are ratios of the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from driftprobe.fingerprint import BUILT, DTYPES, fingerprint, reference_fingerprint

SIZES = (192, 4096, 1 << 20, 1 << 24)
KINDS = ("float32", "bfloat16", "float16")
ROUNDS = 7


def best(work: Callable[[], object], elements: int) -> float:
    """Return the seconds that one call takes, the least of several runs."""
    calls = max(1, 200_000 // elements)
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(calls):
            work()
        found.append((time.perf_counter() - started) / calls)
    return min(found)


def main() -> None:
    """Print the table."""
    if not BUILT:
        print("driftprobe._core is not built here: `driftprobe engines` says what it needs")
    print("| dtype | elements | core GB/s | NumPy GB/s | reading GB/s | NumPy ÷ core, time | core ÷ reading, rate |")
    print("|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for size in SIZES:
            array = np.random.default_rng(0).normal(size=size).astype(DTYPES[kind])
            words = array.view(np.uint64)
            core, plain, read = (
                best(lambda: fingerprint(array), size),  # noqa: B023
                best(lambda: reference_fingerprint(array), size),  # noqa: B023
                best(words.max, size),
            )
            rates = [array.nbytes / seconds / 1e9 for seconds in (core, plain, read)]
            print(f"| {kind} | {size} | {' | '.join(f'{r:.2f}' for r in rates)} | {plain / core:.1f} | "
                  f"{rates[0] / rates[2]:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
