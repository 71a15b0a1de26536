"""The reports: a table from file name to the function that writes it, from a judgement and its traces alone.

Each is pure: the same judgement and traces give the same bytes. Dates, names and paths come from the trace headers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from driftprobe.compare import NoPayloads, PayloadSource
from driftprobe.judgement import Judgement
from driftprobe.report import analysis, final_report, html, tsv, verdict_json
from driftprobe.report.facts import FILES
from driftprobe.trace import Trace
from driftprobe.verdict import base_traces

Render = Callable[[Judgement, Sequence[Trace], PayloadSource], str]
"""A report of a judgement, of every trace that was judged, and of the whole tensors that they kept."""


def _of_base(render: Callable[[Judgement, Sequence[Trace]], str]) -> Render:
    """Return a report that reads no tensors, and nothing of a rung but what the judgement says of it."""
    return lambda judgement, traces, _payloads: render(judgement, base_traces(traces))


REPORTS: dict[str, Render] = {
    FILES["html"]: html.render,
    FILES["final"]: _of_base(final_report.render),
    FILES["analysis"]: _of_base(analysis.render),
    FILES["tsv"]: _of_base(tsv.render),
    FILES["verdict"]: _of_base(verdict_json.render),
}


def render_all(judgement: Judgement, traces: Sequence[Trace], payloads: PayloadSource | None = None) -> dict[str, str]:
    """Return every report: file name -> its text. Without payloads no report shows whole tensors."""
    source = NoPayloads() if payloads is None else payloads
    return {name: render(judgement, traces, source) for name, render in REPORTS.items()}
