"""driftprobe report: every report of a run, rebuilt from its traces alone."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from driftprobe.artifacts import write_reports
from driftprobe.cli.show import open_page, show, show_reports
from driftprobe.result import analyze

_EPILOG = """\b
Example:
  driftprobe report artifacts/2026-02-07/b3_66_v2
"""


@click.command(epilog=_EPILOG)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--open", "browse", is_flag=True, help="Open report.html in the browser.")
def command(folder: Path, browse: bool) -> None:
    """Rebuild the reports in FOLDER (artifacts/DATE/NAME) from FOLDER/traces, byte for byte."""
    result = analyze(folder)
    root = result.folder.parent if result.folder.name == "traces" else folder
    write_reports(root, result.reports())
    console = Console(highlight=False)
    code = show(result, console)
    show_reports(root, console)
    if browse:
        open_page(root)
    click.get_current_context().exit(code)
