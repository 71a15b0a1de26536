"""driftprobe faults: what can be planted and what must be found."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from driftprobe.faults import FAULTS
from driftprobe.taps import place


@click.command(epilog="\b\nExample:\n  driftprobe run --fault rope_plus_one")
@click.option("--names", is_flag=True, help="The bare names, one a line.")
def command(names: bool) -> None:
    """List the faults that `driftprobe run --fault NAME` plants, and what must be found."""
    if names:
        click.echo("\n".join(FAULTS))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("fault", "what it breaks", "verdict", "first failure", "2×2 reading"):
        table.add_column(column, overflow="fold")
    for fault in FAULTS.values():
        first = place(fault.layer, fault.tensor) if fault.tensor and fault.verdict == "MISMATCH" else "none"
        table.add_row(fault.name, fault.breaks, fault.verdict, first, fault.reading)
    Console(highlight=False).print(table)
