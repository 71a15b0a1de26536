"""Writes the rates down: docs/accuracy.md for people, docs/accuracy.json with every case for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from benchmarks.accuracy import models, score, store
from benchmarks.accuracy.cases import BENIGN, CLEAN, FAULT
from benchmarks.accuracy.outcome import CANNOT_ACT, ERROR, OK, Answer
from benchmarks.accuracy.rules import RULES
from benchmarks.accuracy.score import BLACK_BOX, LADDER, Rate, Row, Scored

SHOWN = 40
"""Misses that the page lists; the JSON has them all."""


def markdown(scored: Sequence[Scored], versions: str, missing: int) -> str:
    """Return the page."""
    parts = [
        "# Accuracy",
        "",
        "How often driftprobe is right, measured on planted faults and on benign variations in many small models, "
        "beside the rules that others use, on the same captured tensors. `make accuracy` measures what is missing and "
        "writes this page and [accuracy.json](accuracy.json), which has every case. Nothing here is typed by hand.",
        "",
        f"Measured with {versions}. {_sample(len(scored), missing)}",
        "",
        *_counts(scored),
        "## The bar",
        "",
        *_bar(scored),
        "## Beside other rules",
        "",
        *_rules(scored),
        *_settings(scored),
        "## Benign variations",
        "",
        *_benign(scored),
        "## Misses",
        "",
        *_misses(scored),
        "### Ladder off",
        "",
        *_faint_misses(scored),
    ]
    return "\n".join(parts) + "\n"


def _sample(measured: int, missing: int) -> str:
    """Return how much of the full set the page stands on."""
    everything = measured + missing
    return f"{measured:,} of the full set's {everything:,} cases are measured" + (
        f"; the other {missing:,} were not drawn, or not reached." if missing else ": all of them."
    )


def _counts(scored: Sequence[Scored]) -> list[str]:
    states = Counter((item.case.kind, item.outcome.status) for item in scored)
    rows = [
        [kind, *(f"{states[(kind, status)]:,}" for status in (OK, CANNOT_ACT, ERROR))]
        for kind in (FAULT, BENIGN, CLEAN)
    ]
    seconds = sum(item.outcome.seconds for item in scored)
    return [
        *_table(["kind", "measured", "cannot act there", "errors"], rows),
        f"{seconds / 3600:.2f} hours of one core, {seconds / max(len(scored), 1):.2f} s a case. "
        f"Tuned on: {', '.join(models.TUNED)} with seeds {_words(models.TUNED_SEEDS)}. "
        f"Held out, only reported: {', '.join(models.HELD_OUT)}, and every model with seeds "
        f"{_words(models.HELD_OUT_SEEDS)}.",
        "",
        *_CAVEATS,
        "*cannot act there*: the fault or variation changes not one bit in that model (a position fault without "
        "positions, a router tie without a router) and is refused with its reason.",
        "",
    ]


_CAVEATS = (
    "*held out* refers to what this measurement's faults, their diagnoses and the thresholds of the "
    "[local test](decisions/0004-local-test.md) and the [matched filters](decisions/0005-matched-filters.md) were "
    "developed on. It is no promise for clean runs: the floor's `LIMIT` was calibrated earlier on clean runs of 20 "
    "architectures ([decision](decisions/0003-limit.md)), held-out ones included, and the local test was looked at on "
    "clean runs of 12.",
    "",
    "Each case runs on one thread. The controls `P@threads`, `D@threads`, `P@batch` and `D@batch` are left out of the "
    "cases: other threads and a batch are benign variations of their own.",
    "",
)


def _bar(scored: Sequence[Scored]) -> list[str]:
    rows = [[t.what, t.target, _rate(t.reached), "met" if t.met else "**missed**"] for t in score.targets(scored)]
    for name, theirs, ours, better in score.beaten(scored):
        rows.append(
            [
                f"beats {name}: more detected at no more alarms, or as many at fewer alarms",
                f"{_percent(theirs.detection)} detected, {theirs.false_alarms.hits} alarms",
                f"{_percent(ours.detection)} detected, {ours.false_alarms.hits} alarms",
                f"met: {better}" if better else "**missed**",
            ]
        )
    return [*_table(["", "target", "reached", ""], rows), *_unanswered(scored), *_without_entry(scored)]


def _unanswered(scored: Sequence[Scored]) -> list[str]:
    """Return how often there was no answer, and how that and an error count."""
    on, off = (_rate(score.unanswered(scored, setting)) for setting in (LADDER, BLACK_BOX))
    return [
        f"N/A, clean and benign runs: {on} with the ladder, {off} without. That is no alarm; of a fault it is a miss.",
        "",
        "A run that ends in an error is a miss in every line where its fault could stand, and an alarm where it has "
        "none.",
        "",
    ]


def _without_entry(scored: Sequence[Scored]) -> list[str]:
    """Return which faults no diagnosis can name, and that they are counted."""
    names = Counter(item.case.name for item in scored if item.visible and not item.has_cause)
    if not names:
        return []
    told = ", ".join(f"`{name}` ({count})" for name, count in sorted(names.items()))
    return [
        f"The fault dictionary has no entry for {told}. Each such run is a miss of the diagnosis here and in every "
        "table below.",
        "",
    ]


def _rules(scored: Sequence[Scored]) -> list[str]:
    sources = [f"- **{rule.name}**: {rule.source}." for rule in RULES]
    return [
        "Faults that change some tap by more than 100 × the roundoff of the highest precision measured. Rates with "
        "their Wilson 95 % intervals. A rule sees every tap's pair of prefill and decode in order of execution, or the "
        "logits alone where it is a rule of logits. A fault that only a longer prefill has (`length_dependent` after "
        "a short prompt) is in neither of the pair: those rules cannot see it, and it counts here all the same.",
        "",
        *_table(_HEAD, [_row(score.row(rule, scored)) for rule in score.asked()]),
        *sources,
        "",
    ]


_HEAD = ["rule", "detected", "false alarms", "first tap exact", "diagnosis exact"]


def _row(found: Row) -> list[str]:
    ours = found.rule in (LADDER, BLACK_BOX)
    return [
        f"**{found.rule}**" if ours else found.rule,
        _rate(found.detection),
        _rate(found.false_alarms),
        _rate(found.first_tap),
        _rate(found.diagnosis) if ours else "none given",
    ]


_CUTS: tuple[tuple[str, Callable[[Scored], str]], ...] = (
    ("dtype", lambda item: item.case.dtype),
    ("family", lambda item: item.family),
    ("strength in floors", lambda item: item.strength),
    ("architecture", lambda item: item.case.architecture),
    ("tuned or held out", lambda item: "held out" if item.case.held_out else "tuned"),
)


def _settings(scored: Sequence[Scored]) -> list[str]:
    found = []
    faults = [item for item in scored if item.case.kind == FAULT]
    for title, key in _CUTS:
        chosen = faults if title in ("family", "strength in floors") else scored
        rows = []
        for name, members in score.groups(chosen, key).items():
            for setting in (LADDER, BLACK_BOX):
                one = score.row(setting, members, counts=lambda item: item.is_fault and item.visible)
                if one.detection.of or one.false_alarms.of:
                    rows.append([name, "on" if setting == LADDER else "off", *_row(one)[1:]])
        found += [f"## By {title}", "", *_table([title, "ladder", *_HEAD[1:]], rows)]
    return found


def _benign(scored: Sequence[Scored]) -> list[str]:
    rows = []
    for name, members in score.groups([s for s in scored if s.case.kind != FAULT], _variation).items():
        counts = [score.row(rule, members).false_alarms for rule in score.asked()]
        title = "nothing at all" if name == "none" else name
        rows.append([title, str(max(count.of for count in counts)), *(f"{count.hits}" for count in counts)])
    return ["False alarms, by variation and rule.", "", *_table(["variation", "runs", *score.asked()], rows)]


def _variation(item: Scored) -> str:
    return f"paths: {item.case.path}" if item.case.path else item.case.name


def _misses(scored: Sequence[Scored]) -> list[str]:
    found = score.misses(scored)
    errors = [item for item in scored if item.outcome.status == ERROR]
    kinds = Counter((kind, item.case.name) for kind, item, _ in found)
    if not found and not errors:
        return ["None.", ""]
    summary = [[kind, name, str(count)] for (kind, name), count in kinds.most_common()]
    rows = [[kind, f"`{item.case.id}`", _said(answer), _must(item)] for kind, item, answer in found[:SHOWN]]
    rows += [["error", f"`{item.case.id}`", item.outcome.detail, ""] for item in errors[:SHOWN]]
    return [
        *_table(["miss", "fault or variation", "runs"], summary),
        f"{len(found)} misses and {len(errors)} errors, the first {min(len(found), SHOWN)} and "
        f"{min(len(errors), SHOWN)} of them here. `python -m benchmarks.accuracy --replay ID` runs one again.",
        "",
        *_table(["miss", "case", "found", "must be"], rows),
    ]


def _faint_misses(scored: Sequence[Scored]) -> list[str]:
    """Return what the run alone misses in the coarse dtypes, by fault; the list above holds no case to that."""
    names = Counter(item.case.name for item, _ in score.faint_misses(scored))
    lead = f"Faults of at least {score.FAINT:g} × the floor in bfloat16 and float16, not detected with the ladder off: "
    if not names:
        return [f"{lead}none.", ""]
    rows = [[name, str(count)] for name, count in names.most_common()]
    return [f"{lead}{names.total():,} runs.", "", *_table(["fault", "runs"], rows)]


def _said(answer: Answer) -> str:
    parameters = ", ".join(f"{name} {value}" for name, value in answer.parameters.items())
    return f"{answer.verdict}, {_place(answer.layer, answer.tensor)}, {answer.cause or 'no cause'} {parameters}".strip()


def _must(item: Scored) -> str:
    wanted = item.outcome.wanted
    assert wanted is not None
    if item.case.kind != FAULT:
        return wanted.verdict
    parameters = ", ".join(f"{name} {value}" for name, value in wanted.parameters.items())
    floors = "" if item.outcome.floors is None else f"; {item.outcome.floors:.3g} floors"
    return f"{wanted.verdict}, {_place(wanted.layer, wanted.tensor)}, {wanted.cause} {parameters}".strip() + floors


def _place(layer: int | None, tensor: str | None) -> str:
    if tensor is None:
        return "no tap"
    return tensor if layer is None else f"layer {layer} {tensor}"


def _rate(found: Rate) -> str:
    if not found.of:
        return "–"
    return f"{_percent(found)} ({found.hits:,}/{found.of:,}; {found.low:.1%}–{found.high:.1%})"


def _percent(found: Rate) -> str:
    return "–" if found.value is None else f"{found.value:.2%}"


def _words(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(cell.replace('|', '∣') for cell in row)} |" for row in rows]
    return [*lines, ""]


def as_json(scored: Sequence[Scored], versions: str, missing: int) -> bytes:
    """Return everything that was measured, case by case, and the bar."""
    body = {
        "schema": "driftprobe/accuracy/1",
        "versions": versions,
        "not_measured": missing,
        "targets": [
            {"what": t.what, "target": t.target, "hits": t.reached.hits, "of": t.reached.of, "low": t.reached.low,
             "high": t.reached.high, "met": t.met}
            for t in score.targets(scored)
        ],
        "not_available": {setting: score.unanswered(scored, setting) for setting in (LADDER, BLACK_BOX)},
        "rules": {rule: score.row(rule, scored) for rule in score.asked()},
        "misses_ladder_off": [item.case.id for item, _ in score.faint_misses(scored)],
        "misses": [{"kind": kind, "case": item.case.id} for kind, item, _ in score.misses(scored)],
        "cases": [{"held_out": item.case.held_out, **msgspec.to_builtins(item.outcome)} for item in scored],
    }  # fmt: skip
    return msgspec.json.format(store.as_json(body), indent=0)


def write(scored: Sequence[Scored], versions: str, missing: int, folder: Path) -> None:
    """Write both files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accuracy.md").write_text(markdown(scored, versions, missing), encoding="utf-8")
    (folder / "accuracy.json").write_bytes(as_json(scored, versions, missing) + b"\n")
