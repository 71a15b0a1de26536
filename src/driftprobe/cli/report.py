"""driftprobe report: every report of a run, rebuilt from its traces alone."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from driftprobe.api import analyze
from driftprobe.artifacts import write_reports
from driftprobe.cli.show import show

_EPILOG = """\b
Example:
  driftprobe report artifacts/2026-02-07/b3_66_v2
"""


@click.command(epilog=_EPILOG)
@click.argument("folder", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Rebuild the reports in FOLDER (artifacts/DATE/NAME) from FOLDER/traces, byte for byte."""
    result = analyze(folder)
    root = result.folder.parent if result.folder.name == "traces" else folder
    write_reports(root, result.reports())
    console = Console(highlight=False)
    code = show(result, console)
    console.print(f"  {'report:':<17}{(root / 'B3_66_V2_FINAL_REPORT.md').as_posix()}", soft_wrap=True)
    click.get_current_context().exit(code)
