"""Replays one op in float64 from an arm's own captured inputs and the model's constants.

An arm whose result agrees with the replay computed that op right; one that does not is the side at fault.

Axes legend: see taps.py.
"""

from __future__ import annotations

import numpy as np

from driftprobe.fingerprint import Float64
from driftprobe.hypotheses.experts import expert_sum
from driftprobe.hypotheses.logits import head_of
from driftprobe.hypotheses.ops import (
    ACTIVATIONS,
    NORM_INPUTS,
    activation_name,
    linear,
    mlp_input,
    mlp_of,
    norm_input,
    norm_of,
)
from driftprobe.hypotheses.residual import stream
from driftprobe.hypotheses.tables import looked_up
from driftprobe.hypotheses.view import View
from driftprobe.taps import BY_NAME, LINEAR_INPUTS, input_of


def replay(view: View) -> Float64 | None:
    """Return what the failing op gives in float64 for this arm's inputs, or None where the trace does not tell."""
    tensor, result = view.tensor, view.result()
    if result is None:
        return None
    found: Float64 | None = None
    if tensor in NORM_INPUTS or tensor == "final_norm":
        norm, x = norm_of(view, tensor), norm_input(view)
        found = None if norm is None or x is None else norm(x)
    elif tensor == "logits":
        head = head_of(view)
        found = None if head is None else head.result()
    elif tensor in LINEAR_INPUTS or view.tap(input_of(tensor)) is not None:
        weight = view.constant(f"{tensor}.weight")
        found = None if weight is None else linear(view, weight)
    elif tensor == "mlp_out":
        found = _mlp(view) if mlp_of(view) is not None else expert_sum(view)
    elif tensor in ("x_in", "x_mid", "x_out"):
        found = stream(view)
    elif tensor in ("attn_scores", "attn_probs", "attn_ctx"):
        found = _attention(view)
    elif tensor not in BY_NAME:
        found = looked_up(view)
    return found.reshape(result.shape) if found is not None and found.size == result.size else None


def _mlp(view: View) -> Float64 | None:
    mlp, name = mlp_of(view), activation_name(view)
    if mlp is None or not name:
        return None
    x = mlp_input(view, mlp.up.shape[1])
    return None if x is None else mlp(x, ACTIVATIONS[name])


def _attention(view: View) -> Float64 | None:
    """Replay scores, softmax or weighted sum; masked keys are those that the arm masked itself."""
    if view.tensor == "attn_probs":
        scores = view.tap("attn_scores")
        return None if scores is None else _softmax(scores, view.constant("attn_scores.sinks"))
    if view.tensor == "attn_ctx":
        probs, values = view.tap("attn_probs"), view.tap("v_cache")
        if probs is None or values is None or probs.shape[-1] != len(values) or probs.shape[1] % values.shape[1]:
            return None
        values = values.repeat(probs.shape[1] // values.shape[1], axis=1)
        return np.asarray(np.einsum("ths,shd->thd", probs, values))
    scores, keys, scale = view.result(), view.tap("k_cache"), view.number("attn_scores.scale")
    query = view.first("q_rope", "q_norm", "q_proj")
    if scores is None or keys is None or query is None or scale is None or view.constant("alibi.slopes") is not None:
        return None
    if query.shape[-1] != keys.shape[-1] or scores.shape[-1] != len(keys) or query.shape[1] % keys.shape[1]:
        return None
    found = np.einsum("thd,shd->ths", query, keys.repeat(query.shape[1] // keys.shape[1], axis=1)) * scale
    cap = view.number("attn_scores.softcap")
    found = found if not cap else cap * np.tanh(found / cap)
    return np.where(np.isneginf(scores), -np.inf, found)


def _softmax(scores: Float64, sinks: Float64 | None) -> Float64:
    peak = scores.max(-1, keepdims=True)
    if sinks is not None:
        peak = np.maximum(peak, sinks.reshape(1, -1, 1))
    weights = np.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.reshape(1, -1, 1) - peak)
    return np.asarray(weights / total)
