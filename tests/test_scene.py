"""What a hypothesis looks at, read from a trace that anyone may have written."""

from __future__ import annotations

from dataclasses import replace

from driftprobe.compare import NoPayloads
from driftprobe.scene import Scene
from driftprobe.trace import CALL_TOKENS, Event
from driftprobe.verdict import judge_trace
from make_trace import drifting, toy


def test_what_is_measured_by_position_leaves_out_what_is_no_position() -> None:
    trace, arrays = toy(drifting(0.5))
    measured = {"4": 2, "²": 3, "٣": 5, "-1": 7, "left": 9}
    trace = replace(trace, events=(Event(event=CALL_TOKENS, arm="D", measured=measured),))
    judged = judge_trace(trace, arrays)
    scene = Scene(trace, judged, judged.failures[0], NoPayloads())
    assert scene.measured(CALL_TOKENS, "D") == {4: 2}
    assert scene.measured(CALL_TOKENS, "P") == {}
