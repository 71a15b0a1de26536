"""driftprobe doctor: what works here, in which versions, and what installs the rest."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from driftprobe.doctor import SCHEMA, Health, doctor, header_folder

_EPILOG = """\b
Examples:
  driftprobe doctor
  driftprobe doctor --json

\b
Exit code 0, whatever is missing: nothing here is a verdict.
"""


@click.command(epilog=_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def command(as_json: bool) -> None:
    """Say what works here: versions, what each engine needs, the compiled core, and how to install what is missing."""
    found = doctor()
    click.echo(_json(found) if as_json else _text(found))


def _json(found: Health) -> str:
    return json.dumps({"schema": SCHEMA, **asdict(found), "next": found.next_step}, indent=2)


def _text(found: Health) -> str:
    lines = [f"driftprobe {found.driftprobe}  python {found.python}  {found.system}", f"in {found.folder}"]
    for check in found.checks:
        mark = click.style("ok     ", fg="green") if check.works else click.style("missing", fg="yellow")
        lines.append(f"{mark}  {check.kind:<8} {check.name:<18} {check.found}")
        if check.install:
            lines.append(f"{'':<17} for {check.purpose}: {check.install}")
    lines += [f"C and C++ find the trace writer with {header_folder()}", f"next: {found.next_step}"]
    return "\n".join(lines)
