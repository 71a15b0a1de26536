"""driftprobe validate: what is wrong with a trace, line by line, and how to mend it."""

from __future__ import annotations

from pathlib import Path

import click

from driftprobe.validate import validate

_EPILOG = """\b
Examples:
  driftprobe validate artifacts/2026-02-07/b3_66_v2
  driftprobe validate my-engine-traces
"""


@click.command(epilog=_EPILOG)
@click.argument("folder", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Check every line of every trace in FOLDER against docs/trace-format.md. Exit 0 if none breaks it, else 2."""
    found = validate(folder)
    click.echo(found.render())
    click.get_current_context().exit(0 if found.valid else 2)
