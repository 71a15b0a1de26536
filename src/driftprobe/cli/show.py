"""What the terminal shows of a result: the verdict, why, the limits, and where to look next."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from driftprobe.errors import TraceError
from driftprobe.judgement import Impact, Judgement, ModeJudgement, Status, Verdict
from driftprobe.report.facts import FILES
from driftprobe.report.ladder import ladder_words
from driftprobe.report.terminal_map import BEYOND, LEGEND, UNTOLD, terminal_map
from driftprobe.result import Result
from driftprobe.taps import PATHS

EXIT_CODES = {
    Verdict.NO_DRIFT: 0,
    Verdict.STRUCTURAL_DRIFT: 0,
    Verdict.MISMATCH: 1,
    Verdict.NOT_AVAILABLE: 3,
}
EXPLAINED = {
    Verdict.MISMATCH: "docs/reading-a-report.md",
    Verdict.NOT_AVAILABLE: "docs/troubleshooting.md, “The verdict is N/A”",
}
"""Where a verdict that asks for something to be done is explained."""
_STYLES = {
    Verdict.NO_DRIFT: "bold green",
    Verdict.STRUCTURAL_DRIFT: "bold green",
    Verdict.MISMATCH: "bold red",
    Verdict.NOT_AVAILABLE: "bold yellow",
}
_MEANING = {
    Verdict.NO_DRIFT: "prefill and decode agree bit for bit",
    Verdict.STRUCTURAL_DRIFT: "they differ, and rounding explains all of it: no bug above the detection limit",
    Verdict.MISMATCH: "they differ by more than rounding explains: a bug",
    Verdict.NOT_AVAILABLE: "this cannot be told from these traces",
}


def show(result: Result, console: Console) -> int:
    """Print a result and return the exit code that goes with it."""
    judgement = result.judgement
    console.print(_modes(judgement))
    verdict = judgement.verdict
    line = Text("verdict: ").append(verdict.value, _STYLES[verdict]).append(f" — {_meaning(judgement)}")
    console.print(line, soft_wrap=True)
    for label, text in _lines(result):
        console.print(Text(f"  {label + ':':<17}{text}"), soft_wrap=True)
    for error in _incomplete(judgement):
        click.echo(str(error), err=True)
    return EXIT_CODES[verdict]


def show_reports(root: Path, console: Console) -> None:
    """Print where the reports of a run lie."""
    for label, which in (("report", "final"), ("page", "html")):
        console.print(f"  {label + ':':<17}{(root / FILES[which]).as_posix()}", soft_wrap=True)


def open_page(root: Path) -> None:
    """Open the page of a run in the browser, or say that there is none."""
    import webbrowser

    page = root / FILES["html"]
    if not webbrowser.open(page.resolve().as_uri()):
        click.echo(f"no browser was found to open {page.as_posix()}", err=True)


def show_map(judgement: Judgement, console: Console) -> None:
    """Print the map: layers down, taps across, the gravest of all prompts, modes and steps."""
    found = terminal_map(judgement, console.width)
    if found is None:
        return
    console.print(Text(f"{found.head}   (a layer a line, a tap a letter)", "dim"), no_wrap=True, overflow="crop")
    for label, marks in found.lines:
        line = Text(f"{label}  ", "dim")
        for mark in marks:
            line.append(mark, {BEYOND: "bold red", UNTOLD: "yellow"}.get(mark, "blue"))
        console.print(line, no_wrap=True, overflow="crop")
    for words in (*found.key, *([f"and {found.cut} taps more"] if found.cut else []), LEGEND):
        console.print(Text(f"  {words}", "dim"))


def _meaning(judgement: Judgement) -> str:
    """Return the verdict in words; two paths or two engines are a reference and a candidate, not prefill and decode."""
    words = _MEANING[judgement.verdict]
    return words.replace("prefill and decode", "reference and candidate") if set(judgement.modes) == {PATHS} else words


def _incomplete(judgement: Judgement) -> list[TraceError]:
    """Return a five-part message for each trace that has no end."""
    return [
        TraceError(
            "the trace is incomplete",
            where=item.file,
            measured=gate.detail,
            allowed="a footer whose counts and digest fit the lines before it",
            next_step="run that prompt and mode again; the verdict is N/A until then",
        )
        for mode in judgement.modes.values()
        for item in mode.prompts
        for gate in item.gates
        if gate.name == "complete" and not gate.passed
    ]


def _modes(judgement: Judgement) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("mode", "verdict", "pairs", "pass", "fail", "unknown", "unpaired", "excess"):
        table.add_column(column, justify="left" if column in {"mode", "verdict"} else "right", no_wrap=True)
    for mode in judgement.modes.values():
        counts = [str(mode.count(s)) for s in (Status.PASS, Status.FAIL, Status.UNKNOWN)]
        table.add_row(mode.mode, Text(mode.verdict.value, _STYLES[mode.verdict]), str(mode.pairs), *counts,
                      str(mode.unpaired), _excess(mode))  # fmt: skip
    return table


def _excess(mode: ModeJudgement) -> str:
    known = [cell.excess for cell in mode.cells if cell.excess is not None]
    return f"×{max(known):.3g}" if known else "unknown"


def _lines(result: Result) -> list[tuple[str, str]]:
    judgement = result.judgement
    lines = [("why", judgement.reason)]
    if judgement.first_failure is not None:
        lines.append(("root cause", judgement.first_failure.root_cause))
    if judgement.limits is not None:
        limits = judgement.limits
        lines.append(("detection limit", f"{limits.smallest:.2e} ({limits.smallest_at}) to {limits.largest:.2e} "
                      f"({limits.largest_at}), relative"))  # fmt: skip
    if judgement.ladders:
        lines.append(("ladder", ladder_words(judgement)))
    if judgement.impact is not None:
        lines.append(("impact", impact_in_words(judgement.impact)))
    return lines


def impact_in_words(impact: Impact) -> str:
    """Return the impact on the logits in a line."""
    parts = []
    if impact.kl is not None:
        parts.append(f"KL {impact.kl:.2e} nats")
    if impact.max_abs_dlogit is not None:
        parts.append(f"max |Δlogit| {impact.max_abs_dlogit:.2e}")
    if impact.top1_agree is not None:
        parts.append("same top-1 token" if impact.top1_agree else f"another top-1 token ({impact.flip})")
    if impact.margin is not None:
        parts.append(f"margin {impact.margin:.3g}")
    return ", ".join(parts) or "unknown: the trace has no logits"
