"""driftprobe baseline: keep an accepted run in a small file, and hold new runs against it."""

from __future__ import annotations

from pathlib import Path

import click

from driftprobe.baseline import load_baseline, save_baseline
from driftprobe.cli.diff import of_run, tell_difference
from driftprobe.difference import difference
from driftprobe.errors import UsageError

_EPILOG = """\b
Examples:
  driftprobe baseline save artifacts/2026-02-07/b3_66_v2 driftprobe-baseline.json
  driftprobe baseline check artifacts/2026-02-08/b3_66_v2 driftprobe-baseline.json

\b
Exit codes of check: 0 nothing got worse, 1 something did, 2 bad input, 3 something could not be compared.
"""


@click.group(epilog=_EPILOG)
def command() -> None:
    """Keep an accepted run (verdict, each tap's drift and floor, what ran), and check new runs against it."""


@command.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Take the place of an earlier baseline.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, and nothing printed.")
def save(run: Path, file: Path, replace: bool, quiet: bool) -> None:
    """Keep the run in folder RUN as the baseline FILE. A MISMATCH can be kept; N/A cannot, as it shows nothing."""
    found = of_run(run, quiet)
    untold = [f"{part.prompt} ({part.mode})" for part in found.parts if part.verdict == "N/A"]
    if untold:
        raise UsageError("a run that shows nothing is no baseline", where=str(run),
                         measured=f"N/A: {', '.join(untold[:4])}", allowed="a verdict for every prompt",
                         next_step=f"`driftprobe analyze {run}` says why; run again")  # fmt: skip
    save_baseline(found, file, replace=replace)
    if not quiet:
        taps = sum(len(part.taps) for part in found.collapsed().parts)
        click.echo(f"{found.verdict}: {len(found.parts)} prompts and modes, {taps} taps in {file}")
        click.echo(f"next: commit {file}; then, after a new run: driftprobe baseline check NEW {file}")


@command.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, and the result in one line.")
def check(run: Path, file: Path, as_json: bool, quiet: bool) -> None:
    """Hold the run in folder RUN against the baseline FILE; of each tap the worst step counts."""
    baseline = load_baseline(file)
    found = difference(baseline, of_run(run, quiet).collapsed())
    click.get_current_context().exit(tell_difference(found, as_json, quiet))
