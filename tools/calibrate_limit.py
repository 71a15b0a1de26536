"""Measures how far clean models come to the limit: the figures behind LIMIT and the bounds of floor.py.

    python tools/calibrate_limit.py            every architecture of tests/models.py, kernel and dtype: half an hour
    python tools/calibrate_limit.py --quick    two architectures, under two minutes

Every run is of a model without a fault, so each excess (drift over floor) is arithmetic. The largest excess of each
prompt is collected, once as the run is judged and once with the records of arms N left out, and printed by dtype and
kernel. The second table says what the controls E alone would have been worth. docs/decisions/0002-noise-arms.md and
0003-limit.md hold the figures that were printed.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import models
from driftprobe import probe
from driftprobe.floor import BOUND_WITH_NOISE, BOUND_WITHOUT_NOISE, LIMIT, SUM_BOUND
from driftprobe.local import LOCAL_LIMIT
from driftprobe.payload import Payloads
from driftprobe.trace import Trace
from driftprobe.verdict import judge

QUICK = ("llama", "mixtral")
DTYPES = ("float64", "float32", "bfloat16", "float16")
Place = tuple[int, int | None, str]


@dataclass
class Tally:
    """What was seen under one dtype and kernel."""

    with_noise: list[float] = field(default_factory=list)
    """Largest excess of each prompt."""
    without_noise: list[float] = field(default_factory=list)
    verdicts: Counter[str] = field(default_factory=Counter)
    drifting: int = 0
    """Taps where decode's bits are not prefill's."""
    unseen: int = 0
    """Of those, taps where every control E is prefill's bit for bit."""
    idle: int = 0
    """Taps where a control E is not prefill's and decode's bits are."""
    local: list[float] = field(default_factory=list)
    """Largest excess of the local test in each prompt where it could be made (bfloat16 and float16)."""


def main() -> None:
    """Run the models and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two architectures, two prompts")
    parser.add_argument("--seeds", type=int, default=1, help="draws of weights and prompts (default 1)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
    started, cases = time.perf_counter(), list(_cases(options.quick, options.seeds))
    for done, (name, kernel, dtype, spread, seed) in enumerate(cases, start=1):
        _measure(tallies[(dtype, kernel)], name, kernel, dtype, spread=spread, seed=seed, quick=options.quick)
        if sys.stderr.isatty() or done % 20 == 0:
            print(f"{done} of {len(cases)}, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    _print_excess(tallies)
    _print_controls(tallies)


def _cases(quick: bool, seeds: int) -> Iterator[tuple[str, str, str, bool, int]]:
    for name in QUICK if quick else models.ARCHITECTURES:
        for kernel in models.ARCHITECTURES[name].kernels:
            for dtype in DTYPES:
                for spread in (True, False) if dtype == "float32" and not quick else (True,):
                    for seed in range(seeds):
                        yield name, kernel, dtype, spread, seed


def _measure(tally: Tally, name: str, kernel: str, dtype: str, *, spread: bool, seed: int, quick: bool) -> None:
    model = models.build(name, attn=kernel, dtype=dtype, spread=spread, seed=seed)
    lengths, steps = ((2, 33), 1) if quick else ((1, 16, 33), 2)
    prompts = {f"n{length}": models.tokens(length, seed) for length in lengths}
    result = probe(model, prompts, mode="kv_aligned", steps=steps, seed=seed, payload="all", ladder="off")
    payloads = Payloads(result.folder)
    for trace in result.traces:
        tally.local += _local(trace, payloads)
        _add(tally.with_noise, trace, payloads, tally.verdicts, f"{name} {kernel} {dtype} spread={spread} seed={seed}")
        quiet = tuple(record for record in trace.records if not record.arm.startswith("N"))
        reads = tuple(read for read in trace.header.reads if not read.arm.startswith("N"))
        _add(tally.without_noise, replace(trace, records=quiet, header=replace(trace.header, reads=reads)), payloads)
        _compare_controls(tally, trace)


def _add(
    found: list[float], trace: Trace, payloads: Payloads, verdicts: Counter[str] | None = None, where: str = ""
) -> None:
    judgement = judge([trace], payloads)
    judged = next(iter(judgement.modes.values())).prompts[0]
    found.append(max((cell.excess or 0.0 for cell in (*judged.cells, *judged.aligned_cells)), default=0.0))
    if verdicts is None:
        return
    verdicts[judged.verdict.value] += 1
    if judged.verdict.value in ("MISMATCH", "N/A"):
        print(f"{judged.verdict.value}: {where} {judged.prompt}: {judged.reason}", flush=True)


def _local(trace: Trace, payloads: Payloads) -> list[float]:
    judged = next(iter(judge([trace], payloads).modes.values())).prompts[0]
    found = [cell.local.excess for cell in (*judged.cells, *judged.aligned_cells) if cell.local is not None]
    return [max(found)] if found else []


def _compare_controls(tally: Tally, trace: Trace) -> None:
    hashes: dict[Place, dict[str, str]] = defaultdict(dict)
    for record in trace.records:
        hashes[(record.step, record.layer, record.tensor)][record.arm] = record.hash
    for by_arm in hashes.values():
        if "P" not in by_arm or "D" not in by_arm:
            continue
        moved = any(by_arm[arm] != by_arm["P"] for arm in by_arm if arm.startswith("E"))
        drifts = by_arm["D"] != by_arm["P"]
        tally.drifting += drifts
        tally.unseen += drifts and not moved
        tally.idle += moved and not drifts


def _print_excess(tallies: dict[tuple[str, str], Tally]) -> None:
    print(f"\nlargest excess of a clean run (LIMIT {LIMIT:g}); floor at least {BOUND_WITH_NOISE:g} u with arms N, "
          f"({BOUND_WITHOUT_NOISE:g} u + {SUM_BOUND:g} u of sums)·√(1+layer) without")  # fmt: skip
    print(f"local: largest excess over an op's own rounding (LOCAL_LIMIT {LOCAL_LIMIT:g}), where it could be tested")
    print(
        "| dtype | kernel | runs | with N: median | p99 | max | without N: median | p99 | max | local: max | verdicts |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (dtype, kernel), tally in tallies.items():
        figures = " | ".join(_figures(found) for found in (tally.with_noise, tally.without_noise))
        verdicts = ", ".join(f"{count} {word}" for word, count in sorted(tally.verdicts.items()))
        local = f"{max(tally.local):.2g}" if tally.local else "–"
        print(f"| {dtype} | {kernel} | {len(tally.with_noise)} | {figures} | {local} | {verdicts} |")


def _figures(found: list[float]) -> str:
    middle, high, top = np.percentile(found, [50, 99, 100])
    return f"{middle:.2g} | {high:.2g} | {top:.2g}"


def _print_controls(tallies: dict[tuple[str, str], Tally]) -> None:
    print("\ncontrols E beside decode, tap by tap: how often they see nothing where decode drifts")
    print("| dtype | kernel | taps where decode drifts | every E bit-equal there | taps where only an E drifts |")
    print("|---|---|---|---|---|")
    for (dtype, kernel), t in tallies.items():
        share = f"{t.unseen} ({100 * t.unseen / t.drifting:.0f} %)" if t.drifting else "0"
        print(f"| {dtype} | {kernel} | {t.drifting} | {share} | {t.idle} |")


if __name__ == "__main__":
    main()
