"""Every case that is measured, in a fixed order, and which of them are tuned on and which only reported.

A case is one run of one model with one fault, one benign variation, or neither, or a run of probe_paths on two paths
of a model, with a fault on one of them or without. Lengths, steps, kernels and weights
take turns over the cases, so that every fault meets lengths on both sides of 16, 64 and the sliding window, without
running all their products.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from dataclasses import dataclass

from benchmarks.accuracy import models
from driftprobe.faults import FAULTS

FAULT, BENIGN, CLEAN = "fault", "benign", "clean"
LENGTHS = (5, 11, 12, 13, 15, 16, 17, 31, 33, 48, 63, 64, 65)
QUICK = {FAULT: 70, BENIGN: 45, CLEAN: 15}
QUICK_PATHS = {FAULT: 10, BENIGN: 5}
STEPS = (1, 1, 1, 2, 4)
PATH_LENGTHS, PATH_STEPS = (15, 16, 17, 24, 33), (3, 4)
"""Lengths on both sides of 16 and the sliding window, with these many tokens fed one by one behind the others."""
SHORT_FOR_STEPS = 24
"""Runs of more than one step keep to prompts of at most this many tokens: a prefill for each step and control."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run that is measured."""

    kind: str
    """`fault`, `benign` or `clean`."""
    name: str
    architecture: str
    dtype: str
    kernel: str
    length: int
    steps: int
    seed: int
    strength: float | None = None
    """None for what has no strength, and for a fault that is there or not."""
    path: str = ""
    """The pair of paths that probe_paths compares; empty for a run of the engine."""
    side: str = ""
    """Of a fault on a path: the side that it is on, `reference` or `candidate`."""

    @property
    def id(self) -> str:
        """The case in one word, which `--replay` takes."""
        name = self.name if self.strength is None else f"{self.name}@{self.strength:g}"
        run = f"n{self.length}/k{self.steps}/s{self.seed}"
        path = "".join(f"/{word}" for word in (self.path and f"paths.{self.path}", self.side) if word)
        return f"{self.kind}:{name}/{self.architecture}/{self.dtype}/{self.kernel}/{run}{path}"

    @property
    def held_out(self) -> bool:
        """Whether the case is only reported, never tuned on."""
        return models.held_out(self.architecture, self.seed)

    @property
    def model(self) -> tuple[str, str, str, int]:
        """What the case's model is built from."""
        return self.architecture, self.dtype, self.kernel, self.seed


def full() -> list[Case]:
    """Return every case."""
    return sorted({*_all(repeats=2), *_paths()}, key=lambda case: (case.model, case.id))


def quick() -> list[Case]:
    """Return a fixed choice of the full set, so many of each kind as QUICK says, for the test suite."""
    drawn = sorted(full(), key=lambda case: _digest(case.id))
    runs, paths = [c for c in drawn if c.steps <= 2 and not c.path], [c for c in drawn if c.path]
    chosen = [
        case
        for counts, among in ((QUICK, runs), (QUICK_PATHS, paths))
        for kind, count in counts.items()
        for case in [c for c in among if c.kind == kind][:count]
    ]
    return sorted(chosen, key=lambda case: (case.model, case.id))


def sample(count: int, faults: int | None = None, seen: Container[str] = ()) -> list[Case]:
    """Return so many faults, and `count` clean and benign cases together, drawn from the full set; always the same.

    `count` faults too, where `faults` does not say how many. Cases whose id is in `seen` are drawn last.
    """
    drawn = sorted(full(), key=lambda case: (case.id in seen, _digest(case.id)))
    quiet = [c for c in drawn if c.kind != FAULT][:count]
    chosen = [c for c in drawn if c.kind == FAULT][: count if faults is None else faults] + quiet
    return sorted(chosen, key=lambda case: (case.model, case.id))


def find(case_id: str) -> Case:
    """Return a case by its id. Raises KeyError where there is none."""
    return {case.id: case for case in full()}[case_id]


def _all(repeats: int) -> Iterator[Case]:
    from benchmarks.accuracy.benign import BENIGN as VARIATIONS

    for architecture in models.architectures():
        for dtype in models.DTYPES:
            for turn in range(6 * repeats):
                yield _turned(CLEAN, "none", None, architecture, dtype, turn)
            for name in VARIATIONS:
                for turn in range(repeats):
                    yield _turned(BENIGN, name, None, architecture, dtype, turn)
            for fault in FAULTS.values():
                for strength in fault.strengths if len(fault.strengths) > 1 else (None,):
                    yield _turned(FAULT, fault.name, strength, architecture, dtype, 0, fault.min_prompt)


def _paths() -> Iterator[Case]:
    """Yield the runs of probe_paths: every pair without a fault, and each fault on a pair and a side drawn for it."""
    from benchmarks.accuracy.path_faults import PATH_FAULTS
    from benchmarks.accuracy.paths import ARCHITECTURES, PAIRS

    for architecture in (name for name in ARCHITECTURES if name in models.architectures()):
        for dtype in models.DTYPES:
            for pair in PAIRS:
                yield _on_path(BENIGN, "none", None, architecture, dtype, (pair,), ("",))
            for fault in PATH_FAULTS.values():
                if fault.architectures and architecture not in fault.architectures:
                    continue
                for strength in fault.strengths if len(fault.strengths) > 1 else (None,):
                    yield _on_path(FAULT, fault.name, strength, architecture, dtype, fault.pairs, fault.sides)


def _on_path(
    kind: str, name: str, strength: float | None, architecture: str, dtype: str,
    pairs: tuple[str, ...], sides: tuple[str, ...],
) -> Case:  # fmt: skip
    draw = int.from_bytes(_digest(f"paths/{kind}/{name}/{strength}/{architecture}/{dtype}/{pairs}")[:8], "big")
    picked = []
    for choices in (PATH_LENGTHS, PATH_STEPS, pairs, sides, models.kernels(architecture),
                    (*models.TUNED_SEEDS, *models.HELD_OUT_SEEDS)):  # fmt: skip
        picked.append(choices[draw % len(choices)])
        draw //= len(choices)
    length, steps, path, side, kernel, seed = picked
    return Case(kind, name, architecture, dtype, kernel, length, steps, seed, strength, path, side)


def _turned(
    kind: str, name: str, strength: float | None, architecture: str, dtype: str, turn: int, least: int = 1
) -> Case:
    """Return a case whose other coordinates are drawn from its name: the same ones in every run."""
    draw = int.from_bytes(_digest(f"{kind}/{name}/{strength}/{architecture}/{dtype}/{turn}")[:8], "big")
    steps, draw = STEPS[draw % len(STEPS)], draw // len(STEPS)
    lengths = [n for n in LENGTHS if n >= least and (steps == 1 or n <= max(SHORT_FOR_STEPS, least))] or [least]
    length, draw = lengths[draw % len(lengths)], draw // len(lengths)
    kernels = models.kernels(architecture)
    kernel, draw = kernels[draw % len(kernels)], draw // len(kernels)
    seeds = (*models.TUNED_SEEDS, *models.HELD_OUT_SEEDS)
    return Case(kind, name, architecture, dtype, kernel, length, steps, seeds[draw % len(seeds)], strength)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
