"""Prints what driftprobe finds and costs in llama.cpp, on the built-in model and an untrained one of width 256.

    python -m benchmarks.llamacpp_table clean      drift and verdict by weights, cache, flash attention, length, threads
    python -m benchmarks.llamacpp_table faults     planted fault by what was found, over weights, cache, flash attention
    python -m benchmarks.llamacpp_table flips      largest excess over many short prompts on quantised caches
    python -m benchmarks.llamacpp_table casts      the same and faults found, were quantised caches declared otherwise
    python -m benchmarks.llamacpp_table callback   time of a call with the evaluation callback, as a ratio

`--quick` prints a part of each. Each prints a Markdown table and exits with 1 where a row is not what it must be: no
MISMATCH and no N/A without a fault, MISMATCH with one. Needs `pip install -e '.[llamacpp]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from driftprobe.api import RunOptions, run
from driftprobe.causes import agree
from driftprobe.engines.llamacpp import LlamaCppEngine, open_engine
from driftprobe.engines.llamacpp.context import Context, Model, Settings
from driftprobe.engines.llamacpp.engine import CACHE_CASTS
from driftprobe.engines.llamacpp.planting import PLANTERS
from driftprobe.errors import UsageError
from driftprobe.faults import find_fault
from driftprobe.fingerprint import Array
from driftprobe.judgement import Cell, TraceJudgement
from driftprobe.plan import Mode, Prompt
from driftprobe.result import Result
from driftprobe.taps import place
from tools.gguf_model import TYPES, random, tiny, write_gguf

WEIGHTS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k")
CACHES = ("f32", "f16", "q8_0", "q4_0")
LENGTHS = (2, 37, 63, 64, 100, 600)
THREADS = (1, 2)
FAULT_LENGTH = 16
REPEATS = 25
_MARKS = {"NO_DRIFT": "=", "STRUCTURAL_DRIFT": "s", "MISMATCH": "M", "N/A": "?"}


@dataclass(frozen=True)
class Setup:
    """One way to run llama.cpp."""

    weights: str
    cache: str
    flash: str

    @property
    def cells(self) -> str:
        """Its words as cells of a table."""
        return f"| {self.weights} | {self.cache} | {self.flash} |"

    def open(self, folder: Path, threads: int) -> LlamaCppEngine:
        """Return its engine; the model is written where it is not there yet. Q4_K needs rows of 256."""
        path = folder / f"{self.weights}.gguf"
        if not path.exists():
            write_gguf(*(random() if self.weights == "q4_k" else tiny()), path, self.weights)
        return open_engine(model=str(path), flash_attn=self.flash, cache_type=self.cache, threads=threads)


def setups(quick: bool) -> Iterator[Setup]:
    """Yield every setup; a quantised cache needs flash attention, and llama.cpp refuses it without."""
    for weights in WEIGHTS if not quick else ("f32", "q8_0"):
        for cache in CACHES:
            for flash in ("off", "on"):
                if flash == "on" or cache in {"f32", "f16"}:
                    yield Setup(weights, cache, flash)


def prompt(length: int) -> Prompt:
    """Return a prompt of so many bytes, no two lengths alike."""
    return Prompt(f"len_{length}", tuple((7 * i * i + 13 * i + 40 + length) % 256 for i in range(length)))


def judge(
    engine: LlamaCppEngine, prompts: list[Prompt], payload: str, fault: str | None = None, steps: int = 1
) -> Result:
    """Run prompts with all arms."""
    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(modes=(Mode.KV_ALIGNED,), payload=payload, fault=fault, steps=steps)
        return run(engine, prompts, options, Path(folder) / "run")


def worst(judged: TraceJudgement) -> Cell | None:
    """Return the cell of decode or of arm A with the largest excess."""
    known = [cell for cell in (*judged.cells, *judged.aligned_cells) if cell.excess is not None]
    return max(known, key=lambda cell: cell.excess or 0.0, default=None)


def clean(quick: bool, folder: Path) -> bool:
    """Print drift and verdict without a fault."""
    lengths = LENGTHS if not quick else LENGTHS[:3]
    print("One letter a length: = NO_DRIFT, s STRUCTURAL_DRIFT, M MISMATCH, ? N/A. Excess: of limit 4.\n")
    print(f"| weights | cache | flash | threads | {' '.join(map(str, lengths))} | largest excess | at | length | drift "
          "there | largest drift | of logits | detection limit |")  # fmt: skip
    print("|" + "---|" * 12)
    good = True
    for setup in setups(quick):
        for threads in THREADS if not quick else THREADS[:1]:
            good &= _clean_row(setup, threads, lengths, folder)
    return good


def _clean_row(setup: Setup, threads: int, lengths: tuple[int, ...], folder: Path) -> bool:
    engine = setup.open(folder, threads)
    result = judge(engine, [prompt(length) for length in lengths], "failing")
    judged = {p.prompt: p for p in result.judgement.modes[Mode.KV_ALIGNED.value].prompts}
    rows = [judged[prompt(length).name] for length in lengths]
    cells = {row.prompt: worst(row) for row in rows}
    name, cell = max(cells.items(), key=lambda item: (item[1].excess or 0.0) if item[1] else -1.0)
    drifts = [c.drift.at_least or 0.0 for row in rows for c in row.cells]
    logits = [c.drift.at_least or 0.0 for row in rows for c in row.cells if c.tensor == "logits"]
    marks = " ".join(_MARKS[row.verdict.value] for row in rows)
    limits = result.detection_limit
    where, excess, drift = (
        ("", 0.0, 0.0)
        if cell is None
        else (place(cell.layer, cell.tensor), cell.excess or 0.0, cell.drift.at_least or 0.0)
    )
    print(f"{setup.cells} {threads} | {marks} | {excess:.2f} | {where} | {name.removeprefix('len_')} | {drift:.1e} | "
          f"{max(drifts):.1e} | {max(logits):.1e} | {limits.smallest:.1e} to {limits.largest:.1e} |"
          if limits else f"{setup.cells} {threads} | {marks} |", flush=True)  # fmt: skip
    for row in rows:
        if row.verdict.value in {"MISMATCH", "N/A"}:
            print(f"    {row.prompt}: {row.verdict.value}: {row.reason}", file=sys.stderr)
    engine.close()
    return not set(marks.split()) & {"M", "?"}


def faults(quick: bool, folder: Path) -> bool:
    """Print what is found of every planted fault."""
    found: dict[str, list[tuple[bool, bool, bool, bool, float]]] = {name: [] for name in PLANTERS}
    count = 0
    for setup in setups(quick):
        engine, count = setup.open(folder, 1), count + 1
        for name in PLANTERS:
            found[name].append(_fault(engine, name, setup))
        engine.close()
        right = sum(all(rows[-1][:4]) for rows in found.values())
        print(f"    {setup}: {right} of {len(found)} found, located, read and named", file=sys.stderr, flush=True)
    print(f"{count} setups of weights, cache and flash attention, one thread; a prompt of {FAULT_LENGTH} tokens, or as "
          "many as the fault needs.\n")  # fmt: skip
    print("| fault | found | at the expected tap | 2x2 reading as expected | cause and parameters named "
          "| smallest excess |")  # fmt: skip
    print("|" + "---|" * 6)
    for name, rows in found.items():
        fired, located, read, named, excess = zip(*rows, strict=True)
        print(f"| {name} | {sum(fired)} of {len(rows)} | {sum(located)} | {sum(read)} | {sum(named)} "
              f"| {min(excess):.1f} |")  # fmt: skip
    return all(row[0] for rows in found.values() for row in rows)


def _fault(engine: LlamaCppEngine, name: str, setup: Setup) -> tuple[bool, bool, bool, bool, float]:
    result = judge(engine, [prompt(max(FAULT_LENGTH, find_fault(name).min_prompt))], "failing", name)
    judged, expected = result.judgement.modes[Mode.KV_ALIGNED.value].prompts[0], result.expected
    first = judged.first_failure
    if first is None or expected is None:
        print(f"    {name} in {setup}: {judged.verdict.value}: {judged.reason}", file=sys.stderr)
        return False, False, False, False, 0.0
    diagnosis = result.first_failure.diagnosis if result.first_failure else None
    named = (
        diagnosis is not None
        and diagnosis.cause == expected.cause
        and agree(expected.cause, expected.parameters, diagnosis.parameters)
    )
    located = (first.layer, first.tensor) == (expected.layer, expected.tensor)
    read = judged.reading.value == expected.reading
    if not (located and read and named):
        said = diagnosis and (diagnosis.cause, diagnosis.parameters)
        print(f"    {name} in {setup}: at {place(first.layer, first.tensor)}, reading {judged.reading.value}, cause "
              f"{said}, expected {expected}", file=sys.stderr)  # fmt: skip
    return True, located, read, named, first.excess if math.isfinite(first.excess) else math.inf


def short_prompts(count: int) -> list[Prompt]:
    """Return random prompts of 1 to 17 bytes, always the same ones."""
    generator = Random(1)
    lengths = [generator.choice((1, 1, 2, 2, 3, 4, 5, 7, 9, 12, 17)) for _ in range(count)]
    return [Prompt(f"p{i}", tuple(generator.randrange(256) for _ in range(n))) for i, n in enumerate(lengths)]


def flips(quick: bool, folder: Path) -> bool:
    """Print the largest excess over random short prompts: single elements of a quantised cache that fall aside."""
    count = 10 if quick else 100
    prompts = short_prompts(count)
    print(f"{count} random prompts of 1 to 17 tokens, three steps, one thread, flash attention on.\n")
    print("| model | weights | cache | verdict | largest excess | at | drift there |")
    print("|" + "---|" * 7)
    good = True
    for model, made in (("tiny", tiny), ("random", random)):
        for weights in ("f16", "bf16", "q4_k"):
            path = folder / f"{model}-{weights}.gguf"
            write_gguf(*made(), path, weights)
            for cache in ("q4_0",) if quick else ("q8_0", "q4_0"):
                engine = open_engine(model=str(path), flash_attn="on", cache_type=cache, threads=1)
                result = judge(engine, prompts, "failing", steps=3)
                engine.close()
                found = (worst(p) for p in result.judgement.modes[Mode.KV_ALIGNED.value].prompts)
                cell = max((c for c in found if c is not None), key=lambda c: c.excess or 0.0)
                good &= result.verdict.value in {"NO_DRIFT", "STRUCTURAL_DRIFT"}
                where, drift = place(cell.layer, cell.tensor), cell.drift.at_least or 0.0
                print(f"| {model} | {weights} | {cache} | {result.verdict.value} | {cell.excess or 0.0:.2f} "
                      f"| {where} | {drift:.1e} |", flush=True)  # fmt: skip
    return good


def casts(quick: bool, folder: Path) -> bool:
    """Print what another declaration of a quantised cache would make of clean runs and of faults."""
    count = 10 if quick else 50
    print(
        f"Weights F32, flash attention on, one thread. Clean: {count} random prompts of 1 to 17 tokens, three steps.\n"
    )
    print(
        "| cache | declared as | clean: largest excess | verdict | faults found | at the expected tap | cause named |"
    )
    print("|" + "---|" * 7)
    good = True
    for cache in ("q8_0", "q4_0"):
        own = CACHE_CASTS[cache]
        for dtype in ("float16", "int8", "int4"):
            CACHE_CASTS[cache] = dtype
            try:
                good &= _cast_row(Setup("f32", cache, "on"), dtype, folder, count) or dtype != own
            finally:
                CACHE_CASTS[cache] = own
    return good


def _cast_row(setup: Setup, dtype: str, folder: Path, count: int) -> bool:
    engine = setup.open(folder, 1)
    result = judge(engine, short_prompts(count), "failing", steps=3)
    cells = (worst(p) for p in result.judgement.modes[Mode.KV_ALIGNED.value].prompts)
    excess = max((cell.excess or 0.0 for cell in cells if cell is not None), default=0.0)
    with contextlib.redirect_stderr(io.StringIO()):
        found, located, _, named, _ = zip(*(_fault(engine, name, setup) for name in PLANTERS), strict=True)
    engine.close()
    print(f"| {setup.cache} | {dtype} | {excess:.2f} | {result.verdict.value} | {sum(found)} of {len(found)} "
          f"| {sum(located)} | {sum(named)} |", flush=True)  # fmt: skip
    return result.verdict.value in {"NO_DRIFT", "STRUCTURAL_DRIFT"} and all(found)


def callback(quick: bool, folder: Path) -> bool:
    """Print what the evaluation callback costs: a context without one, one asked for nothing, and one that captures."""
    print("| call | cache | flash | no callback, ms | idle callback, ratio | capture, ratio | same logits |")
    print("|" + "---|" * 7)
    good = True
    for cache, flash in (("f32", "off"), ("f16", "on")):
        Setup("f32", cache, flash).open(folder, 1).close()
        model, settings = Model(folder / "f32.gguf"), Settings(flash, cache, 1)
        contexts = [Context(model, settings, max(LENGTHS) + 1, listens=listens) for listens in (False, True)]
        for length in (100,) if quick else (37, 100, 600):
            for start in (0, length):
                good &= _callback_row(contexts, length, start, f"{cache} | {flash}")
        for context in contexts:
            context.close()
        model.close()
    return good


def _callback_row(contexts: list[Context], length: int, start: int, setup: str) -> bool:
    bare, listening = contexts
    ways = ((bare, False), (listening, False), (listening, True))
    took: dict[int, list[float]] = {way: [] for way in range(len(ways))}
    logits = {}
    for _ in range(REPEATS):
        for way, (context, captures) in enumerate(ways):
            seconds, logits[way] = _timed(context, list(prompt(length + 1).token_ids), start, captures)
            took[way].append(1000 * seconds)
    none, idle, captured = (min(took[way]) for way in took)
    same = all((logits[0] == other).all() for other in logits.values())
    what = f"decode 1 after {length}" if start else f"prefill {length + 1}"
    print(f"| {what} | {setup} | {none:.2f} | {idle / none:.2f} | {captured / none:.2f} | {'yes' if same else 'NO'} |")
    return bool(same)


def _timed(context: Context, tokens: list[int], start: int, captures: bool) -> tuple[float, Array]:
    layers = frozenset(range(context.model.number("n_layer")))
    context.clear()
    if start:
        context.decode(tokens[:start], 0)
    heard = context.listener([len(tokens) - start - 1], layers, start) if captures else None
    started = time.perf_counter()
    logits = context.decode(tokens[start:], start, heard)
    return time.perf_counter() - started, logits


def main() -> int:
    """Print the table that was asked for."""
    tables = {"clean": clean, "faults": faults, "flips": flips, "casts": casts, "callback": callback}
    parser = argparse.ArgumentParser(description="Tables of driftprobe in llama.cpp.")
    parser.add_argument("table", choices=tables)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    assert set(WEIGHTS) <= set(TYPES)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            good = tables[chosen.table](chosen.quick, Path(folder))
        except UsageError as error:
            print(error.render(), file=sys.stderr)
            return error.exit_code
    print(f"\n{time.perf_counter() - started:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
