"""Is the prefill/decode difference of an LLM engine arithmetic or a bug, and where does it begin?

import driftprobe
result = driftprobe.probe("builtin:tiny")
result.verdict, result.first_failure
result.write("artifacts/mine")

A name is loaded when it is used: the pytest plugin lies in this package, and must cost a test suite nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from driftprobe.version import __version__

if TYPE_CHECKING:
    from driftprobe.api import probe
    from driftprobe.errors import DriftprobeError
    from driftprobe.expect import assert_equivalent
    from driftprobe.judgement import Verdict
    from driftprobe.load import load_traces
    from driftprobe.paths import probe_paths
    from driftprobe.result import Result, analyze
    from driftprobe.selftest import self_test
    from driftprobe.trace_file import read_trace as load_trace

__all__ = [
    "DriftprobeError",
    "Result",
    "Verdict",
    "__version__",
    "analyze",
    "assert_equivalent",
    "load_trace",
    "load_traces",
    "probe",
    "probe_paths",
    "self_test",
]
_HOMES = {
    "DriftprobeError": "errors",
    "Result": "result",
    "Verdict": "judgement",
    "analyze": "result",
    "assert_equivalent": "expect",
    "load_trace": "trace_file:read_trace",
    "load_traces": "load",
    "probe": "api",
    "probe_paths": "paths",
    "self_test": "selftest",
}
"""Public name -> the module it stands in, and its name there where that is another."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Load a public name."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, there = _HOMES[name].partition(":")
        found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), there or name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
