"""Is the prefill/decode difference of an LLM engine arithmetic or a bug, and where does it begin?

import driftprobe
result = driftprobe.probe("builtin:tiny")
result.verdict, result.first_failure
result.write("artifacts/mine")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from driftprobe.version import __version__

if TYPE_CHECKING:
    from driftprobe.api import Result, analyze, probe
    from driftprobe.errors import DriftprobeError
    from driftprobe.judgement import Verdict
    from driftprobe.load import load_traces
    from driftprobe.paths import probe_paths
    from driftprobe.selftest import self_test
    from driftprobe.trace import read_trace as load_trace

__all__ = [
    "DriftprobeError",
    "Result",
    "Verdict",
    "__version__",
    "analyze",
    "load_trace",
    "load_traces",
    "probe",
    "probe_paths",
    "self_test",
]

_PLACES = {
    "DriftprobeError": "errors.DriftprobeError",
    "Result": "api.Result",
    "Verdict": "judgement.Verdict",
    "analyze": "api.analyze",
    "load_trace": "trace.read_trace",
    "load_traces": "load.load_traces",
    "probe": "api.probe",
    "probe_paths": "paths.probe_paths",
    "self_test": "selftest.self_test",
}
"""Where each name is; imported when it is first asked for, so that a command loads what it needs and no more."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(".")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
