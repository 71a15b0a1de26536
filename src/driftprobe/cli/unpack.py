"""driftprobe unpack: a folder's packed traces back to JSON Lines."""

from __future__ import annotations

from pathlib import Path

import click

from driftprobe.pack import Turned, unpack_folder

_EPILOG = """\b
Example:
  driftprobe unpack artifacts/2026-02-07/b3_66_v2
"""


@click.command(epilog=_EPILOG)
@click.argument("folder", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Turn every packed trace in FOLDER back into JSON Lines, in place, to the byte."""
    unpack_folder(folder, lambda turned: click.echo(_told(turned)))


def _told(turned: Turned) -> str:
    return f"{turned.name}: {turned.lines} lines, {turned.before} bytes before, {turned.after} now"
