"""Snapshot: a run in small, verdicts and each tap's drift beside its floor; what `diff` and `baseline` compare.

A baseline file is a collapsed snapshot as JSON: of each tap the worst step alone, one tap a line, so that a change
shows in a review.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgspec

from driftprobe.errors import TraceError
from driftprobe.json_numbers import finite, number
from driftprobe.judgement import Cell, Judgement, Status, TraceJudgement
from driftprobe.taps import place
from driftprobe.trace import Trace

SCHEMA = "driftprobe/baseline/1"
_GRAVITY = (Status.PASS.value, Status.UNKNOWN.value, Status.FAIL.value)
_DIGITS = 4
"""Significant digits of a drift and a floor in a file: far finer than the factor LIMIT that decides."""


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a drift was measured."""

    rung: str
    """Empty for the run itself, else the ladder's rung."""
    layer: int | None
    tensor: str
    at: int | None
    """Absolute position of the token, or the step where the trace names none; None for the worst of all."""

    @property
    def words(self) -> str:
        """The place in words."""
        return place(self.layer, self.tensor) + (f" in {self.rung}" if self.rung else "")


@dataclass(frozen=True, slots=True)
class State:
    """What was measured at a tap."""

    drift: float | None
    """Relative L2 distance; None where it cannot be told."""
    floor: float
    status: str
    """`pass`, `fail` or `unknown`."""

    @property
    def rank(self) -> tuple[int, float]:
        """Sort key: the gravest status, then the largest excess."""
        return _GRAVITY.index(self.status), -1.0 if self.drift is None else self.drift / self.floor


@dataclass(frozen=True, slots=True)
class Part:
    """One prompt in one mode."""

    mode: str
    prompt: str
    verdict: str
    first_tap: str
    """Empty where nothing failed."""
    cause: str
    """The diagnosis' name; empty where there is none."""
    tokens: str
    """Digest of the token ids that were fed; empty where the trace does not name them."""
    taps: dict[Tap, State] = field(default_factory=dict)

    @property
    def name(self) -> tuple[str, str]:
        """Mode and prompt."""
        return self.mode, self.prompt


@dataclass(frozen=True, slots=True)
class Facts:
    """What ran."""

    name: str
    version: str
    model: str
    dtype: str
    attention: str
    layers: int
    device: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run in small."""

    verdict: str
    date: str
    engine: Facts
    parts: tuple[Part, ...]

    def collapsed(self) -> Snapshot:
        """Return the same with the worst of all steps and positions at each tap."""
        return replace(self, parts=tuple(replace(part, taps=_worst(part.taps.items())) for part in self.parts))


def snapshot(judgement: Judgement, traces: Sequence[Trace]) -> Snapshot:
    """Return a run in small."""
    parts = tuple(_part(item) for mode in judgement.modes.values() for item in mode.prompts)
    header = traces[0].header
    facts = Facts(**{name: getattr(header.engine, name) for name in Facts.__dataclass_fields__})
    return Snapshot(judgement.verdict.value, header.date, facts, parts)


def _part(item: TraceJudgement) -> Part:
    first = item.first_failure
    taps = dict(_states("", item.cells))
    if item.ladder is not None:
        taps.update(_states(item.ladder.rung, item.ladder.judged.cells))
    ids = ",".join(map(str, item.token_ids))
    return Part(
        mode=item.mode,
        prompt=item.prompt,
        verdict=item.verdict.value,
        first_tap="" if first is None else place(first.layer, first.tensor),
        cause=first.diagnosis.cause if first is not None and first.diagnosis is not None else "",
        tokens=hashlib.sha256(ids.encode()).hexdigest()[:16] if ids else "",
        taps=taps,
    )


def _states(rung: str, cells: Iterable[Cell]) -> Iterable[tuple[Tap, State]]:
    for cell in cells:
        position = cell.candidate.logical_tok_idx
        tap = Tap(rung, cell.layer, cell.tensor, cell.step if position is None else position)
        yield tap, State(cell.drift.value, cell.floor.value, cell.status.value)


def _worst(items: Iterable[tuple[Tap, State]]) -> dict[Tap, State]:
    found: dict[Tap, State] = {}
    for tap, state in items:
        anywhere = replace(tap, at=None)
        if anywhere not in found or state.rank > found[anywhere].rank:
            found[anywhere] = state
    return found


# ---- the file


def encode(found: Snapshot, version: str) -> str:
    """Return the baseline file of a snapshot: keys in order, a tap a line, numbers of four digits."""
    head = {"schema": SCHEMA, "driftprobe": version, "verdict": found.verdict, "date": found.date,
            "engine": asdict(found.engine)}  # fmt: skip
    lines = [f"  {json.dumps(key)}: {_json(value)}," for key, value in head.items()]
    parts = ",\n".join(map(_encode_part, found.collapsed().parts))
    return "{\n" + "\n".join(lines) + '\n  "parts": [\n' + parts + "\n  ]\n}\n"


def _encode_part(part: Part) -> str:
    names = ("mode", "prompt", "verdict", "first_tap", "cause", "tokens")
    lines = [f"      {json.dumps(name)}: {_json(getattr(part, name))}," for name in names]
    rows = (
        [tap.rung, tap.layer, tap.tensor, _number(state.drift), _number(state.floor), state.status]
        for tap, state in part.taps.items()
    )
    taps = ",\n".join(f"        {_json(row)}" for row in rows)
    return "    {\n" + "\n".join(lines) + '\n      "taps": [' + (f"\n{taps}\n      " if taps else "") + "]\n    }"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False)


def _number(value: float | None) -> float | str | None:
    """Return a number of four digits; one that is not finite in its word."""
    rounded: float | str | None = finite(None if value is None else float(f"{value:.{_DIGITS}g}"))
    return rounded


_Number = float | str | None


@dataclass(frozen=True, slots=True)
class _FilePart:
    mode: str
    prompt: str
    verdict: str
    first_tap: str
    cause: str
    tokens: str
    taps: list[tuple[str, int | None, str, _Number, _Number, str]]


@dataclass(frozen=True, slots=True)
class _File:
    schema: str
    verdict: str
    date: str
    engine: Facts
    parts: list[_FilePart]


def decode(raw: bytes, where: str) -> Snapshot:
    """Return the snapshot of a baseline file. Raises TraceError where it is none."""
    try:
        body = msgspec.json.decode(raw, type=_File)
        if body.schema != SCHEMA:
            raise ValueError(f"schema {body.schema!r}")
        parts = tuple(map(_decode_part, body.parts))
        if len({part.name for part in parts}) != len(parts):
            raise ValueError("a mode and prompt twice")
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise TraceError("not a baseline", where=where, measured=str(error)[:300], allowed=f"a file of schema {SCHEMA}",
                         next_step="`driftprobe baseline save RUN FILE` writes one") from error  # fmt: skip
    return Snapshot(body.verdict, body.date, body.engine, parts)


def _decode_part(part: _FilePart) -> Part:
    taps = {}
    for rung, layer, tensor, drift, floor, status in part.taps:
        tap, size = Tap(rung, layer, tensor, None), number(floor)
        if size is None or not size > 0.0 or status not in _GRAVITY or tap in taps:
            raise ValueError(
                f"{part.mode}, {part.prompt}: {tap.words}: a floor that is no size, a status, or a tap twice"
            )
        taps[tap] = State(number(drift), size, status)
    return Part(part.mode, part.prompt, part.verdict, part.first_tap, part.cause, part.tokens, taps)
