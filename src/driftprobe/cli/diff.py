"""driftprobe diff: what got worse between two runs of one engine."""

from __future__ import annotations

from pathlib import Path

import click

from driftprobe.cli.progress import progress, quietly
from driftprobe.difference import Difference, difference
from driftprobe.load import traces_folder
from driftprobe.report.difference import render_json, render_text
from driftprobe.result import analyze
from driftprobe.snapshot import Snapshot, snapshot

_EPILOG = """\b
Examples:
  driftprobe diff artifacts/2026-02-07/before artifacts/2026-02-08/after
  driftprobe diff before after --json > diff.json

\b
Exit codes: 0 nothing got worse, 1 something did, 2 bad input, 3 something could not be compared.
"""


@click.command(epilog=_EPILOG)
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, and the result in one line.")
def command(old: Path, new: Path, as_json: bool, quiet: bool) -> None:
    """Compare the runs in OLD and NEW, of one engine at two commits, tap by tap against the floors of both."""
    for folder in (old, new):
        traces_folder(folder)  # a path that is wrong is said at once, not after the other run was judged
    found = difference(of_run(old, quiet), of_run(new, quiet))
    click.get_current_context().exit(tell_difference(found, as_json, quiet))


def of_run(folder: Path, quiet: bool) -> Snapshot:
    """Return a run in small. Raises TraceError where its traces break the format."""
    with progress(quietly(quiet), f"reading {folder}") as told:
        result = analyze(folder, progress=told)
    return snapshot(result.judgement, result.traces)


def tell_difference(found: Difference, as_json: bool, quiet: bool) -> int:
    """Print what changed; return the exit code."""
    text = render_json(found) if as_json else render_text(found)
    click.echo(text.splitlines()[-1] if quiet and not as_json else text, nl=quiet and not as_json)
    return found.exit_code
