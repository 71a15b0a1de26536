"""driftprobe taps: the named points of the forward pass."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from driftprobe.taps import TAPS


@click.command()
def command() -> None:
    """List the taps in order of execution: name, axes, the op whose result it is, and what that op reads.

    Axes: T tokens, C channels, H query heads, G key/value heads, D head dimension, S cache rows, V vocabulary,
    X experts, N state.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("tap", "where", "axes", "what it is", "inputs"):
        table.add_column(column, overflow="fold")
    for tap in TAPS:
        table.add_row(tap.name, tap.scope.name.lower(), tap.axes, tap.op, ", ".join(tap.inputs))
    Console(highlight=False).print(table)
