"""How fast a fingerprint is: GB/s of the compiled core, of NumPy, and of reading alone, on tensors of several sizes.

    python -m benchmarks.fingerprint            beside NumPy and beside reading
    python -m benchmarks.fingerprint --parts    what the hash takes of it, and what moments and sketch do

Each figure is the best of several runs, in turn; the last columns are ratios of the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from driftprobe.fingerprint import BUILT, DTYPES, fingerprint, reference_fingerprint, row_hashes

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


def parts() -> None:
    """Print what a tensor that lies in cache takes, in nanoseconds for 64 bytes: the hash, all, and reading."""
    print("| dtype | elements | hash alone | all | moments and sketch, the rest | reading |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        for size in (4096, 1 << 16, 1 << 20):
            array = np.random.default_rng(0).normal(size=size).astype(DTYPES[kind])
            words, row = array.view(np.uint64), array.reshape(1, size)
            taken = (
                best(lambda: row_hashes(row), size),  # noqa: B023
                best(lambda: fingerprint(array), size),  # noqa: B023
                best(words.max, size),
            )
            hashed, whole, reading = (seconds * 1e9 * 64 / array.nbytes for seconds in taken)
            print(f"| {kind} | {size} | {hashed:.2f} | {whole:.2f} | {whole - hashed:.2f} | {reading:.2f} |")


def main() -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", action="store_true", help="what the hash takes of it, and what the rest")
    if not BUILT:
        print("driftprobe._core is not built here: `driftprobe engines` says what it needs")
    (parts if parser.parse_args().parts else table)()


def table() -> None:
    """Print how fast the core is, beside NumPy and beside reading."""
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
