"""What `driftprobe diff` and `driftprobe baseline check` print: text for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from driftprobe.difference import Change, Difference, Turn
from driftprobe.json_numbers import finite
from driftprobe.report.text import count, number, printable, times
from driftprobe.snapshot import Part, Snapshot, State

SCHEMA = "driftprobe/diff/1"
SHOWN = 10
"""Taps of each kind that the text names; the JSON has all."""
_SAID = {1: "WORSE", 3: "NOT COMPARED IN FULL", 0: "NOT WORSE"}


def render_text(found: Difference) -> str:
    """Return the lines, a final line end included. Whatever the runs bring in stands on its own line."""
    return "".join(f"{printable(line)}\n" for line in _lines(found))


def _lines(found: Difference) -> Iterator[str]:
    yield f"old: {_run(found.old)}"
    yield f"new: {_run(found.new)}"
    yield from (f"  {_turn(turn)}" for turn in found.turns)
    yield from _some("worse", found.worse)
    yield from _some("better", found.better)
    others = [change for change in found.changes if change not in found.worse and change not in found.better]
    yield from _some("other taps", others)
    yield from (f"  not compared: {line}" for line in found.left_out)
    said = f"{count(len(found.worse), 'tap')} worse, {len(found.better)} better, of {found.compared}"
    yield f"result: {_SAID[found.exit_code]}: {said}; drifts held against the floors of both runs"


def _run(run: Snapshot) -> str:
    engine = run.engine
    parts = (run.verdict, run.date, engine.name, engine.version, engine.model, engine.dtype)
    return "  ".join(part for part in parts if part)


def _turn(turn: Turn) -> str:
    return f"{turn.old.prompt} ({turn.old.mode}): {_finding(turn.old)} → {_finding(turn.new)}"


def _finding(part: Part) -> str:
    at = f" at {part.first_tap}" if part.first_tap else ""
    return f"{part.verdict}{at}" + (f", {part.cause}" if part.cause else "")


def _some(title: str, changes: Sequence[Change]) -> Iterator[str]:
    if changes:
        yield f"{title}:"
    yield from (f"  {_change(change)}" for change in changes[:SHOWN])
    if len(changes) > SHOWN:
        yield f"  and {len(changes) - SHOWN} more"


def _change(change: Change) -> str:
    at = "" if change.tap.at is None else f", position {change.tap.at}"
    where = f"{change.tap.words} of {change.prompt} ({change.mode}){at}"
    sides = " → ".join(_state(state) for state in (change.old, change.new))
    return f"{change.kind.value:<21}{where}: {sides}"


def _state(state: State | None) -> str:
    if state is None:
        return "not recorded"
    excess = None if state.drift is None else state.drift / state.floor
    return f"drift {number(state.drift)}, floor {number(state.floor)} ({times(excess)})"


def render_json(found: Difference) -> str:
    """Return the document: see docs/ci.md. Numbers that are not finite are words, as in verdict.json."""
    body = {
        "schema": SCHEMA,
        "result": {1: "worse", 3: "incomplete", 0: "not worse"}[found.exit_code],
        "old": _head(found.old),
        "new": _head(found.new),
        "compared": found.compared,
        "verdicts": [{**_sides(turn), "worse": turn.worse} for turn in found.turns],
        "worse": [_row(change) for change in found.worse],
        "better": [_row(change) for change in found.better],
        "other": [_row(c) for c in found.changes if c not in found.worse and c not in found.better],
        "not_compared": list(found.left_out),
    }
    return json.dumps(finite(body), indent=2, allow_nan=False) + "\n"


def _head(run: Snapshot) -> dict[str, Any]:
    return {"verdict": run.verdict, "date": run.date, "engine": asdict(run.engine)}


def _sides(turn: Turn) -> dict[str, Any]:
    names = ("verdict", "first_tap", "cause")
    old, new = ({name: getattr(part, name) for name in names} for part in (turn.old, turn.new))
    return {"mode": turn.old.mode, "prompt": turn.old.prompt, "old": old, "new": new}


def _row(change: Change) -> dict[str, Any]:
    tap = change.tap
    return {
        "kind": change.kind.value, "mode": change.mode, "prompt": change.prompt, "rung": tap.rung, "layer": tap.layer,
        "tensor": tap.tensor, "position": tap.at, "old": _measured(change.old), "new": _measured(change.new),
    }  # fmt: skip


def _measured(state: State | None) -> dict[str, Any] | None:
    if state is None:
        return None
    return asdict(state)
