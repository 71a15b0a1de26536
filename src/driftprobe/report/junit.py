"""JUnit XML: one suite a mode, one case a prompt; MISMATCH is a failure, N/A an error.

Read by CI servers and by what they show test results with (Jenkins, GitLab, GitHub actions that publish tests).
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from driftprobe.judgement import Judgement, ModeJudgement, TraceJudgement, Verdict
from driftprobe.report import facts
from driftprobe.report.text import printable
from driftprobe.trace import Trace


def render(judgement: Judgement, traces: Sequence[Trace]) -> str:
    """Return the document."""
    root = ElementTree.Element("testsuites", name="driftprobe")
    for mode in judgement.modes.values():
        _suite(root, mode, traces)
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(root: ElementTree.Element, mode: ModeJudgement, traces: Sequence[Trace]) -> None:
    failed = [item for item in mode.prompts if item.verdict is Verdict.MISMATCH]
    untold = [item for item in mode.prompts if item.verdict is Verdict.NOT_AVAILABLE]
    suite = ElementTree.SubElement(
        root, "testsuite", name=printable(f"driftprobe.{mode.mode}"), tests=str(len(mode.prompts)),
        failures=str(len(failed)), errors=str(len(untold)), skipped="0",
    )  # fmt: skip
    date = facts.date([trace for trace in traces if trace.header.mode == mode.mode])
    known = ElementTree.SubElement(suite, "properties")
    for name, value in (("verdict", mode.verdict.value), ("date", date), ("engine", _engine(mode))):
        ElementTree.SubElement(known, "property", name=name, value=printable(value))
    for item in mode.prompts:
        _case(suite, item)


def _engine(mode: ModeJudgement) -> str:
    engine = mode.prompts[0].engine if mode.prompts else None
    return "" if engine is None else f"{engine.name} {engine.version} {engine.model} {engine.dtype}"


def _case(suite: ElementTree.Element, item: TraceJudgement) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", classname=printable(f"driftprobe.{item.mode}"), name=printable(item.prompt)
    )
    if item.verdict is Verdict.MISMATCH:
        told = ElementTree.SubElement(case, "failure", type=item.verdict.value, message=printable(item.reason))
        told.text = printable(_cause(item))
    elif item.verdict is Verdict.NOT_AVAILABLE:
        told = ElementTree.SubElement(case, "error", type=item.verdict.value, message=printable(item.reason))
        told.text = printable("; ".join(gate.detail for gate in item.gates if not gate.passed))
    else:
        ElementTree.SubElement(case, "system-out").text = printable(f"{item.verdict.value}: {item.reason}")


def _cause(item: TraceJudgement) -> str:
    first = item.first_failure
    assert first is not None, "a MISMATCH has a first failure"
    return f"{facts.where(first)}: {facts.size_words(first)}; {first.root_cause}"
