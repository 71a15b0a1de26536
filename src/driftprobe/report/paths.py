"""What the final report adds for mode `paths`: what both sides have in common, what has no pair, what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from driftprobe.judgement import Judgement, Verdict
from driftprobe.report.text import blocks, bullets, code, count, prose, table
from driftprobe.taps import BY_NAME, PATHS, place
from driftprobe.trace import CANNOT_PASS, LEFT_OUT, Trace

SHOWN = 6
"""How many taps are named that share a reason; the trace has all."""


def paths_section(traces: Sequence[Trace]) -> str:
    """Return what was compared and what was left out, for each trace of mode `paths`; empty without one."""
    return blocks([_of_trace(trace) for trace in traces if trace.header.mode == PATHS])


def _of_trace(trace: Trace) -> str:
    counts = next((event.measured for event in trace.events if event.event == "positions"), {})
    lines = [
        f"{count(counts.get('common', 0), 'position')} computed by both paths, {counts.get('compared', 0)} compared",
        f"{counts.get('only_reference', 0)} by the reference alone, {counts.get('only_candidate', 0)} by the candidate "
        "alone",
    ]
    if counts.get("moved"):
        lines.append(
            f"{count(counts['moved'], 'row')} of the candidate stand, by their tokens, at another position than its "
            "calls named: they are compared where the tokens are"
        )
    told = [(event.event.removeprefix(LEFT_OUT).removeprefix(CANNOT_PASS), event.measured) for event in trace.events
            if event.event.startswith((LEFT_OUT, CANNOT_PASS))]  # fmt: skip
    lines += [prose(reason) for reason, taps in told if not taps]
    rows = [(prose(reason), str(len(taps)), _names(list(taps))) for reason, taps in told if taps]
    table_ = (
        table(("Not compared because", "Taps", "Which"), rows, "lrl") if rows else "Every tap that fired has pairs."
    )
    return blocks([f"### Paths Compared, {code(trace.header.prompt)}", bullets(lines), table_])


def _names(names: Sequence[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(prose(name) for name in names[:SHOWN]) + more


def after_paths(judgement: Judgement) -> list[tuple[str, str, str]]:
    """Return the next steps after a comparison of two callables: title, sentence, no command."""
    again = ("Run it again", "Call `driftprobe.probe_paths` with the same two functions; NO_DRIFT or STRUCTURAL_DRIFT "
             "means that no bug was found.", "")  # fmt: skip
    failure = judgement.first_failure
    if judgement.verdict is not Verdict.MISMATCH or failure is None:
        return [again]
    tap = BY_NAME.get(failure.tensor)
    at = f"{prose(place(failure.layer, failure.tensor))} at position {failure.position}"
    suspects = f"{at} ({tap.op}). Suspects: {tap.suspect}." if tap else f"the module that makes {at}, and its inputs."
    return [("Look first at", suspects, ""), again]
