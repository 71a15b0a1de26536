"""Judgements and pages for the tests of report.html: small traces in memory, no torch, no files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from driftprobe.compare import NoPayloads, PayloadSource
from driftprobe.diagnose import diagnose
from driftprobe.fingerprint import Array
from driftprobe.judgement import Judgement
from driftprobe.report import html
from driftprobe.taps import CACHE_TAPS
from driftprobe.trace import EngineFacts, Trace
from driftprobe.verdict import judge
from make_trace import Site, both, drifting, scaled, toy, without
from report_traces import broken_from, foreign, judged, rounding, run

HOSTILE = (
    "</script><script>window.hit=1</script>",
    "\"><img src=x onerror='window.hit=2'>",
    "a\u2028b\u2029c\u202e' onfocus=window.hit=3 autofocus ",
    "<!--<script>{{ 7*7 }}</style><style>*{display:none}",
)
"""What a stranger's trace may hold in every name."""


def shifted(site: Site, array: Array) -> Array:
    """Decode's cache rows stand one slot too far; the first is empty."""
    if site.arm not in {"D", "D'"} or site.tensor not in CACHE_TAPS:
        return array
    return np.concatenate([np.zeros_like(array[:1]), array[:-2], array[-1:]])


def rounded(site: Site, array: Array) -> Array:
    """Decode and the controls are off by a rounding error, each by its own."""
    size = {"D": 2e-7, "A": 1e-7, "E1": 1.2e-7, "E7": 2.4e-7}.get(site.arm)
    return array if size is None or site.tensor == "embed" else scaled(array, size)


CHANGES = {
    "rounding": rounded,
    "fault": both(rounded, drifting(0.1, start=(1, "q_rope"))),
    "shift": shifted,
    "wrong token": both(rounded, lambda s, a: scaled(a, 0.5) if (s.arm, s.tensor) == ("D", "embed") else a),
    "missing": both(rounded, without(layer=1, tensor="attn_out")),
    "hidden": without(arm="E1"),
}


def toy_run(name: str, **more: Any) -> tuple[Judgement, tuple[Trace, ...], PayloadSource]:
    """Return the judgement, trace and whole tensors of a toy engine that does something differently."""
    trace, arrays = toy(CHANGES[name], **({"mode": "kv_aligned"} | more))
    return diagnose(judge([trace], arrays), [trace], arrays), (trace,), arrays


def page_of(judgement: Judgement, traces: tuple[Trace, ...], payloads: PayloadSource | None = None) -> str:
    """Return the page."""
    return html.render(judgement, traces, payloads or NoPayloads())


def data_of(page: str) -> Any:
    """Return the data that a page carries."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def hostile_run() -> tuple[Judgement, tuple[Trace, ...]]:
    """Return a run in which prompts, taps and everything that an engine says of itself are hostile strings."""
    facts = EngineFacts(name=HOSTILE[0], version=HOSTILE[1], model=HOSTILE[0], dtype="float32", attention=HOSTILE[2],
                        device=HOSTILE[3], layers=2)  # fmt: skip
    _, traces = run(broken_from(0, "q_rope"), prompts=HOSTILE, engine=facts, run=HOSTILE[1], date=HOSTILE[3],
                    prompt_text=HOSTILE[0], labels={"output": HOSTILE[1], "fault": HOSTILE[0]})  # fmt: skip
    renamed = tuple(
        replace(trace, records=tuple(
            replace(r, tensor=HOSTILE[0] if r.tensor == "x_out" else r.tensor,
                    hash=HOSTILE[1] + r.hash if r.tensor == "v_proj" else r.hash)
            for r in trace.records
        ))
        for trace in traces
    )  # fmt: skip
    return judged(renamed), renamed


@cache
def cases() -> dict[str, str]:
    """Return a page for every verdict and kind of trace."""
    found = {name: page_of(*toy_run(name)) for name in CHANGES}
    found["steps"] = page_of(*toy_run("fault", steps=3))
    found["clean"] = page_of(*run())
    found["no payloads"] = page_of(*run(rounding))
    found["foreign"] = page_of(*foreign())
    found["foreign, hashes alone"] = page_of(*foreign(sums=False))
    return found
