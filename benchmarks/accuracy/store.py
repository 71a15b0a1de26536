"""Keeps outcomes in a file of JSON lines, so that a measurement that was stopped goes on where it stood.

Each line names its case and a digest of the sources: what another version of the program measured does not count.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from benchmarks.accuracy.outcome import Outcome

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("src/driftprobe", "benchmarks/accuracy", "tests/models.py")


class Line(msgspec.Struct, frozen=True):
    """One line of the file."""

    sources: str
    outcome: Outcome


def digest(root: Path = ROOT) -> str:
    """Return a digest of every source file that a measurement depends on, and of the libraries' versions."""
    from importlib.metadata import version

    found = hashlib.sha256()
    for name in ("torch", "transformers", "numpy"):
        found.update(f"{name} {version(name)}\n".encode())
    for place in SOURCES:
        path = root / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def words(value: object) -> object:
    """Return a value of plain data with every number that is not finite as the word for it: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {name: words(item) for name, item in value.items()}
    return [words(item) for item in value] if isinstance(value, (list, tuple)) else value


def _numbers(value: object) -> object:
    """Return what `words` was given; no text of an outcome is one of the three words."""
    if isinstance(value, str) and value in {"nan", "inf", "-inf"}:
        return float(value)
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    return list(map(_numbers, value)) if isinstance(value, list) else value


def as_json(value: object) -> bytes:
    """Return any of the measurement's data as JSON, numbers that are not finite as words, never as null."""
    return msgspec.json.encode(words(msgspec.to_builtins(value)))


def read(path: Path, sources: str) -> dict[str, Outcome]:
    """Return the outcomes of these sources by case, without a line that was cut off when the program was stopped."""
    if not path.exists():
        return {}
    found = {}
    for raw in path.read_bytes().splitlines():
        try:
            line = msgspec.convert(_numbers(msgspec.json.decode(raw)), type=Line)
        except msgspec.DecodeError:  # a ValidationError is one
            continue
        if line.sources == sources:
            found[line.outcome.case] = line.outcome
    return found


def append(path: Path, sources: str, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """Write each outcome as it comes, flushed, and hand it on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("ab", buffering=0) as file:
        if cut:
            file.write(b"\n")  # a line that was cut off stays alone
        for outcome in outcomes:
            file.write(as_json(Line(sources, outcome)) + b"\n")
            yield outcome


def measured_in(published: Path) -> frozenset[str]:
    """Return the ids of the cases that a published accuracy.json holds."""
    found = msgspec.json.decode(published.read_bytes(), type=_Published)
    return frozenset(line.case for line in found.cases)


class _PublishedCase(msgspec.Struct, frozen=True):
    case: str


class _Published(msgspec.Struct, frozen=True):
    cases: list[_PublishedCase]
