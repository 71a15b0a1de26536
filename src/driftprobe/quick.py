"""A folder of traces of any size, judged file by file: what needs no second look is never held as records.

Each large trace of ours is read as columns and thinned. Where the pairs that answer for it are quiet, their judgement
stands; any other trace is loaded, and judged as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

from driftprobe.compare import NoPayloads
from driftprobe.judgement import TraceJudgement
from driftprobe.load import load_traces, read_whole, trace_files, traces_folder
from driftprobe.packed import ENDING, packed_columns
from driftprobe.scan import read_columns
from driftprobe.thin import thin
from driftprobe.trace import Trace
from driftprobe.verdict import judge_thinned

LARGE = 4 << 20
"""Bytes from which a trace is worth thinning; below, its judgement takes no time."""

AT_ONCE = 2
"""Traces that are read at once: so many are in memory, and the scanner runs without the interpreter's lock."""


class Quick:
    """Reads traces as they are met, and judges them where that can be done from columns."""

    def __init__(self, large: int = LARGE) -> None:
        self.large = large
        self.ready: dict[str, TraceJudgement] = {}
        self._ahead: dict[Path, Future[_Read | None]] = {}

    def ahead(self, paths: Iterable[Path], pool: Executor) -> None:
        """Begin with files that will be asked for; links are left until somebody has seen where they lead."""
        plain = (path for path in paths if path.is_file() and not path.is_symlink())
        self._ahead = {path: pool.submit(self._read, path) for path in plain}

    def __call__(self, path: Path) -> Trace | None:
        """Return a trace, without its records if it is judged and done with; None where it has to be loaded."""
        begun = self._ahead.pop(path, None)
        found = self._read(path) if begun is None else begun.result()
        if found is None:
            return None
        trace, judged = found
        if judged is not None:
            self.ready[trace.path] = judged
        return trace

    def _read(self, path: Path) -> _Read | None:
        packed, size = path.suffix == ENDING, path.stat().st_size
        large = size >= (self.large // 16 if packed else self.large)
        if packed and not large:
            return None
        columns = packed_columns(path) if packed else read_columns(path)
        pairs = thin(columns) if columns is not None and large else None
        judged = None if pairs is None else judge_thinned(pairs, NoPayloads())
        if pairs is not None and judged is not None:
            return pairs.trace, judged
        whole = None if columns is None or packed else columns.trace()
        return None if whole is None else (whole, None)


_Read = tuple[Trace, "TraceJudgement | None"]
"""A trace, and its judgement where it is done with: without its records then."""


def load_quickly(folder: Path, mode: str | None, quick: Quick) -> tuple[Trace, ...]:
    """Return the traces of a folder; those in `quick.ready` are judged, and hold no records.

    A run and its rung of the precision ladder are compared, so that either both are judged already, or none.
    Raises TraceError as `load_traces` does.
    """
    where = traces_folder(folder)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        quick.ahead(trace_files(where), pool)
        try:
            found = load_traces(folder, mode, quick)
        finally:
            pool.shutdown(cancel_futures=True)
    loaded = {_run(trace) for trace in found if trace.path not in quick.ready}
    again = [trace for trace in found if trace.path in quick.ready and _run(trace) in loaded]
    for trace in again:
        del quick.ready[trace.path]
    names = {trace.path for trace in again}
    return tuple(read_whole(where, trace) if trace.path in names else trace for trace in found)


def _run(trace: Trace) -> tuple[str, str]:
    return (trace.header.mode, trace.header.prompt)
