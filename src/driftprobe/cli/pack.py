"""driftprobe pack: a folder's traces from JSON Lines to Parquet."""

from __future__ import annotations

from pathlib import Path

import click

from driftprobe.pack import Turned, pack_folder

_EPILOG = """\b
Example:
  driftprobe pack artifacts/2026-02-07/b3_66_v2
"""


@click.command(epilog=_EPILOG)
@click.argument("folder", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Turn every trace in FOLDER from JSON Lines into Parquet, in place. `driftprobe unpack` gives every byte back."""
    pack_folder(folder, lambda turned: click.echo(_told(turned)))


def _told(turned: Turned) -> str:
    return f"{turned.name}: {turned.lines} lines, {turned.before} bytes before, {turned.after} now"
