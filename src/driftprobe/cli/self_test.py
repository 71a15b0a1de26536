"""driftprobe self-test: one fault of each family planted in the user's own model, and what could have been seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date as calendar
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from driftprobe.artifacts import check_place, place_of
from driftprobe.cli.engine_options import engine_options, opened
from driftprobe.cli.progress import bar_on
from driftprobe.engines.base import Engine
from driftprobe.selftest import SelfTest, Trial, run_self_test
from driftprobe.selftest.render import limit_in_words, outcome_in_words, strength_in_words

_EPILOG = """\b
Examples:
  driftprobe self-test
  driftprobe self-test --model ./my-llama --dtype bfloat16

\b
Reports go to OUT/DATE/NAME: SELF_TEST.md, self_test.json and the run without a fault. Exit codes: 0 if that run is
clean and the probe fires for every family of faults that can act in the model, 1 if not, 2 bad input.
"""


@click.command(epilog=_EPILOG)
@engine_options
@click.option("--ladder", default="auto", show_default=True, help="Run everything again in float64: auto, on, off.")
@click.option("--date", default=None, help="Folder of the run under OUT. Default: today.")
@click.option("--name", default="self_test", show_default=True, help="Name of the run.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("artifacts"), show_default=True, help="Where runs go."
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    engine: str, model: str, dtype: str | None, attn: str | None, config: str | None, flash_attn: str | None,
    cache_type: str | None, threads: int | None, ladder: str, date: str | None, name: str, out: Path, quiet: bool,
) -> None:  # fmt: skip
    """Plant one fault of each family in the model, show that the probe fires, and print what it could have seen."""
    root = place_of(out, date or calendar.today().isoformat(), name)
    check_place(root)
    loaded = opened(engine, model, dtype=dtype, attn=attn, config=config, flash_attn=flash_attn, cache_type=cache_type,
                    threads=threads)  # fmt: skip
    code = run_and_show(loaded, root, ladder, quiet)
    click.get_current_context().exit(code)


def run_and_show(engine: Engine, root: Path, ladder: str, quiet: bool) -> int:
    """Run the self-test, print it, and return the exit code."""
    with _bar(quiet) as bar:
        task = bar.add_task("self-test", total=None)
        found = run_self_test(
            engine,
            ladder=ladder,
            out=root,
            told=lambda done, of, what: bar.update(task, completed=done, total=of, description=what),
        )
    show(found, Console(highlight=False))
    click.echo(f"report: {(root / 'SELF_TEST.md').as_posix()}")
    return 0 if found.passed else 1


@contextmanager
def _bar(quiet: bool) -> Iterator[Progress]:
    console = Console(stderr=True)
    with bar_on(console, disable=quiet or not console.is_terminal) as bar:
        yield bar


def show(found: SelfTest, console: Console) -> None:
    """Print the trials, the limits and the outcome."""
    console.print(f"{found.model}  {found.dtype}: without a fault {found.clean.value}", soft_wrap=True)
    console.print(_trials(found))
    for trial in found.trials:
        if trial.reason:
            console.print(f"{trial.family}: {trial.reason}", style="dim", soft_wrap=True)
    console.print(_limits(found))
    acted = [trial for trial in found.trials if trial.acted]
    fired = sum(trial.fired for trial in acted)
    line = Text("self-test: ").append(
        "PASSED" if found.passed else "FAILED", "bold green" if found.passed else "bold red"
    )
    line.append(f" — {fired} of {len(acted)} families seen, {sum(t.located for t in acted)} at the expected tap, "
                f"{sum(t.cause_agrees for t in acted)} with their cause")  # fmt: skip
    console.print(line, soft_wrap=True)


def _trials(found: SelfTest) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("family", "fault", "strength", "fired", "excess", "found at", "cause"):
        table.add_column(column, overflow="fold", no_wrap=column in {"family", "fault", "fired", "excess"})
    for trial in found.trials:
        table.add_row(*_cells(trial))
    return table


def _cells(trial: Trial) -> tuple[str | Text, ...]:
    fired = outcome_in_words(trial)
    style = {"yes": "green", "NO": "bold red"}.get(fired, "dim")
    if not trial.acted:
        return (trial.family, "", "", Text(fired, style))
    excess = "" if trial.excess is None else f"×{trial.excess:.1e}"
    named = trial.cause_agrees or not trial.expected_cause
    return (trial.family, trial.fault, strength_in_words(trial), Text(fired, style), excess,
            _beside(trial.found_at, trial.expected_at, trial.located),
            _beside(trial.cause or "none", trial.expected_cause, named))  # fmt: skip


def _beside(found: str, expected: str, agrees: bool) -> str:
    return found if agrees else f"{found} (expected {expected})"


def _limits(found: SelfTest) -> Table:
    """Best and worst over the layers; SELF_TEST.md has every layer."""
    table = Table(box=None, pad_edge=False, header_style="dim", title="detection limit (at the ladder's rung)",
                  title_justify="left")  # fmt: skip
    for column in ("tap", "best", "in layer", "worst", "in layer"):
        table.add_column(column)
    for tap, (best, worst) in found.by_tap.items():
        cells = (str(cell) for x in (best, worst) for cell in (limit_in_words(x), "" if x.layer is None else x.layer))
        table.add_row(tap, *cells)
    return table
