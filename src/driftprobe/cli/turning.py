"""What pack and unpack are both: a command that turns every trace of a folder into its other form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from driftprobe.pack import Turned

_Turn = Callable[[Path, Callable[[Turned], None]], Any]
"""Turns the traces of a folder, and tells what became of each."""


def turning(verb: str, turn: _Turn, words: str) -> click.Command:
    """Return the command `driftprobe VERB FOLDER`; `words` are its help."""

    @click.command(help=words, epilog=f"\b\nExample:\n  driftprobe {verb} artifacts/2026-02-07/b3_66_v2\n")
    @click.argument("folder", type=click.Path(path_type=Path))
    def command(folder: Path) -> None:
        turn(folder, lambda turned: click.echo(_told(turned)))

    return command


def _told(turned: Turned) -> str:
    return f"{turned.name}: {turned.lines} lines, {turned.before} bytes before, {turned.after} now"
