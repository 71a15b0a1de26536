"""Progress on the error stream: a bar with the time left on a terminal, lines where they are asked for, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
from rich.console import Console

from driftprobe.errors import UsageError
from driftprobe.result import Progress as ToldStep
from driftprobe.result import Step

if TYPE_CHECKING:
    from rich.progress import Progress

PROGRESS = "progress: "
"""How a line begins that says where a run is, with --progress lines."""
PROGRESSES = ("auto", "lines", "none")


@contextmanager
def progress(how: str, at_first: str) -> Iterator[ToldStep | None]:
    """Give what is told each step. Raises UsageError for an unknown kind."""
    if how not in PROGRESSES:
        raise UsageError("unknown kind of progress", where="--progress", measured=how, allowed=", ".join(PROGRESSES),
                         next_step="choose one of them")  # fmt: skip
    if how == "lines":
        yield lambda step: click.echo(f"{PROGRESS}{step.done}/{step.of} {step.what}", err=True)
        return
    console = Console(stderr=True)
    if how == "none" or not console.is_terminal:
        yield None
        return
    with bar_on(console) as bar:
        task = bar.add_task(at_first, total=None)

        def told(step: Step) -> None:
            bar.update(task, description=step.what, completed=step.done, total=step.of)

        yield told


def bar_on(console: Console, disable: bool = False) -> Progress:
    """Return a bar that leaves nothing behind: what is done now, how much of it all, and the time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=disable)


def quietly(quiet: bool) -> str:
    """Return the kind of progress of a command that has no option for it."""
    return "none" if quiet else "auto"
