"""driftprobe faults: what can be planted and what must be found."""

from __future__ import annotations

from itertools import groupby

import click
from rich.console import Console
from rich.table import Table

from driftprobe.causes import CAUSES
from driftprobe.faults import FAULTS, Fault, find_fault
from driftprobe.taps import place

_EPILOG = """\b
Examples:
  driftprobe faults attn_scale
  driftprobe run --fault attn_scale --fault-strength 1.01
"""


@click.command(epilog=_EPILOG)
@click.argument("name", required=False)
@click.option("--names", is_flag=True, help="The bare names, one a line.")
def command(name: str | None, names: bool) -> None:
    """List the faults that `driftprobe run --fault NAME` plants, or say of one what must be found."""
    if names:
        click.echo("\n".join(FAULTS))
        return
    console = Console(highlight=False)
    if name is not None:
        _tell(find_fault(name), console)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("fault", "strengths", "what it breaks"):
        table.add_column(column, overflow="fold")
    for family, faults in groupby(FAULTS.values(), key=lambda fault: fault.family or "the harness"):
        table.add_row(f"[bold]{family}[/bold]")
        for fault in faults:
            table.add_row(f"  {fault.name}", _strengths(fault), fault.breaks)
    console.print(table)


def _tell(fault: Fault, console: Console) -> None:
    first = place(fault.layer, fault.tensor) if fault.tensor and fault.verdict == "MISMATCH" else "none"
    rows = {
        "fault": fault.name,
        "breaks": fault.breaks,
        "side": fault.side,
        "strengths": f"{_strengths(fault)} {fault.unit}".strip() or "it is there or it is not",
        "verdict": fault.verdict,
        "first failure": f"{first} in a decoder with RoPE; where that tap is missing, the next one",
        "2×2 reading": fault.reading,
        "root cause": f"{fault.cause}: {CAUSES[fault.cause].words}" if fault.cause else "none",
    }
    for label, words in rows.items():
        console.print(f"{label + ':':<15}{words}", soft_wrap=True, markup=False)


def _strengths(fault: Fault) -> str:
    return " ".join(f"{strength:g}" for strength in fault.strengths) if fault.unit else ""
