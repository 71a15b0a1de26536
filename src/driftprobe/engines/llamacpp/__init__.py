"""llama.cpp as an engine, through llama-cpp-python: any GGUF model on the CPU (docs/engines.md)."""

from __future__ import annotations

from driftprobe.engines.llamacpp.engine import LlamaCppEngine, open_engine

__all__ = ["LlamaCppEngine", "open_engine"]
