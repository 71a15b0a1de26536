"""The rules that others use to tell a wrong result from rounding, on the very tensors that driftprobe judged.

Each rule sees one tap's pair: the reference (arm P), the candidate (arm D) and, where there is one, the reference at
the ladder's float64 rung. Masked scores are minus infinity on both sides; rules that cannot take those see the rest.
A rule detects a run if any of its taps breaks it; the first such tap, in order of execution, is the one it names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from driftprobe.fingerprint import Array, hash_bytes, to_float64


@dataclass(frozen=True)
class Tapped:
    """One tap of one step on both sides."""

    layer: int | None
    tensor: str
    reference: Array
    candidate: Array
    wide: Array | None = None
    """The reference at float64."""


Breaks = Callable[[Tapped], bool | None]
"""Whether a tap breaks the rule; None where the rule has nothing to say."""


@dataclass(frozen=True)
class Rule:
    """One rule and where it comes from."""

    name: str
    source: str
    breaks: Breaks
    only: str = ""
    """The one tap that it looks at; empty for all."""
    needs_wide: bool = False
    """Whether it needs a reference in higher precision."""


@dataclass(frozen=True)
class Found:
    """What a rule says of one run."""

    detected: bool
    layer: int | None = None
    tensor: str | None = None


def ask(rule: Rule, taps: Iterable[Tapped]) -> Found | None:
    """Return what a rule says of a run's taps in order of execution; None where it has nothing to look at."""
    asked = False
    for tap in taps:
        if rule.only and tap.tensor != rule.only:
            continue
        broken = True if tap.reference.shape != tap.candidate.shape else rule.breaks(tap)
        asked |= broken is not None
        if broken:
            return Found(True, tap.layer, tap.tensor)
    return Found(False) if asked else None


def _torch(array: Array) -> torch.Tensor:
    """Return a tensor of the array's own dtype (through float32, which holds bfloat16 and float16 exactly)."""
    if array.dtype.name in ("bfloat16", "float16") or array.dtype.name.startswith("float8"):
        own = getattr(torch, array.dtype.name)
        return torch.from_numpy(np.ascontiguousarray(array.astype(np.float32))).to(own)
    return torch.from_numpy(np.array(array))


def _finite(*arrays: Array) -> list[np.ndarray] | None:
    """Return float64 values where all are finite; None where one side is not finite and another is."""
    wide = [to_float64(array).reshape(-1) for array in arrays]
    masks = [np.isfinite(values) for values in wide]
    if any((mask != masks[0]).any() for mask in masks):
        return None
    return [values[masks[0]] for values in wide]


def hash_differs(tap: Tapped) -> bool:
    """Whether the bytes differ."""
    return hash_bytes(tap.reference.tobytes()) != hash_bytes(tap.candidate.tobytes())


def assert_close_fails(tap: Tapped) -> bool:
    """Whether torch.testing.assert_close fails with its defaults for the dtype."""
    try:
        torch.testing.assert_close(_torch(tap.candidate), _torch(tap.reference), equal_nan=True)
    except AssertionError:
        return True
    return False


def allclose_fails(tap: Tapped) -> bool:
    """Whether numpy.allclose(rtol=1e-5), atol at its default of 1e-8, is false."""
    return not np.allclose(to_float64(tap.candidate), to_float64(tap.reference), rtol=1e-5, equal_nan=True)


def calc_diff_fails(tap: Tapped) -> bool:
    """Whether 1 − 2Σxy / (Σx² + Σy²) is above 1e-3."""
    values = _finite(tap.reference, tap.candidate)
    if values is None:
        return True
    x, y = values
    size = float((x * x + y * y).sum())
    return size > 0.0 and 1.0 - 2.0 * float((x * y).sum()) / size > 1e-3


def twice_reference_error_fails(tap: Tapped) -> bool | None:
    """Whether the largest error against float64 is above twice that of the reference in the run's dtype."""
    if tap.wide is None or tap.wide.shape != tap.reference.shape:
        return None
    values = _finite(tap.reference, tap.candidate, tap.wide)
    if values is None:
        return True
    reference, candidate, wide = values
    if not wide.size:
        return False
    return float(np.abs(candidate - wide).max()) > 2.0 * float(np.abs(reference - wide).max())


def compiler_check_fails(tap: Tapped) -> bool | None:
    """Whether torch._dynamo.utils.same(reference, candidate, fp64_ref) is false, with its default tolerance."""
    from torch._dynamo.utils import same

    if tap.wide is None or tap.wide.shape != tap.reference.shape:
        return None
    sides = [_torch(array) for array in (tap.reference, tap.candidate, tap.wide)]
    if not sides[0].is_floating_point():
        return bool(not torch.equal(sides[0], sides[1]))
    masked = sides[0].isinf()
    if bool((masked != sides[1].isinf()).any()):
        return True
    reference, candidate, wide = (side[~masked] for side in sides)
    return not same(reference, candidate, wide.double(), equal_nan=True, log_error=lambda *_: None)


def nmse_fails(tap: Tapped) -> bool:
    """Whether Σ(d−p)² / Σp² is above 1e-2."""
    values = _finite(tap.reference, tap.candidate)
    if values is None:
        return True
    p, d = values
    size = float((p * p).sum())
    return float(((d - p) ** 2).sum()) > 1e-2 * size


def top1_differs(tap: Tapped) -> bool:
    """Whether another token has the largest logit."""
    return int(to_float64(tap.reference).argmax()) != int(to_float64(tap.candidate).argmax())


RULES = (
    Rule("hash equality", "bit for bit, as batch-invariance and determinism tests ask", hash_differs),
    Rule("assert_close", "torch.testing.assert_close, defaults by dtype (PyTorch documentation)", assert_close_fails),
    Rule("allclose 1e-5", "numpy.allclose, rtol=1e-5 (NumPy documentation)", allclose_fails),
    Rule("calc_diff 1e-3", "DeepGEMM, calc_diff of its testing module", calc_diff_fails),
    Rule("2 × reference error", "flash-attention, tests/test_flash_attn.py", twice_reference_error_fails,
         needs_wide=True),
    Rule("compiler check", "PyTorch, torch._dynamo.utils.same with fp64_ref", compiler_check_fails, needs_wide=True),
    Rule("logits NMSE 1e-2", "llama.cpp, nmse of tests/test-llama-archs.cpp", nmse_fails, only="logits"),
    Rule("top-1 agreement", "the same greedy token, as many ports of models check", top1_differs, only="logits"),
)  # fmt: skip
