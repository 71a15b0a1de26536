"""driftprobe analyze: the verdict on a folder of traces, whoever wrote them."""

from __future__ import annotations

from pathlib import Path

import click

from driftprobe.cli.output import Output, output_options, tell
from driftprobe.cli.progress import progress, quietly
from driftprobe.result import analyze

_EPILOG = """\b
Examples:
  driftprobe analyze artifacts/2026-02-07/b3_66_v2/traces
  driftprobe analyze my-engine-traces --mode as_designed --output reports
  driftprobe analyze my-engine-traces --json --junit driftprobe.xml
"""


@click.command(epilog=_EPILOG)
@click.argument("traces", type=click.Path(path_type=Path))
@click.option("--mode", default=None, help="Mode of traces that do not say it: as_designed or kv_aligned.")
@click.option("--output", type=click.Path(path_type=Path), help="Write traces and reports into this folder too.")
@output_options
def command(traces: Path, mode: str | None, output: Path | None, how: Output) -> None:
    """Judge the traces in TRACES (a traces folder, or a run's folder) and print the verdict."""
    whole = output is not None or how.format != "text" or how.junit is not None
    with progress(quietly(how.quiet), f"reading {traces}") as told:
        result = analyze(traces, mode=mode, progress=told, whole=whole)
    root = None if output is None else result.write(output).parent
    click.get_current_context().exit(tell(result, how, root))
