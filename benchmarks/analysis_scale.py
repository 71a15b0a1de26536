"""How fast traces are judged, and in how much memory: rows/s and peak RSS, JSONL and Parquet, from synthetic traces.

    python -m benchmarks.analysis_scale --records 100000 1000000
    python -m benchmarks.analysis_scale --records 1000000 --kind full --layers 126 --json out.json

A trace holds layers × taps × steps records of each arm: P, D, their repetitions, one longer prefill, one noise arm;
there are as many prompts as the records take. `lean` records carry hashes and moments, and every arm is bit for bit
prefill: NO_DRIFT. `full` ones carry sketches too, and all but a share `--equal` of the tensors of D, E and N differ by
rounding: STRUCTURAL_DRIFT. Each analysis is a process of its own; its rate counts from before the first import to the
verdict, by the clock and, as other work on the machine makes that one longer, by processor time of all threads. Beside
it stands how many times less that is than `json.loads` alone takes for the same lines at the same time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np

from driftprobe.pack import pack_folder
from driftprobe.taps import TAPS, Scope
from driftprobe.trace import EngineFacts, Header, PlannedRead, encode_line
from driftprobe.trace_file import Checks

ARMS = {"P": "prefill_last", "D": "decode", "P'": "prefill_last", "D'": "decode", "E1": "prefill_ext",
        "N1": "prefill_noise"}  # fmt: skip
LAYER_TAPS = [tap.name for tap in TAPS if tap.scope is Scope.LAYER][:20]
LENGTH = 16
"""Tokens of the prompt."""
SKETCH, ELEMENTS = 64, 4096


@dataclass(frozen=True)
class Shape:
    """What one trace holds."""

    layers: int
    steps: int
    kind: str
    equal: float

    @property
    def places(self) -> list[tuple[int | None, str]]:
        """Every tap of a step, in order of execution."""
        inside = [(layer, name) for layer in range(self.layers) for name in LAYER_TAPS]
        return [(None, "embed"), *inside, (None, "final_norm"), (None, "logits")]

    @property
    def records(self) -> int:
        """Records of one trace."""
        return len(self.places) * self.steps * len(ARMS)


def header_of(shape: Shape, prompt: str) -> Header:
    """Return the header of one synthetic trace, with its whole plan."""
    reads = tuple(
        PlannedRead(arm=arm, phase=phase_of(arm, step), step=step, position=LENGTH + step)
        for arm in ARMS
        for step in range(shape.steps)
    )
    taps: dict[str, tuple[int, ...]] = {name: tuple(range(shape.layers)) for name in LAYER_TAPS}
    taps |= {"embed": (), "final_norm": (), "logits": ()}
    return Header(
        prompt=prompt, engine=EngineFacts(name="synthetic", dtype="float32", layers=shape.layers), steps=shape.steps,
        prompt_len=LENGTH, reads=reads, taps=taps, sketch_size=SKETCH,
    )  # fmt: skip


def phase_of(arm: str, step: int) -> str:
    """Return the phase that an arm's records carry."""
    return f"{ARMS[arm]}{step}" if ARMS[arm] == "decode" else ARMS[arm]


def write_trace(folder: Path, shape: Shape, prompt: str, seed: int) -> None:
    """Write one synthetic trace with its digest, much faster than the writer that checks every line."""
    header = header_of(shape, prompt)
    path = folder / f"{prompt}_as_designed.jsonl"
    checks = Checks(path.name)
    first = encode_line("header", header)
    checks.item(1, first, header, [])
    with path.open("wb") as file:
        file.write(first)
        for arm in ARMS:
            for step in range(shape.steps):
                lines = b"".join(_lines(shape, prompt, arm, step, seed))
                checks._digest.update(lines)
                file.write(lines)
        body = {"type": "footer", "records": shape.records, "events": 0, "sha256": checks._digest.hexdigest()}
        file.write(json.dumps(body, separators=(",", ":")).encode() + b"\n")


def _lines(shape: Shape, prompt: str, arm: str, step: int, seed: int) -> Iterator[bytes]:
    """Yield the lines of one step of an arm; what an arm shares with P is drawn from the same numbers."""
    places = shape.places
    base = np.random.default_rng([seed, step])
    sketches = base.standard_normal((len(places), SKETCH))
    hashes = base.integers(0, 2**63, len(places), dtype=np.uint64)
    sums = base.random((len(places), 4))
    differs = base.random(len(places)) >= shape.equal
    differs[0] = False  # the embedding is the same in every arm
    own = np.random.default_rng([seed, step, 1 + list(ARMS).index(arm.rstrip("'"))])
    if shape.kind == "full" and arm[0] != "P":
        hashes = np.where(differs, hashes ^ own.integers(1, 2**62, len(places), dtype=np.uint64), hashes)
        noise = own.standard_normal(sketches.shape) * 1e-7
        sketches = np.where(differs[:, None], sketches * (1 + noise), sketches)
    start = f'{{"type":"record","prompt":"{prompt}","phase":"{phase_of(arm, step)}","layer":'
    token = f'"arm":"{arm}","step":{step},"token_id":7,"logical_tok_idx":{LENGTH + step},"pos_id":{LENGTH + step}'
    for index, (layer, tensor) in enumerate(places):
        a, b, c, d = sums[index].tolist()
        size = float(np.sqrt((sketches[index] ** 2).sum())) if shape.kind == "full" else a + 60
        more = ',"sketch":' + msgspec.json.encode(sketches[index].tolist()).decode() if shape.kind == "full" else ""
        place = f'{"null" if layer is None else layer},"tensor":"{tensor}","hash":"0x{int(hashes[index]):016x}"'
        yield (
            f"{start}{place},{token},"
            f'"dtype":"float32","shape":[1,32,128],"nz_count":{ELEMENTS},"abs_sum":{a + 50},"min":{-b - 1},'
            f'"max":{c + 1},"mean":{d - 0.5},"l2":{size},"nan_count":0,"inf_count":0{more},"row_start":0,'
            f'"source":"captured"}}\n'
        ).encode()


_JUDGE = """
import json, resource, sys, time
started = time.perf_counter()
from driftprobe.result import analyze
result = analyze(sys.argv[1], whole=False)
wall = time.perf_counter() - started
used = resource.getrusage(resource.RUSAGE_SELF)
with open("/proc/self/status") as file:  # ru_maxrss begins at that of the process that started this one
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024
print(json.dumps([wall, used.ru_utime + used.ru_stime, peak, result.verdict.value]))
"""


@dataclass(frozen=True)
class Measured:
    """One analysis."""

    kind: str
    container: str
    records: int
    megabytes: float
    """Of all files."""
    wall: float
    """Seconds by the clock, least of the rounds."""
    processor: float
    """Seconds of processor time, least of the rounds."""
    parsing: float
    """Seconds of processor time that `json.loads` alone would take for all lines, measured beside."""
    peak: float
    """MB resident, at most."""
    verdict: str

    def __str__(self) -> str:
        rates = (self.records / seconds / 1e6 for seconds in (self.wall, self.processor))
        return (
            f"| {self.kind} | {self.container} | {self.records} | {self.megabytes:.0f} | "
            + " | ".join(f"{rate:.2f}" for rate in rates)
            + f" | {self.parsing / self.processor:.1f} | {self.peak:.0f} | {self.verdict} |"
        )


def parsing(folder: Path) -> float:
    """Return the processor time in which `json.loads` reads one line of a folder, the least of three runs."""
    with next(folder.glob("*.jsonl")).open("rb") as file:
        lines = list(itertools.islice(file, 1, 5001))
    found = []
    for _ in range(3):
        started = time.process_time()
        for line in lines:
            json.loads(line)
        found.append((time.process_time() - started) / len(lines))
    return min(found)


def judged(folder: Path, container: str, kind: str, records: int, rounds: int, line: float) -> Measured:
    """Judge a folder in processes of their own and return the best figures."""
    found = []
    for _ in range(rounds):
        command = [sys.executable, "-c", _JUDGE, str(folder)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append(json.loads(done.stdout))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    wall, processor, peak = (pick(run[i] for run in found) for i, pick in enumerate((min, min, max)))
    return Measured(kind, container, records, size, wall, processor, line * records, peak, found[0][3])


def measure(shape: Shape, records: int, rounds: int, packed: bool) -> Iterator[Measured]:
    """Write traces of so many records, judge them as JSONL, and, where asked, pack them and judge them as Parquet."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prompts = max(1, round(records / shape.records))
        for prompt in range(prompts):
            write_trace(folder, shape, f"p{prompt}", prompt)
        line = parsing(folder)
        yield judged(folder, "JSONL", shape.kind, prompts * shape.records, rounds, line)
        if packed:
            pack_folder(folder)
            yield judged(folder, "Parquet", shape.kind, prompts * shape.records, rounds, line)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, nargs="+", default=[100_000])
    parser.add_argument("--kind", choices=("lean", "full", "both"), default="both")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--equal", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--jsonl-only", action="store_true", help="do not pack: that takes longest")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(
        "| kind | file | records | MB | M rows/s, clock | M rows/s, processor | × json.loads | peak RSS MB | verdict |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    found = []
    for kind in ("lean", "full") if given.kind == "both" else (given.kind,):
        for records in given.records:
            for one in measure(
                Shape(given.layers, given.steps, kind, given.equal), records, given.rounds, not given.jsonl_only
            ):
                print(one, flush=True)
                found.append(asdict(one))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
