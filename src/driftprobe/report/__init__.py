"""The reports: a table from file name to the function that writes it, from a judgement and its traces alone.

Each is pure: the same judgement and traces give the same bytes. Dates, names and paths come from the trace headers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from driftprobe.judgement import Judgement
from driftprobe.report import analysis, final_report, tsv, verdict_json
from driftprobe.report.facts import FILES
from driftprobe.trace import Trace
from driftprobe.verdict import base_traces

Render = Callable[[Judgement, Sequence[Trace]], str]

REPORTS: dict[str, Render] = {
    FILES["final"]: final_report.render,
    FILES["analysis"]: analysis.render,
    FILES["tsv"]: tsv.render,
    FILES["verdict"]: verdict_json.render,
}


def render_all(judgement: Judgement, traces: Sequence[Trace]) -> dict[str, str]:
    """Return every report: file name -> its text. What a rung of the ladder has to say, the judgement says."""
    base = base_traces(traces)
    return {name: render(judgement, base) for name, render in REPORTS.items()}
