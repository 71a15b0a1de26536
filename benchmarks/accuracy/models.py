"""The models that are measured: tiny ones of many architectures, and the built-in one; which are tuned on, which not.

The architectures themselves stand in tests/models.py, the one home of tiny models.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[2] / "tests"
if str(_TESTS) not in sys.path:
    sys.path.insert(0, str(_TESTS))

import models as tiny  # noqa: E402

BUILTIN = "builtin"
TUNED = (BUILTIN, "llama", "qwen3", "gpt2", "gemma2", "mistral", "qwen3_moe", "bloom", "deepseek_v3", "gpt_oss")
"""Architectures that thresholds and hypotheses were developed on."""
HELD_OUT = ("qwen2", "gpt_neox", "gemma3", "mixtral", "phi3", "cohere", "stablelm", "olmo2", "mpt", "smollm3", "mamba2")
"""Architectures that are only reported."""
TUNED_SEEDS, HELD_OUT_SEEDS = (0, 1), (100, 101)
WINDOW = 12
"""The sliding window of the tiny models that have one."""
DTYPES = ("float32", "bfloat16", "float16")


@lru_cache(maxsize=1)
def architectures() -> tuple[str, ...]:
    """Return the architectures that can be built here; those that this transformers lacks are left out."""
    return tuple(name for name in (*TUNED, *HELD_OUT) if name == BUILTIN or _known(name))


def _known(name: str) -> bool:
    if name not in tiny.ARCHITECTURES:
        return False
    try:
        tiny.configuration(name)
    except AttributeError:
        return False
    return True


def held_out(architecture: str, seed: int) -> bool:
    """Whether a case is one that is only reported: its architecture, or its weights, were never tuned on."""
    return architecture in HELD_OUT or seed in HELD_OUT_SEEDS


def kernels(architecture: str) -> tuple[str, ...]:
    """Return the attention kernels that an architecture is measured with."""
    return ("eager", "sdpa") if architecture == BUILTIN else tuple(tiny.ARCHITECTURES[architecture].kernels)


def engine(architecture: str, dtype: str, kernel: str, seed: int) -> Any:
    """Return a fresh engine of one model; the built-in one has one set of weights, and `seed` chooses prompts alone."""
    from driftprobe.engines.hf import HFEngine, open_engine

    if architecture == BUILTIN:
        made: Any = open_engine(model="builtin:tiny", dtype=dtype, attn=kernel)
    else:
        made = HFEngine(tiny.build(architecture, attn=kernel, dtype=dtype, seed=seed), label=architecture)
    # Cases run on one thread each; other threads and a batch are variations of their own, not controls of every case.
    made.knobs = tuple(knob for knob in made.knobs if knob not in {"threads", "batch"})
    return made


def tokens(count: int, seed: int) -> tuple[int, ...]:
    """Return a prompt of token ids, drawn from a seed."""
    return tuple(tiny.tokens(count, seed))
