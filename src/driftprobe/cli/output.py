"""How a command tells its verdict: as text, as JSON, for GitHub, as JUnit XML; the same options on every command."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from driftprobe.artifacts import written
from driftprobe.cli.show import EXIT_CODES, EXPLAINED, open_page, show, show_map, show_reports
from driftprobe.errors import UsageError
from driftprobe.report.conclusion import next_command
from driftprobe.report.facts import FILES
from driftprobe.result import Result
from driftprobe.verdict import base_traces

_F = TypeVar("_F", bound=Callable[..., Any])
FORMATS = ("text", "json", "github")
OPTIONS = ("format_", "as_json", "junit_file")
"""The options' names inside, `quiet` aside."""


@dataclass(frozen=True, slots=True)
class Output:
    """What the user asked to be told, and how."""

    format: str = "text"
    junit: Path | None = None
    quiet: bool = False


def output_options(command: _F) -> _F:
    """Add the options to a command; they reach it as `how`, an Output."""

    @wraps(command)
    def with_output(*args: Any, format_: str, as_json: bool, junit_file: Path | None, quiet: bool, **more: Any) -> Any:
        return command(*args, how=_output(format_, as_json, junit_file, quiet), **more)

    found: Any = with_output
    for option in reversed(
        (
            click.option(
                "--format", "format_", default=None, help="text, json, or github (annotations and a summary)."
            ),
            click.option("--json", "as_json", is_flag=True, help="Print verdict.json and nothing else."),
            click.option("--junit", "junit_file", type=click.Path(path_type=Path), help="Write JUnit XML there too."),
            click.option("-q", "--quiet", is_flag=True, help="No progress, and the verdict in one line."),
        )
    ):
        found = option(found)
    return found  # type: ignore[no-any-return]


def _output(format_: str | None, as_json: bool, junit_file: Path | None, quiet: bool) -> Output:
    if format_ is not None and format_ not in FORMATS:
        raise UsageError("unknown format", where="--format", measured=format_[:80], allowed=", ".join(FORMATS),
                         next_step="choose one of them")  # fmt: skip
    if as_json and format_ not in {None, "json"}:
        raise UsageError("two formats at once", where="--json", measured=f"--format {format_}", allowed="one of both",
                         next_step="leave one out; verdict.json is written beside the reports anyway")  # fmt: skip
    return Output("json" if as_json else format_ or "text", junit_file, quiet)


def tell(
    result: Result, how: Output, root: Path | None, before: Iterable[str] = (), after: Iterable[str] = (), *,
    mapped: bool = False, opened: bool = False,
) -> int:  # fmt: skip
    """Print a result as asked, write what was asked for, and return the exit code.

    `root` is the folder of the reports, None where none were written. `before` and `after` are lines about the run; in
    JSON they go to the error stream. `mapped` adds the map to the text, `opened` shows the page in the browser. Raises
    OutputError where a file cannot be written.
    """
    if root is not None and opened:
        open_page(root)
    shown = partial(_text, result, how, root, before, after, mapped)
    judgement, base = result.judgement, base_traces(result.traces)
    if how.junit is not None:
        from driftprobe.report import junit

        with written(how.junit):
            how.junit.write_text(junit.render(judgement, base), encoding="utf-8", newline="\n")
    if how.format == "json":
        from driftprobe.report import verdict_json

        for line in () if how.quiet else (*before, *after):
            click.echo(line, err=True)
        click.echo(verdict_json.render(judgement, base), nl=False)
        return EXIT_CODES[judgement.verdict]
    if how.format == "text":
        return shown()
    from driftprobe.report import github

    token = secrets.token_hex(16)  # what a trace brings in is text, whatever it looks like
    click.echo(f"::stop-commands::{token}")
    try:
        code = shown()
    finally:
        click.echo(f"::{token}::")
    place = "" if root is None else (root / FILES["final"]).as_posix()
    for line in github.annotate(judgement, place):
        click.echo(line)
    append_summary(github.summary(judgement, base, place))
    return code


def _text(
    result: Result, how: Output, root: Path | None, before: Iterable[str], after: Iterable[str], mapped: bool
) -> int:
    console = Console(highlight=False, markup=False)
    if how.quiet:
        judgement = result.judgement
        console.print(f"verdict: {judgement.verdict.value} — {judgement.reason}", soft_wrap=True)
        return EXIT_CODES[judgement.verdict]
    for line in before:
        console.print(line, style="dim", soft_wrap=True)
    code = show(result, console)
    if mapped:
        show_map(result.judgement, console)
    for line in after:
        console.print(line, style="yellow", soft_wrap=True)
    if root is not None:
        show_reports(root, console)
    page = EXPLAINED.get(result.verdict)
    if page:
        console.print(f"  {'explained:':<17}{page}", soft_wrap=True)
    command = next_command(result.judgement, base_traces(result.traces))
    if command:
        console.print(f"  {'next:':<17}{command}", soft_wrap=True)
    return code


def append_summary(text: str) -> None:
    """Append Markdown to the file that GitHub names for a step's summary; nothing where it names none."""
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if name:
        with written(Path(name)), Path(name).open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)
