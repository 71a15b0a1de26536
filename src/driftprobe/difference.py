"""difference(): what got worse between two runs of one engine, tap by tap, held against the floors of both.

A drift that moved within what rounding explains did not get worse, however much it moved. A floor that rose is no
excuse: what is beyond the old floor and within the new one is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from driftprobe.errors import UsageError
from driftprobe.floor import LIMIT
from driftprobe.judgement import Status, Verdict
from driftprobe.snapshot import Facts, Part, Snapshot, State, Tap


class Kind(str, Enum):
    """What became of one tap."""

    FAILS_NOW = "fails now"
    FAILS_BY_MORE = "fails by more"
    BEYOND_OLD_FLOOR = "beyond the old floor"
    NO_LONGER_TOLD = "no longer told"
    MENDED = "mended"
    FAILS_BY_LESS = "fails by less"
    LOST = "no longer recorded"
    NEW = "recorded only now"


WORSE = frozenset((Kind.FAILS_NOW, Kind.FAILS_BY_MORE, Kind.BEYOND_OLD_FLOOR, Kind.NO_LONGER_TOLD))
BETTER = frozenset((Kind.MENDED, Kind.FAILS_BY_LESS))


@dataclass(frozen=True, slots=True)
class Change:
    """One tap that did not stay as it was."""

    mode: str
    prompt: str
    tap: Tap
    kind: Kind
    old: State | None
    new: State | None


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt in one mode whose verdict, first tap or cause is another."""

    old: Part
    new: Part

    @property
    def worse(self) -> bool:
        """Whether the verdict is graver: a pass before what cannot be told before a mismatch."""
        return _gravity(self.new) > _gravity(self.old)


@dataclass(frozen=True, slots=True)
class Difference:
    """Everything that changed from one run to another."""

    old: Snapshot
    new: Snapshot
    compared: int
    """Taps of steps that both runs have."""
    changes: tuple[Change, ...]
    """In order of mode, prompt and execution."""
    turns: tuple[Turn, ...]
    left_out: tuple[str, ...]
    """What of the old run could not be compared, and why."""

    @property
    def worse(self) -> tuple[Change, ...]:
        """The changes for the worse."""
        return tuple(change for change in self.changes if change.kind in WORSE)

    @property
    def better(self) -> tuple[Change, ...]:
        """The changes for the better."""
        return tuple(change for change in self.changes if change.kind in BETTER)

    @property
    def complete(self) -> bool:
        """Whether all that the old run had was compared."""
        return not self.left_out and not any(change.kind is Kind.LOST for change in self.changes)

    @property
    def got_worse(self) -> bool:
        """Whether any tap or any verdict got worse."""
        return bool(self.worse) or any(turn.worse for turn in self.turns)

    @property
    def exit_code(self) -> int:
        """1 where something got worse, 3 where something could not be compared, else 0."""
        return 1 if self.got_worse else 0 if self.complete else 3


def difference(old: Snapshot, new: Snapshot) -> Difference:
    """Return what changed. Raises UsageError where the two are no runs of one engine, or have nothing in common."""
    _check_alike(old.engine, new.engine)
    theirs = {part.name: part for part in new.parts}
    if not any(part.name in theirs for part in old.parts):
        raise UsageError(
            "the runs have nothing in common", where="OLD and NEW", measured=f"{_names(old)}; {_names(new)}",
            allowed="at least one prompt of one mode in both", next_step="run the same prompts and modes again",
        )  # fmt: skip
    left_out, turns, compared = [], [], 0
    changes: list[Change] = []
    for part in old.parts:
        twin = theirs.get(part.name)
        why = "not in the new run" if twin is None else _not_comparable(part, twin)
        if twin is not None and _finding(part) != _finding(twin):
            turns.append(Turn(part, twin))
        if why or twin is None:
            left_out.append(f"{part.prompt} ({part.mode}): {why}")
            continue
        changes += _changes(part, twin)
        compared += len(part.taps.keys() & twin.taps.keys())
    return Difference(old, new, compared, tuple(changes), tuple(turns), tuple(left_out))


def _check_alike(old: Facts, new: Facts) -> None:
    for name in ("name", "dtype", "layers"):
        sides = getattr(old, name), getattr(new, name)
        if sides[0] != sides[1]:
            raise UsageError(
                "not two runs of one engine", where=f"engine, {name}", measured=f"{sides[0]} and {sides[1]}"[:200],
                allowed="the same engine, dtype and number of layers, at two commits",
                next_step="`driftprobe compare OLD NEW` compares two engines on the same tokens",
            )  # fmt: skip


def _names(found: Snapshot) -> str:
    return ", ".join(f"{part.prompt} ({part.mode})" for part in found.parts[:4])[:200] or "nothing"


def _not_comparable(old: Part, new: Part) -> str:
    """Return why the taps of two parts cannot be held against each other; empty where they can."""
    for which, part in (("old", old), ("new", new)):
        if part.verdict == Verdict.NOT_AVAILABLE.value:
            return f"the {which} run's verdict is N/A"
    if old.tokens and new.tokens and old.tokens != new.tokens:
        return "other tokens were fed: the engine chose another next token, or the prompt changed"
    return ""


def _finding(part: Part) -> tuple[str, str, str]:
    return part.verdict, part.first_tap, part.cause


def _gravity(part: Part) -> int:
    return {Verdict.MISMATCH.value: 2, Verdict.NOT_AVAILABLE.value: 1}.get(part.verdict, 0)


def _changes(old: Part, new: Part) -> Iterator[Change]:
    """Yield the taps of one prompt that did not stay as they were; those of the old run first."""
    for tap in _all(old.taps, new.taps):
        before, after = old.taps.get(tap), new.taps.get(tap)
        kind = _kind(before, after)
        if kind is not None:
            yield Change(old.mode, old.prompt, tap, kind, before, after)


def _all(old: Iterable[Tap], new: Iterable[Tap]) -> tuple[Tap, ...]:
    return tuple(dict.fromkeys((*old, *new)))


def _kind(old: State | None, new: State | None) -> Kind | None:
    if old is None or new is None:
        return Kind.NEW if old is None else Kind.LOST
    fails, failed = (state.status == Status.FAIL.value for state in (new, old))
    told, was_told = (state.status != Status.UNKNOWN.value for state in (new, old))
    if not told:
        return Kind.NO_LONGER_TOLD if was_told else None
    moved = _moved(old, new)
    if fails:
        return Kind.FAILS_NOW if not failed else Kind.FAILS_BY_MORE if moved > 0 else _less(moved)
    if _beyond(new, old.floor) and (moved >= 0 if failed else not _beyond(old, old.floor)):
        return Kind.BEYOND_OLD_FLOOR  # a floor that rose over a failure mends nothing
    return Kind.MENDED if failed else None


def _beyond(state: State, floor: float) -> bool:
    return state.drift is not None and state.drift > LIMIT * floor


def _less(moved: int) -> Kind | None:
    return Kind.FAILS_BY_LESS if moved < 0 else None


def _moved(old: State, new: State) -> int:
    """Return 1 or -1 where the drift rose or fell by more than either floor's limit, else 0."""
    if old.drift is None or new.drift is None or old.drift == new.drift:
        return 0
    allowed = LIMIT * max(old.floor, new.floor)
    return 0 if abs(new.drift - old.drift) <= allowed else 1 if new.drift > old.drift else -1
