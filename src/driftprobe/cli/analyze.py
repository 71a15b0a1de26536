"""driftprobe analyze: the verdict on a folder of traces, whoever wrote them."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from driftprobe.api import analyze
from driftprobe.cli.show import show

_EPILOG = """\b
Examples:
  driftprobe analyze artifacts/2026-02-07/b3_66_v2/traces
  driftprobe analyze my-engine-traces --mode as_designed --output reports
"""


@click.command(epilog=_EPILOG)
@click.argument("traces", type=click.Path(path_type=Path))
@click.option("--mode", default=None, help="Mode of traces that do not say it: as_designed or kv_aligned.")
@click.option("--output", type=click.Path(path_type=Path), help="Write traces and reports into this folder too.")
def command(traces: Path, mode: str | None, output: Path | None) -> None:
    """Judge the traces in TRACES (a traces folder, or a run's folder) and print the verdict."""
    result = analyze(traces, mode=mode, whole=output is not None)
    console = Console(highlight=False)
    code = show(result, console)
    if output is not None:
        console.print(f"  {'report:':<17}{result.write(output).as_posix()}", soft_wrap=True)
    click.get_current_context().exit(code)
