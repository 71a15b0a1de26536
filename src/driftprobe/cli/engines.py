"""driftprobe engines: what can run a model here, and how to install the rest."""

from __future__ import annotations

import click

from driftprobe.doctor import CORE_INSTALL
from driftprobe.engines import ENGINES, include_folder
from driftprobe.fingerprint import BUILT


@click.command(epilog="\b\nExample:\n  driftprobe run --engine hf")
def command() -> None:
    """List the engines. One whose libraries are missing stays listed, with its install line."""
    for name, entry in ENGINES.items():
        state = f"not installed ({', '.join(entry.missing)}): {entry.install}" if entry.missing else "ready"
        click.echo(f"{name:<10}{entry.about}\n{'':<10}{state}")
    click.echo(f"fingerprints: {'compiled' if BUILT else f'NumPy, slower: {CORE_INSTALL}'}")
    click.echo(f"the trace writer for C and C++: -I{include_folder()}")
