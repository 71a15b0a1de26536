"""What is wrong with a folder of traces, line by line: written for the author of an engine's trace writer.

Problems break a MUST of docs/trace-format.md; the traces cannot be judged. Warnings do not, but each takes
evidence away from a verdict, and says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from driftprobe.errors import TraceError
from driftprobe.load import Loaded, survey
from driftprobe.payload import Payloads
from driftprobe.taps import BY_NAME, PATHS, TAPS, place
from driftprobe.trace import CONSTANTS, Record, Trace
from driftprobe.trace_file import Problem


@dataclass(frozen=True, slots=True)
class Report:
    """All findings of one folder."""

    folder: str
    files: tuple[str, ...]
    records: int
    problems: tuple[Problem, ...]
    """Broken MUSTs; none may be left."""
    warnings: tuple[Problem, ...]
    """What the traces lack, and what cannot be proven without it."""

    @property
    def valid(self) -> bool:
        """Whether the folder can be judged."""
        return not self.problems

    def render(self) -> str:
        """Return the findings as text: problems, warnings, then the counts."""
        body = [_paragraph("problem", finding) for finding in self.problems]
        body += [_paragraph("warning", finding) for finding in self.warnings]
        counts = ", ".join(
            _count(number, noun)
            for number, noun in (
                (len(self.files), "file"),
                (self.records, "record"),
                (len(self.problems), "problem"),
                (len(self.warnings), "warning"),
            )
        )
        return "\n".join([*body, f"{self.folder}: {counts}"])


def _paragraph(level: str, finding: Problem) -> str:
    return (
        f"{finding.where}: {level}: {finding.what}\n  measured: {finding.measured}\n"
        f"  allowed:  {finding.allowed}\n  mend:     {finding.mend}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def validate(folder: Path, mode: str | None = None) -> Report:
    """Return everything wrong with a folder of traces, payloads included.

    `mode` is as in `load_traces`. Raises TraceError only where there is no folder, or no trace in it.
    """
    found = survey(folder, mode)
    payloads = Payloads(found.folder)
    problems = [*found.problems]
    warnings: list[Problem] = []
    for entry in found.loaded:
        problems += _payload_problems(entry, payloads)
        warnings += _trace_warnings(entry.trace)
    return Report(
        folder=str(folder),
        files=found.files,
        records=sum(len(entry.trace.records) for entry in found.loaded),
        problems=tuple(sorted(problems, key=_by_place)),
        warnings=tuple(warnings),
    )


def _by_place(problem: Problem) -> tuple[str, int]:
    return (problem.file, problem.line)


def _payload_problems(entry: Loaded, payloads: Payloads) -> Iterable[Problem]:
    for record, (file, line) in zip(entry.trace.records, entry.places, strict=True):
        if entry.trace.damage and payloads.is_missing(record):
            continue  # a writer that was killed had not written its payloads yet
        try:
            payloads.get(record)
        except TraceError as error:
            measured = f"{error.measured} ({record.payload})"
            yield Problem(file, line, error.what, measured, error.allowed, error.next_step)


Finding = tuple[str, str, str, str]
"""What, measured, allowed, mend."""


def _trace_warnings(trace: Trace) -> list[Problem]:
    findings = [*_unknown_taps(trace), *_no_embed(trace), *_no_sketch(trace)]
    if trace.foreign:
        findings.append(("a stranger's trace", "no header", "a header as the first line",
                         "write one; dtypes, plan and a cut run cannot be seen without"))  # fmt: skip
    else:
        findings += [*_incomplete(trace), *_unseen_taps(trace), *_unanswered_reads(trace)]
        findings += [*_no_controls(trace), *_odd_hashes(trace)]
    return [Problem(trace.path, 0, *finding) for finding in findings]


def _incomplete(trace: Trace) -> Iterable[Finding]:
    if trace.damage:
        yield ("the trace is incomplete", trace.damage, "a footer as the last line",
               "let the writer finish; an incomplete trace is judged N/A")  # fmt: skip


def _unseen_taps(trace: Trace) -> Iterable[Finding]:
    """Name each tap that the header promises and some arm never recorded."""
    seen: dict[str, set[tuple[str, int | None]]] = {arm: set() for arm in _arms(trace)}
    for record in _results(trace):
        seen[record.arm].add((record.tensor, record.layer))
    for tensor, layers in trace.header.taps.items():
        wanted: list[tuple[str, int | None]] = [(tensor, layer) for layer in layers or (None,)]
        gaps = [
            f"arm {arm}: {', '.join(place(layer, tensor) for _, layer in missing)}"
            for arm, keys in seen.items()
            if (missing := [key for key in wanted if key not in keys])
        ]
        if gaps:
            yield ("a promised tap never appears", "; ".join(gaps), "every tap of header.taps in every arm",
                   "record it, or leave it out of header.taps")  # fmt: skip


def _unanswered_reads(trace: Trace) -> Iterable[Finding]:
    answered = {(r.arm, r.phase, r.step, r.logical_tok_idx) for r in trace.records}
    for read in trace.header.reads:
        key = (read.arm, read.phase, read.step)
        if answered.isdisjoint({(*key, read.position), (*key, None)}):
            yield ("a planned read has no record",
                   f"arm {read.arm}, {read.phase}, step {read.step}, position {read.position}",
                   "a record or more for each of header.reads",
                   "run that arm, or leave it out of the plan")  # fmt: skip


def _unknown_taps(trace: Trace) -> Iterable[Finding]:
    unknown = sorted({record.tensor for record in _results(trace)} - BY_NAME.keys())
    if unknown and trace.header.mode != PATHS:  # there a module's own name is its tap's
        yield ("unknown tensor names", ", ".join(map(ascii, unknown)), ", ".join(tap.name for tap in TAPS),
               "use the canonical names; unknown ones are compared, but no op is known for them")  # fmt: skip


def _no_embed(trace: Trace) -> Iterable[Finding]:
    having = {record.arm for record in trace.records if record.tensor == "embed"}
    without = [arm for arm in _arms(trace) if arm not in having]
    if without:
        yield ("no embed", f"arms without it: {', '.join(without)}", "embed in every arm",
               "record the token lookup; it proves that both arms were fed the same token")  # fmt: skip


def _no_sketch(trace: Trace) -> Iterable[Finding]:
    without = sum(record.sketch is None and record.payload is None for record in trace.records)
    if without:
        yield ("no sketch", f"{without} of {len(trace.records)} records with neither sketch nor payload",
               "a sketch in every record",
               "write one; without it only equality or a lower bound of the drift can be proven")  # fmt: skip


def _no_controls(trace: Trace) -> Iterable[Finding]:
    arms = _arms(trace)
    if not any(_CONTROL.fullmatch(arm) for arm in arms):
        yield ("no control arms", f"arms {', '.join(arms)}", "P' and D', E1, E2…, or N1, N2…",
               "run some; without them the floor is only the roundoff bound")  # fmt: skip


def _odd_hashes(trace: Trace) -> Iterable[Finding]:
    odd: list[Record] = [r for r in trace.records if r.hash and not _HASH.fullmatch(r.hash)]
    if odd:
        yield ("hashes of another kind", f"{_count(len(odd), 'record')}, the first {odd[0].hash!a}",
               "XXH3-64 as 0x and 16 lower-case hexadecimal digits",
               "hash the canonical bytes with XXH3-64; payloads can be checked by no other")  # fmt: skip


_CONTROL = re.compile("[EN][0-9]+|.+'")
_HASH = re.compile("0x[0-9a-f]{16}")


def _arms(trace: Trace) -> list[str]:
    """Return the arms, in the order in which the plan, then the records name them."""
    named = [read.arm for read in trace.header.reads] + [record.arm for record in _results(trace)]
    return list(dict.fromkeys(named))


def _results(trace: Trace) -> list[Record]:
    """Return what arms computed: all but the model's constants."""
    return [record for record in trace.records if record.arm != CONSTANTS]
