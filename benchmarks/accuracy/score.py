"""From outcomes to rates: detection, false alarms, first taps, diagnoses, each with its Wilson 95 % interval.

Wilson (1927), "Probable inference, the law of succession, and statistical inference": the interval that keeps its level
near 0 and 1, where these rates lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.accuracy.cases import FAULT, Case
from benchmarks.accuracy.outcome import CANNOT_ACT, ERROR, OK, Answer, Outcome
from benchmarks.accuracy.rules import RULES
from driftprobe.faults import FAULTS

BLACK_BOX, LADDER = "driftprobe, ladder off", "driftprobe"
VISIBLE = 100.0
"""A fault counts as one that must be seen where it changes some tap by more than this many times the roundoff."""
FAINT = 0.1
"""The least strength in floors that the bar asks of a coarse dtype with the ladder off."""
BINS = (("< 0.1", 0.0, 0.1), ("0.1–1", 0.1, 1.0), ("1–10", 1.0, 10.0), ("> 10", 10.0, float("inf")))


@dataclass(frozen=True)
class Rate:
    """How many of how many, with the interval that holds the true rate at 95 % confidence."""

    hits: int
    of: int
    low: float
    high: float

    @property
    def value(self) -> float | None:
        """The rate, or None where nothing was counted."""
        return self.hits / self.of if self.of else None


def rate(hits: int, of: int) -> Rate:
    """Return a rate with its Wilson interval; without a count it is anywhere from 0 to 1."""
    if of == 0:
        return Rate(0, 0, 0.0, 1.0)
    from scipy.stats import binomtest

    interval = binomtest(hits, of).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(hits, of, float(interval.low), float(interval.high))


@dataclass(frozen=True)
class Scored:
    """One case and its outcome."""

    case: Case
    outcome: Outcome

    @property
    def is_fault(self) -> bool:
        """Whether the case has a fault that a verdict of MISMATCH must follow; an error leaves it what it is."""
        wanted = self.outcome.wanted
        if self.failed:
            return self.case.kind == FAULT and (bool(self.case.path) or FAULTS[self.case.name].verdict == "MISMATCH")
        return self.case.kind == FAULT and wanted is not None and wanted.verdict == "MISMATCH"

    @property
    def failed(self) -> bool:
        """Whether the run ended in an error: of a fault that is a miss, of any other run an alarm."""
        return self.outcome.status == ERROR

    @property
    def visible(self) -> bool:
        """Whether the fault changes some tap by more than VISIBLE times the roundoff of the highest precision.

        One that ended in an error is taken for such a one: nothing says that it is not.
        """
        change, unit = self.outcome.change, self.outcome.roundoff
        if self.failed:
            return self.is_fault
        return self.is_fault and change is not None and unit is not None and change > VISIBLE * unit

    @property
    def has_cause(self) -> bool:
        """Whether the fault declares a cause. One that no entry of the dictionary is declares none, and is a miss."""
        wanted = self.outcome.wanted
        return self.failed or (wanted is not None and bool(wanted.cause))

    @property
    def family(self) -> str:
        """The fault's family, or the kind of the case."""
        wanted = self.outcome.wanted
        if self.case.path:
            return "paths"
        return wanted.family if wanted is not None and wanted.family else self.case.kind

    @property
    def strength(self) -> str:
        """The bin of the fault's strength, in floors at the tap where it must show first."""
        floors = self.outcome.floors
        return (
            "unknown"
            if floors is None
            else next(name for name, low, high in BINS if low <= floors < high or high == float("inf"))
        )

    def answer(self, rule: str) -> Answer | None:
        """Return what driftprobe said, with the ladder or without; the other rules in the same form."""
        outcome = self.outcome
        if self.failed:  # no tensor was compared: an error is ours, not the other rules'
            return Answer(ERROR, detected=self.case.kind != FAULT) if rule in (LADDER, BLACK_BOX) else None
        if rule == BLACK_BOX:
            return outcome.black_box
        if rule == LADDER:
            return outcome.ladder
        other, wanted = outcome.rules.get(rule), outcome.wanted
        if other is None or wanted is None:
            return None
        exact = other.detected and (other.layer, other.tensor) == (wanted.layer, wanted.tensor)
        return Answer("", layer=other.layer, tensor=other.tensor, detected=other.detected, tap_exact=exact)


def asked(rules: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return every rule that is scored, driftprobe first."""
    return tuple(rules or (LADDER, BLACK_BOX, *(rule.name for rule in RULES)))


@dataclass(frozen=True)
class Row:
    """One rule's rates over some cases."""

    rule: str
    detection: Rate
    false_alarms: Rate
    first_tap: Rate
    """Of all faults: detected, and the tap named is the one."""
    diagnosis: Rate
    """Of all faults: the cause and its parameters are the ones; nobody but driftprobe names any."""


def row(rule: str, scored: Iterable[Scored], counts: Callable[[Scored], bool] = lambda s: s.visible) -> Row:
    """Return a rule's rates; faults count where `counts` says so."""
    faults, benign = [], []
    for item in scored:
        answer = item.answer(rule)
        if item.outcome.status == CANNOT_ACT or answer is None:
            continue
        if item.case.kind != FAULT:
            benign.append(answer)
        elif counts(item):
            faults.append(answer)
    total = len(faults)
    return Row(
        rule,
        rate(sum(a.detected for a in faults), total),
        rate(sum(a.detected for a in benign), len(benign)),
        rate(sum(a.tap_exact for a in faults), total),
        rate(sum(a.cause_exact for a in faults), total),
    )


def groups(scored: Sequence[Scored], key: Callable[[Scored], str]) -> dict[str, list[Scored]]:
    """Return the cases by what `key` says of each, sorted."""
    found: dict[str, list[Scored]] = {}
    for item in scored:
        found.setdefault(key(item), []).append(item)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Target:
    """One line of the bar: what must be reached, and what was."""

    what: str
    target: str
    reached: Rate
    met: bool


def best(item: Scored) -> str:
    """Return the setting that the bar holds a case to: float32 as it is or better, coarser dtypes with the ladder."""
    return LADDER if item.outcome.ladder is not None else BLACK_BOX


def targets(scored: Sequence[Scored]) -> list[Target]:
    """Return every line of the bar. A fault of unknown strength, as its run failed, is in each that it could be in."""
    ran = [item for item in scored if item.outcome.status != CANNOT_ACT]
    harmless = [item for item in ran if item.case.kind != FAULT]
    alarms = [s for s in harmless if any(a is not None and a.detected for a in (s.answer(LADDER), s.answer(BLACK_BOX)))]
    seen = [item for item in ran if item.visible]
    coarse = [item for item in ran if item.is_fault and item.case.dtype != "float32"]
    loud = [item for item in coarse if item.failed or (item.outcome.floors or 0.0) >= 1.0]
    faint = [item for item in coarse if item.failed or FAINT <= (item.outcome.floors or 0.0) < 1.0]
    alarm = rate(len(alarms), len(harmless))
    return [
        Target("false alarms, clean and benign runs, with and without the ladder", "0 of at least 2,000", alarm,
               alarm.hits == 0 and alarm.of >= 2000),
        _share("detection, every dtype, the ladder on: faults beyond 100 × the top rung's roundoff", 1.0, seen, best,
               lambda a: a.detected),
        _share("first failing tap exact, same runs", 0.99, seen, best, lambda a: a.tap_exact),
        _share("diagnosis names the fault and its parameters, same runs", 0.95, seen, best, lambda a: a.cause_exact),
        _share("bfloat16 and float16, ladder off: faults of at least 1 × the floor", 0.99, loud, lambda _: BLACK_BOX,
               lambda a: a.detected),
        _share("bfloat16 and float16, ladder off: faults of 0.1 × to 1 × the floor", 0.70, faint, lambda _: BLACK_BOX,
               lambda a: a.detected),
    ]  # fmt: skip


def unanswered(scored: Iterable[Scored], setting: str) -> Rate:
    """Return how many clean and benign runs end in N/A: no alarm, and no answer either."""
    said = [item.answer(setting) for item in scored if item.outcome.status == OK and item.case.kind != FAULT]
    given = [answer.verdict == "N/A" for answer in said if answer is not None]
    return rate(sum(given), len(given))


def _share(
    what: str, least: float, items: Sequence[Scored], setting: Callable[[Scored], str], hit: Callable[[Answer], bool]
) -> Target:
    answers = [answer for item in items if (answer := item.answer(setting(item))) is not None]
    reached = rate(sum(map(hit, answers)), len(answers))
    aim = "all" if least == 1.0 else f"at least {least:.0%}"
    return Target(what, aim, reached, reached.value is not None and reached.value >= least)


MORE, FEWER = "more detected at no more alarms", "as many detected at fewer alarms"
"""The two ways to be better than another rule; being as good as it is neither."""


def beaten(scored: Sequence[Scored]) -> list[tuple[str, Row, Row, str]]:
    """Return for each other rule its row, driftprobe's on the same cases, and how it is better: MORE, FEWER or not.

    Cases that ended in an error count against driftprobe alone.
    """
    found, failed = [], [s for s in scored if s.failed]
    for rule in RULES:
        asked_too = [s for s in scored if s.outcome.status == OK and s.answer(rule.name) is not None]
        setting = LADDER if any(s.outcome.ladder is not None for s in asked_too) else BLACK_BOX
        same = [s for s in asked_too if s.answer(setting) is not None]
        theirs, ours = row(rule.name, same), row(setting, [*same, *failed])
        found.append((rule.name, theirs, ours, _better(ours, theirs)))
    return found


def _better(ours: Row, theirs: Row) -> str:
    """Return how a row is better than another over the same cases, or an empty text."""
    more, fewer = ours.detection.hits - theirs.detection.hits, theirs.false_alarms.hits - ours.false_alarms.hits
    if more > 0 and fewer >= 0:
        return MORE
    return FEWER if more == 0 and fewer > 0 else ""


def faint_misses(scored: Sequence[Scored]) -> list[tuple[Scored, Answer]]:
    """Return the faults of 0.1 floors and more, in bfloat16 and float16, that are not detected with the ladder off."""
    return [
        (item, answer)
        for item in scored
        if item.outcome.status == OK and item.is_fault and item.case.dtype != "float32"
        if (item.outcome.floors or 0.0) >= FAINT
        if (answer := item.answer(BLACK_BOX)) is not None and not answer.detected
    ]


NO_ENTRY = "no entry of the dictionary"
"""The kind of miss of a fault for which the dictionary has no cause to name."""


def misses(scored: Sequence[Scored]) -> list[tuple[str, Scored, Answer]]:
    """Return every case that is not as it must be, with the kind of miss, in the setting that the bar holds it to."""
    found: list[tuple[str, Scored, Answer]] = []
    for item in scored:
        answer = item.answer(best(item))
        if item.outcome.status != OK or answer is None:
            continue
        if item.case.kind != FAULT:
            for setting in (LADDER, BLACK_BOX):
                said = item.answer(setting)
                if said is not None and said.detected:
                    found.append((f"false alarm ({setting})", item, said))
        elif item.visible:
            if not answer.detected:
                found.append(("not detected", item, answer))
            elif not answer.tap_exact:
                found.append(("another tap", item, answer))
            elif not answer.cause_exact:
                found.append(("no or another diagnosis" if item.has_cause else NO_ENTRY, item, answer))
        elif not item.is_fault and not answer.detected:
            found.append(("another verdict", item, answer))
    return found
