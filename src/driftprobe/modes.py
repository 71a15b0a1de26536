"""A mode's judgement, from those of its prompts: the worst verdict, the first failure, the ranges of attention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from driftprobe.climb import in_words
from driftprobe.compare import SCORES
from driftprobe.failures import step_order
from driftprobe.impact import worst_impact
from driftprobe.judgement import (
    Attention,
    AttentionSums,
    Failure,
    Limits,
    ModeJudgement,
    Range,
    Sums,
    TraceJudgement,
    Verdict,
)
from driftprobe.rows import kv_indicators
from driftprobe.trace import Record, Trace


def judge_mode(name: str, judged: Sequence[TraceJudgement]) -> ModeJudgement:
    """Return the judgement of a mode from those of all its prompts."""
    verdict = worst_of(item.verdict for item in judged)
    deciding = [item for item in judged if item.verdict is verdict]
    first = _first_of(judged)
    shown = max(deciding, key=_largest_excess, default=None)
    reason = in_words(first) if first is not None else f"{shown.prompt}: {shown.reason}" if shown is not None else ""
    cells = [cell for item in judged for cell in item.cells]
    return ModeJudgement(
        mode=name,
        verdict=verdict,
        reason=reason,
        prompts=tuple(judged),
        kv=kv_indicators([row for item in judged for row in item.rows], cells, _more_rows(judged)),
        attention=_attention(judged),
        impact=worst_impact(item.impact for item in judged),
        limits=pool_limits(item.limits for item in judged),
        first_failure=first,
    )


def _more_rows(judged: Iterable[TraceJudgement]) -> list[tuple[str, int, int]]:
    known = (item.left_out.cache_rows for item in judged if item.left_out is not None)
    return [(tensor, *counts) for found in known for tensor, counts in found.items()]


def _first_of(judged: Sequence[TraceJudgement]) -> Failure | None:
    """Return a mode's first failure: earliest step, then tap; where prompts share it the longest's, with most rows."""
    found = [(item, item.first_failure) for item in judged]
    failing = [(item, failure) for item, failure in found if failure is not None]
    first = min(
        failing,
        key=lambda pair: (step_order(pair[1]), -pair[0].prompt_len),
        default=None,
    )
    return None if first is None else first[1]


def _largest_excess(item: TraceJudgement) -> float:
    return max((cell.excess for cell in item.cells if cell.excess is not None), default=0.0)


_SEVERITY = (Verdict.NO_DRIFT, Verdict.STRUCTURAL_DRIFT, Verdict.NOT_AVAILABLE, Verdict.MISMATCH)


def worst_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst of verdicts: MISMATCH before N/A before STRUCTURAL_DRIFT before NO_DRIFT."""
    return max(verdicts, key=_SEVERITY.index, default=Verdict.NOT_AVAILABLE)


def pool_limits(found: Iterable[Limits | None]) -> Limits | None:
    """Return the smallest and the largest of all detection limits; None of none."""
    known = [limits for limits in found if limits is not None]
    if not known:
        return None
    low, high = min(known, key=lambda x: x.smallest), max(known, key=lambda x: x.largest)
    return Limits(low.smallest, low.smallest_at, high.largest, high.largest_at)


def _attention(judged: Sequence[TraceJudgement]) -> Attention:
    def pooled(tensor: str, arm: str) -> Range | None:
        return _range(item.attention.sums.get((tensor, arm), Sums()) for item in judged)

    return Attention(
        pre_softmax_prefill=pooled(SCORES, "P"),
        pre_softmax_decode=pooled(SCORES, "D"),
        post_softmax_prefill=pooled("attn_probs", "P"),
        post_softmax_decode=pooled("attn_probs", "D"),
        recomputed=any(item.attention.recomputed for item in judged),
    )


def attention_sums(trace: Trace) -> AttentionSums:
    """Return the extremes and sums of a trace's scores and probabilities, of P and of D."""
    records = [record for record in trace.records if record.arm in {"P", "D"}]
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.tensor in {SCORES, "attn_probs"}:
            found.setdefault((record.tensor, record.arm), []).append(record)
    return AttentionSums(
        {key: _sums(mine) for key, mine in found.items()},
        recomputed=any(r.source == "recomputed" for r in records if r.tensor == SCORES),
    )


def _sums(records: Iterable[Record]) -> Sums:
    """Return extremes and sum of all finite elements; the sum is exact, so that no order of records changes it."""
    low, high, totals, count = math.inf, -math.inf, [], 0
    for r in records:
        if r.min is None or r.max is None or r.mean is None or not r.shape:
            continue
        finite = math.prod(r.shape) - (r.nan_count or 0) - (r.inf_count or 0)
        if finite:
            low, high = min(low, r.min), max(high, r.max)
            totals.append(r.mean * finite)
            count += finite
    return Sums(low, high, math.fsum(totals), count)


def _range(found: Iterable[Sums]) -> Range | None:
    """Return extremes and mean over all finite elements of several traces."""
    some = [sums for sums in found if sums.count]
    if not some:
        return None
    total, count = math.fsum(sums.total for sums in some), sum(sums.count for sums in some)
    return Range(min(sums.low for sums in some), max(sums.high for sums in some), total / count)
