"""verdict.json: the verdict for programs. Its fields are documented in docs/verdict-json.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from driftprobe.json_numbers import finite
from driftprobe.judgement import (
    Attention,
    Diagnosis,
    Failure,
    Impact,
    Judgement,
    KvIndicators,
    Ladder,
    Limits,
    ModeJudgement,
    Range,
    Status,
    TraceJudgement,
    Verdict,
)
from driftprobe.report.facts import mode_names
from driftprobe.trace import Trace

SCHEMA = "driftprobe/verdict/1"
_Object = dict[str, Any]


def render(judgement: Judgement, traces: Sequence[Trace]) -> str:
    """Return the document: keys in fixed order, non-finite numbers as strings."""
    body = {
        "schema": SCHEMA,
        "verdict": judgement.verdict.value,
        "reason": judgement.reason,
        "detection_limit": None if judgement.limits is None else judgement.limits.smallest,
        "detection_limit_detail": _limits(judgement.limits),
        "impact": _impact(judgement.impact),
        "modes": {name: _mode(judgement.modes.get(name)) for name in mode_names(judgement)},
    }
    return json.dumps(finite(body), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _limits(limits: Limits | None) -> _Object | None:
    if limits is None:
        return None
    return {
        "smallest": limits.smallest,
        "smallest_at": limits.smallest_at,
        "largest": limits.largest,
        "largest_at": limits.largest_at,
    }


def _impact(impact: Impact | None) -> _Object:
    known = impact or Impact(None, None, None, None, "unknown")
    return {
        "kl": known.kl,
        "max_abs_dlogit": known.max_abs_dlogit,
        "top1_agree": known.top1_agree,
        "margin": known.margin,
        "flip": known.flip,
    }


_NO_KV = KvIndicators(None, None, None)
_NO_ATTENTION = Attention(None, None, None, None, False)


def _mode(mode: ModeJudgement | None) -> _Object:
    prompts = mode.prompts if mode else ()
    return {
        "status": mode.status if mode else "NOT_RUN",
        "verdict": (mode.verdict if mode else Verdict.NOT_AVAILABLE).value,
        "reason": mode.reason if mode else "this mode was not run",
        "pairs": len(mode.cells) if mode else 0,
        "pass": mode.count(Status.PASS) if mode else 0,
        "fail": mode.count(Status.FAIL) if mode else 0,
        "unknown": mode.count(Status.UNKNOWN) if mode else 0,
        "unpaired": mode.unpaired if mode else 0,
        "first_failure": _failure(mode.first_failure) if mode else None,
        "kv": _kv(mode.kv if mode else _NO_KV),
        "attention": _attention(mode.attention if mode else _NO_ATTENTION) if mode else None,
        "readings": {item.prompt: item.reading.value for item in prompts},
        "determinism": _determinism(prompts) if mode else None,
        "ladder": {item.prompt: _ladder(item.ladder) for item in prompts if item.ladder is not None},
        "gates": {item.prompt: shut for item in prompts if (shut := _shut_gates(item))},
    }


def _ladder(ladder: Ladder) -> _Object:
    told = [slope.slope for slope in ladder.slopes if slope.slope is not None]
    return {
        "rung": ladder.rung,
        "outcome": ladder.outcome.value,
        "run_verdict": ladder.base_verdict.value,
        "verdict": ladder.judged.verdict.value,
        "reason": ladder.judged.reason,
        "run_unit_roundoff": ladder.base_unit,
        "unit_roundoff": ladder.unit,
        "limited_by": ladder.limited_by,
        "largest_control_drift": ladder.noise,
        "smallest_slope": min(told, default=None),
        "largest_slope": max(told, default=None),
        "detection_limit_detail": _limits(ladder.judged.limits),
        "seconds": ladder.seconds,
    }


def _failure(failure: Failure | None) -> _Object | None:
    if failure is None:
        return None
    return {
        "prompt": failure.prompt,
        "step": failure.step,
        "layer": failure.layer,
        "tensor": failure.tensor,
        "drift": failure.drift,
        "floor": failure.floor,
        "excess": failure.excess,
        "root_cause": failure.root_cause,
        "diagnosis": _diagnosis(failure.diagnosis),
        "phase": failure.phase,
        "rung": failure.rung,
    }


def _diagnosis(found: Diagnosis | None) -> _Object | None:
    if found is None:
        return None
    return {
        "cause": found.cause,
        "parameters": dict(found.parameters),
        "layer": found.layer,
        "tensor": found.tensor,
        "residual": found.residual,
        "explained": found.explained,
        "side": found.side or None,
        "z": found.z,
    }


def _kv(kv: KvIndicators) -> _Object:
    return {
        "k_hash_consistent": kv.k_hash_consistent,
        "v_hash_consistent": kv.v_hash_consistent,
        "kv_aligned": kv.kv_aligned,
        "k_rows_equal": kv.k_rows_equal,
        "k_rows": kv.k_rows,
        "v_rows_equal": kv.v_rows_equal,
        "v_rows": kv.v_rows,
    }


def _attention(attention: Attention) -> _Object:
    return {
        "pre_softmax": {
            "prefill": _range(attention.pre_softmax_prefill),
            "decode": _range(attention.pre_softmax_decode),
        },
        "post_softmax": {
            "prefill": _range(attention.post_softmax_prefill),
            "decode": _range(attention.post_softmax_decode),
        },
        "recomputed": attention.recomputed,
    }


def _range(found: Range | None) -> _Object | None:
    return None if found is None else {"min": found.min, "max": found.max, "mean": found.mean}


def _determinism(prompts: Sequence[TraceJudgement]) -> _Object:
    """Return whether any prompt was run twice, and whether every one that was gave the same bits."""
    checked = [item.determinism for item in prompts if item.determinism.checked]
    return {
        "checked": bool(checked),
        "equal": all(item.equal for item in checked) if checked else None,
        "largest": max(item.largest for item in checked) if checked else None,
    }


def _shut_gates(item: TraceJudgement) -> list[dict[str, str]]:
    return [{"name": gate.name, "detail": gate.detail} for gate in item.gates if not gate.passed]
