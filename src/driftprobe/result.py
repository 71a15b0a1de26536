"""analyze() and its Result: a judgement of traces, whoever wrote them, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driftprobe.artifacts import copy_run, staged, write_reports
from driftprobe.diagnose import diagnose
from driftprobe.errors import TraceError
from driftprobe.faults import Expected
from driftprobe.fingerprint import Array
from driftprobe.frames import to_frame
from driftprobe.judgement import Failure, Impact, Judgement, Limits, Verdict
from driftprobe.load import load_traces, traces_folder
from driftprobe.payload import Payloads
from driftprobe.plan import parse_mode
from driftprobe.quick import Quick, load_quickly
from driftprobe.report import inline, reasoning, render_all
from driftprobe.report.text import count
from driftprobe.taps import place
from driftprobe.trace import Record, Trace
from driftprobe.verdict import base_traces, judge


@dataclass(frozen=True, slots=True)
class Step:
    """Where a run is: told to `progress` as it goes on."""

    done: int
    of: int
    what: str


Progress = Callable[[Step], None]


@dataclass(frozen=True)
class Result:
    """A judgement and the traces that it stands on."""

    judgement: Judgement
    traces: tuple[Trace, ...]
    folder: Path
    """The traces folder."""
    _temporary: Any = field(default=None, repr=False, compare=False)
    expected: Expected | None = None
    """What a planted fault must show; of the run that planted it, and in no trace."""
    thinned: bool = False
    """Whether some trace was judged from the pairs that answer for it."""
    mode: str | None = None
    """The mode that `analyze` was asked for."""

    @property
    def verdict(self) -> Verdict:
        """NO_DRIFT, STRUCTURAL_DRIFT, MISMATCH or N/A."""
        return self.judgement.verdict

    @property
    def reason(self) -> str:
        """Why, in a sentence with its figures."""
        return self.judgement.reason

    @property
    def first_failure(self) -> Failure | None:
        """The first tap that arithmetic does not explain, or None."""
        return self.judgement.first_failure

    @property
    def impact(self) -> Impact | None:
        """What the difference does to the logits."""
        return self.judgement.impact

    @property
    def detection_limit(self) -> Limits | None:
        """The smallest relative errors that this run could have told from rounding."""
        return self.judgement.limits

    def __repr__(self) -> str:
        first = self.judgement.first_failure
        at = f", first at {place(first.layer, first.tensor)}" if first is not None else ""
        return f"Result({self.verdict.value}{at}; {count(len(self.traces), 'trace')} in {str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """Return the map of layers and taps for a notebook."""
        return inline.render(self.judgement)

    def explain(self) -> str:
        """Return the reasoning behind the verdict as text, in the order in which it was made."""
        return reasoning.render(self.judgement, base_traces(self.traces))

    def to_frame(self, library: str | None = None) -> Any:
        """Return the records as a data frame, one a row, with drift, floor and excess where they were judged.

        `library` is `polars` or `pandas`; None takes the first that is installed. Raises UsageError where none is.
        """
        return to_frame(self.judgement, self.traces, library)

    def reports(self) -> dict[str, str]:
        """Return every report's text by file name; reports list all pairs, so that traces are judged whole for them."""
        if self.thinned:
            return analyze(self.folder, mode=self.mode).reports()
        return render_all(self.judgement, self.traces, Payloads(self.folder))

    def write(self, folder: str | Path) -> Path:
        """Write traces and reports into a folder (made where missing) and return the final report's path.

        Raises OutputError where the folder holds other files or cannot be written.
        """
        root = Path(folder)
        if self.folder.resolve() == (root / "traces").resolve():
            write_reports(root, self.reports())
        else:
            with staged(root) as stage:
                copy_run(self.folder, stage)
                write_reports(stage.root, self.reports())
        return root / "B3_66_V2_FINAL_REPORT.md"


class _Watched(Payloads):
    """Payloads that tell which trace is judged: the one whose tensors are asked for."""

    def __init__(self, folder: Path, traces: Sequence[Trace], progress: Progress) -> None:
        super().__init__(folder)
        self._left = {id(record): number for number, trace in enumerate(traces) for record in trace.records}
        self._seen: set[int] = set()
        self._traces, self._progress = traces, progress

    def get(self, record: Record) -> Array | None:
        """Return a record's tensor; a record of a trace that was not asked for before is a step."""
        number = self._left.get(id(record))
        if number is not None and number not in self._seen:
            self._progress(Step(len(self._seen), len(self._traces), f"judging {self._traces[number].path}"))
            self._seen.add(number)
        return super().get(record)


def analyze(
    folder: str | Path, *, mode: str | None = None, progress: Progress | None = None, whole: bool = True
) -> Result:
    """Judge the traces of a folder, whoever wrote them; `progress` is told each trace as it is come to.

    Without `whole`, a large trace that is quiet is judged from the pairs that answer for all others, a thousand times
    faster and in little memory: verdict and figures are the same, and its other cells and records are not kept.
    `mode` keeps to the traces of one mode, and names it for traces that do not say theirs. Raises TraceError where a
    trace breaks the format, or none is of that mode.
    """
    place = Path(folder)
    if mode is not None:
        parse_mode(mode)
    quick = Quick()
    named = None if mode == "both" else mode
    found = load_traces(place, named) if whole else load_quickly(place, named, quick)
    traces = tuple(trace for trace in found if mode in {None, "both", trace.header.mode})
    if not traces:
        raise TraceError(
            "no trace of this mode",
            where=str(place),
            measured=", ".join(sorted({trace.header.mode for trace in found})),
            allowed=str(mode),
            next_step="leave --mode out, or run that mode first",
        )
    where = traces_folder(place)
    payloads = Payloads(where) if progress is None else _Watched(where, traces, progress)
    judged = diagnose(judge(traces, payloads, quick.ready), traces, payloads)
    return Result(judged, traces, where, thinned=bool(quick.ready), mode=mode)
