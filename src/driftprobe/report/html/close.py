"""A closer look: the attention rows of a failing layer over each other, and the heads of the two logits rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from driftprobe.compare import PayloadSource
from driftprobe.fingerprint import Array, Float64, to_float64
from driftprobe.impact import rounding_of_a_logit
from driftprobe.judgement import Cell, Status
from driftprobe.report.html.pool import short
from driftprobe.report.html.views import View
from driftprobe.trace import Record

HEADS = 8
"""Heads that are shown: those that differ most."""
KEYS = 768
"""Keys that are shown of a longer row: its last ones, those nearest to the token."""
TOP = 10
"""Tokens that are shown of each side."""


def attention_rows(view: View, payloads: PayloadSource) -> dict[str, Any] | None:
    """Return both sides' probabilities of the first failing layer (scores, where those alone are whole), or None."""
    layer = next((c.layer for c in view.cells if c.status is Status.FAIL and c.layer is not None), None)
    if layer is None:
        return None
    for tensor in ("attn_probs", "attn_scores"):
        cell = next((c for c in view.cells if (c.layer, c.tensor) == (layer, tensor)), None)
        if cell is None:
            continue
        p, d = payloads.get(cell.reference), payloads.get(cell.candidate)
        if p is not None and d is not None and p.ndim == d.ndim == 3 and p.shape[1] == d.shape[1] and len(p) == len(d):
            return _both(cell, p, d)
    return None


def _both(cell: Cell, reference: Array, candidate: Array) -> dict[str, Any]:
    """Return the last token's rows `[H, S]`, aligned by absolute position and cut to what is shown."""
    p, d = (to_float64(array)[-1] for array in (reference, candidate))
    starts = (cell.reference.row_start, cell.candidate.row_start)
    end = max(starts[0] + p.shape[1], starts[1] + d.shape[1])
    first = max(min(starts), end - KEYS)
    p, d = _placed(p, starts[0], first, end), _placed(d, starts[1], first, end)
    gaps = np.abs(np.nan_to_num(p) - np.nan_to_num(d)).max(axis=1) if p.shape[1] else np.zeros(len(p))
    heads = sorted(int(i) for i in np.argsort(-gaps, kind="stable")[:HEADS])
    worst = int(np.argmax(gaps)) if len(gaps) else 0
    return {
        "layer": cell.layer, "tensor": cell.tensor, "first": first, "of": int(end - min(starts)), "all": len(p),
        "heads": heads, "worst": worst,
        "p": [[short(float(v)) for v in p[h]] for h in heads],
        "d": [[short(float(v)) for v in d[h]] for h in heads],
    }  # fmt: skip


def _placed(rows: Float64, start: int, first: int, end: int) -> Float64:
    """Return rows over the positions `first` to `end`, NaN where a side has none; −inf, a masked key, is NaN too."""
    full = np.full((len(rows), end - start), np.nan)
    full[:, : rows.shape[1]] = np.where(np.isfinite(rows), rows, np.nan)
    lead = np.full((len(rows), max(0, start - first)), np.nan)
    return np.concatenate([lead, full[:, max(0, first - start) :]], axis=1)


def top_tokens(view: View, payloads: PayloadSource) -> dict[str, Any] | None:
    """Return the largest logits of both phases by token id, and what rounding does to a difference of two."""
    cell = next((c for c in view.cells if c.tensor == "logits"), None)
    if cell is None or cell.reference.top is None or cell.candidate.top is None:
        return None
    sides = [_values(record, payloads) for record in (cell.reference, cell.candidate)]
    ids = list(dict.fromkeys((*cell.reference.top.ids[:TOP], *cell.candidate.top.ids[:TOP])))
    return {
        "ids": ids,
        "p": [short(sides[0].get(i), 9) for i in ids],
        "d": [short(sides[1].get(i), 9) for i in ids],
        "lse": [short(cell.reference.top.logsumexp, 6), short(cell.candidate.top.logsumexp, 6)],
        "rounding": short(rounding_of_a_logit(cell)),
    }


def _values(record: Record, payloads: PayloadSource) -> dict[int, float]:
    """Return token id -> logit: of every token where the tensor is whole, else of the recorded head."""
    whole = payloads.get(record)
    if whole is not None:
        return dict(enumerate(to_float64(whole).reshape(-1).tolist()))
    return {} if record.top is None else dict(zip(record.top.ids, record.top.values, strict=True))
