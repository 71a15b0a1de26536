"""The reports: a table from file name to the function that writes it, from a judgement and its traces alone.

Each is pure: the same judgement and traces give the same bytes. Dates, names and paths come from the trace headers. A
report's module is loaded when it is written: a verdict on the terminal needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from driftprobe.compare import NoPayloads, PayloadSource
from driftprobe.judgement import Judgement
from driftprobe.report.facts import FILES
from driftprobe.trace import Trace
from driftprobe.verdict import base_traces

Render = Callable[[Judgement, Sequence[Trace], PayloadSource], str]
"""A report of a judgement, of every trace that was judged, and of the whole tensors that they kept."""


def _whole(module: str) -> Render:
    """Return a report that shows all there is: every trace, and the tensors that were kept."""

    def render(judgement: Judgement, traces: Sequence[Trace], payloads: PayloadSource) -> str:
        text: str = _module(module).render(judgement, traces, payloads)
        return text

    return render


def _of_base(module: str) -> Render:
    """Return a report that reads no tensors, and nothing of a rung but what the judgement says of it."""

    def render(judgement: Judgement, traces: Sequence[Trace], _payloads: PayloadSource) -> str:
        text: str = _module(module).render(judgement, base_traces(traces))
        return text

    return render


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


REPORTS: dict[str, Render] = {
    FILES["html"]: _whole("html"),
    FILES["final"]: _of_base("final_report"),
    FILES["analysis"]: _of_base("analysis"),
    FILES["tsv"]: _of_base("tsv"),
    FILES["verdict"]: _of_base("verdict_json"),
}


def render_all(judgement: Judgement, traces: Sequence[Trace], payloads: PayloadSource | None = None) -> dict[str, str]:
    """Return every report: file name -> its text. Without payloads no report shows whole tensors."""
    source = NoPayloads() if payloads is None else payloads
    return {name: render(judgement, traces, source) for name, render in REPORTS.items()}
