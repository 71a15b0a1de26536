"""llama.cpp as an engine, through llama-cpp-python: any GGUF model on the CPU (docs/engines.md)."""

from __future__ import annotations

import os

# Read when llama.cpp's OpenMP is loaded. Threads that spin at a barrier wait for one that has lost its core: on a busy
# machine of two cores a run of two threads took ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from driftprobe.engines.llamacpp.engine import LlamaCppEngine, open_engine

__all__ = ["LlamaCppEngine", "open_engine"]
