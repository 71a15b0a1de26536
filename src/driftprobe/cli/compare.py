"""driftprobe compare: two engines, or two builds of one, on the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import date as calendar
from pathlib import Path

import click

from driftprobe.api import compare
from driftprobe.artifacts import place_of
from driftprobe.cli.output import Output, output_options, tell
from driftprobe.cli.progress import progress, quietly
from driftprobe.load import traces_folder
from driftprobe.trace import LEFT_OUT, Trace

_SHOWN = 3
"""How many taps are named that share a reason; the report has more, the trace all."""
_EPILOG = """\b
Examples:
  driftprobe compare artifacts/2026-02-07/hf artifacts/2026-02-07/mine
  driftprobe compare old/traces new/traces --name old_and_new

\b
Reports go to OUT/DATE/NAME. Exit codes: 0 NO_DRIFT or STRUCTURAL_DRIFT, 1 MISMATCH, 2 bad input, 3 N/A.
"""


@click.command(epilog=_EPILOG)
@click.argument("traces_a", type=click.Path(path_type=Path))
@click.argument("traces_b", type=click.Path(path_type=Path))
@click.option("--date", default=None, help="Folder of the comparison under OUT. Default: today.")
@click.option("--name", default="compare", show_default=True, help="Name of the comparison.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("artifacts"), show_default=True, help="Where it goes."
)
@output_options
def command(traces_a: Path, traces_b: Path, date: str | None, name: str, out: Path, how: Output) -> None:
    """Compare the runs in TRACES_A and TRACES_B: prefill with prefill, decode with decode, token by token."""
    day = date or calendar.today().isoformat()
    root = place_of(out, day, name)
    for folder in (traces_a, traces_b):
        traces_folder(folder)  # a path that is wrong is said at once, not after the other side was read
    with progress(quietly(how.quiet), "reading both sides") as told:
        result, left_out = compare(traces_a, traces_b, root, date=day, progress=told)
    labels = result.traces[0].header.labels
    before = [f"left out: {line}" for line in left_out]
    before.append(f"reference: {labels['reference']}   candidate: {labels['candidate']}")
    code = tell(result, how, root, before, _left_out(result.traces))
    click.get_current_context().exit(code)


def _left_out(traces: Iterable[Trace]) -> Iterator[str]:
    """Yield how many records had no partner in each comparison, by reason."""
    for trace in traces:
        for event in trace.events:
            if event.event.startswith(LEFT_OUT):
                records, taps = sum(event.measured.values()), list(event.measured)
                which = ", ".join(taps[:_SHOWN]) + (", …" if len(taps) > _SHOWN else "")
                reason = event.event.removeprefix(LEFT_OUT)
                yield f"  {'not compared:':<17}{records} of {trace.header.prompt}: {reason} ({which})"
