"""Is the prefill/decode difference of an LLM engine arithmetic or a bug, and where does it begin?

import driftprobe
result = driftprobe.probe("builtin:tiny")
result.verdict, result.first_failure
result.write("artifacts/mine")
"""

from driftprobe.api import Result, analyze, probe
from driftprobe.errors import DriftprobeError
from driftprobe.judgement import Verdict
from driftprobe.load import load_traces
from driftprobe.selftest import self_test
from driftprobe.trace import read_trace as load_trace
from driftprobe.version import __version__

__all__ = [
    "DriftprobeError",
    "Result",
    "Verdict",
    "__version__",
    "analyze",
    "load_trace",
    "load_traces",
    "probe",
    "self_test",
]
