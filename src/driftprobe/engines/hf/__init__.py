"""Hugging Face transformers as an engine."""

from __future__ import annotations

from driftprobe.engines.hf.engine import HFEngine
from driftprobe.engines.hf.loading import load

__all__ = ["HFEngine", "open_engine"]


def open_engine(*, model: str = "builtin:tiny", dtype: str = "float32", attn: str | None = None) -> HFEngine:
    """Load a local model folder (or `builtin:tiny`) and return the engine that runs it.

    Raises ModelError for a folder that cannot be used and UsageError for an unknown dtype or attention kernel.
    """
    loaded, tokenizer = load(model, dtype=dtype, attn=attn)
    return HFEngine(loaded, tokenizer, label=model)
