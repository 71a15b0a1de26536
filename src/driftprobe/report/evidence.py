"""The evidence matrix: what was measured for H0 and for H1, each tick with the figure that set it.

A prompt with a shut gate is no evidence and is left out. A row that lacks its data ticks neither column and says why.
Ticks are not votes: one drift that arithmetic cannot explain decides for H1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from driftprobe.compare import NoPayloads, by_arm, pair_arms
from driftprobe.floor import LIMIT
from driftprobe.judgement import Cell, Judgement, Reading, RowCheck, Status, TraceJudgement
from driftprobe.report.facts import (
    all_prompts,
    differing,
    failing,
    largest,
    main_mode,
    open_gates,
    sort_cells,
    where,
)
from driftprobe.report.text import count, listed, number, times
from driftprobe.trace import Record, Trace

QKV_TAPS = frozenset(
    ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope", "k_cache", "v_cache")
)  # fmt: skip
ATTENTION_TAPS = frozenset(("attn_scores", "attn_probs"))


@dataclass(frozen=True, slots=True)
class EvidenceRow:
    """One kind of evidence; ticked by measurement alone."""

    label: str
    supports_h0: bool
    supports_h1: bool
    figure: str
    """The figure that set the ticks, or why there is none."""


_Finding = tuple[bool, bool, str]
"""Supports H0, supports H1, the figure."""


def evidence_matrix(judgement: Judgement, traces: Sequence[Trace]) -> tuple[EvidenceRow, ...]:
    """Return every row of the matrix: the seed report's four, then four more."""
    prompts = all_prompts(judgement)
    usable = [item for item in prompts if open_gates(item)]
    on_usable: tuple[tuple[str, Callable[[], _Finding]], ...] = (
        ("Q hashes vary across prompts (expected: different seq_len)", lambda: _q_hashes(judgement, usable, traces)),
        ("K/V hashes consistent for same layer (cache reuse)", lambda: _cache_rows(usable)),
        ("Attention scores diverge beyond seq_len expectations", lambda: _attention(usable, traces)),
        ("Q/K/V hashes inconsistent where expected to match", lambda: _qkv(usable)),
        ("Every tap within its floor", lambda: _every_tap(usable)),
        ("Decode with prefill's cache rows (arm A) agrees", lambda: _aligned(usable)),
        ("Longer prefills agree with the short one (controls E innocent)", lambda: _controls(usable)),
    )
    shut = (False, False, _why_shut(prompts))
    rows = [EvidenceRow(label, *(measure() if usable else shut)) for label, measure in on_usable]
    return (*rows, EvidenceRow("Engine deterministic (the same run twice)", *_deterministic(prompts)))


def _why_shut(prompts: Sequence[TraceJudgement]) -> str:
    names = dict.fromkeys(gate.name for item in prompts for gate in item.gates if not gate.passed)
    return (
        f"no figure: gate {listed([repr(n) for n in names], 3)} is shut" if names else "no figure: nothing was judged"
    )


def _q_hashes(judgement: Judgement, usable: Sequence[TraceJudgement], traces: Sequence[Trace]) -> _Finding:
    mode = main_mode(judgement)
    names = {item.prompt for item in usable if item.mode == mode}
    mine = [trace for trace in traces if trace.header.mode == mode and trace.header.prompt in names]
    if len(mine) < 2:
        return False, False, f"no figure: it takes two prompts, {count(len(mine), 'prompt')} can be used"
    layers = sorted({r.layer for t in mine for r in t.records if r.tensor == "q_proj" and r.layer is not None})
    if not layers:
        return False, False, "no figure: q_proj was not recorded"
    first = _vary(mine, layers[0])
    return first if first[0] or first[1] or len(layers) == 1 else _vary(mine, layers[-1])


def _vary(traces: Sequence[Trace], layer: int) -> _Finding:
    """Count distinct hashes against distinct inputs: equal hashes are odd only where the inputs differ."""
    by_arm = {arm: [_q_of(trace, arm, layer) for trace in traces] for arm in ("P", "D")}
    if any(record is None for records in by_arm.values() for record in records):
        return False, False, f"no figure: q_proj of layer {layer} is not in every prompt's prefill and decode"
    hashes = {arm: len({r.hash for r in records if r is not None}) for arm, records in by_arm.items()}
    inputs = {_input(trace, record, layer) for trace, record in zip(traces, by_arm["P"], strict=True)}
    figure = (
        f"{count(hashes['P'], 'distinct q_proj hash', 'distinct q_proj hashes')} in prefill and {hashes['D']} in "
        f"decode over {count(len(traces), 'prompt')}, layer {layer}"
    )
    if None in inputs:
        varies = min(hashes.values()) > 1
        return varies, False, figure + ("" if varies else "; the trace does not say whether their tokens differ")
    if len(inputs) == 1:
        return False, False, figure + "; every prompt feeds it the same token, so equal hashes say nothing"
    alike = min(hashes.values()) < len(inputs)
    return not alike, alike, figure + (f"; but {len(inputs)} different inputs went in" if alike else "")


def _q_of(trace: Trace, arm: str, layer: int) -> Record | None:
    found = (r for r in trace.records if (r.arm, r.tensor, r.layer, r.step) == (arm, "q_proj", layer, 0))
    return next((r for r in found if r.phase != "prefill_row"), None)


def _input(trace: Trace, record: Record | None, layer: int) -> tuple[int, ...] | None:
    """Return what q_proj depends on: the token alone in layer 0, the tokens so far in any other; None if unknown."""
    if record is None or record.token_id is None:
        return None
    if layer == 0:
        return (record.token_id,)
    position = record.logical_tok_idx
    return trace.header.token_ids[: position + 1] or None if position is not None else None


def _cache_rows(usable: Sequence[TraceJudgement]) -> _Finding:
    checks = [row for item in usable for row in item.rows]
    if not any(row.compared for row in checks):
        return False, False, "no figure: no cached K or V row of both sides carries a hash"
    within = sum(row.within for row in checks)
    figure = " and ".join(f"{_sum(checks, tap)} {tap[0].upper()} rows" for tap in ("k_cache", "v_cache")) + " equal"
    if within:
        figure += f"; {within} differ but are within the floor"
    bad = [row for row in checks if row.compared > row.equal + row.within]
    if not bad:
        return True, False, figure
    first = min(bad, key=lambda row: (row.step, row.layer, row.tensor))
    beyond = sum(row.compared - row.equal - row.within for row in bad)
    place = f"layer {first.layer} {first.tensor} of {first.prompt}, step {first.step}"
    return False, True, f"{figure}; {beyond} are not prefill's, first in {place}"


def _sum(checks: Iterable[RowCheck], tap: str) -> str:
    mine = [row for row in checks if row.tensor == tap]
    return f"{sum(row.equal for row in mine)}/{sum(row.compared for row in mine)}"


def _attention(usable: Sequence[TraceJudgement], traces: Sequence[Trace]) -> _Finding:
    cells = [cell for item in usable for cell in item.cells if cell.tensor in ATTENTION_TAPS]
    if not cells:
        return False, False, "no figure: neither attn_scores nor attn_probs was recorded in both phases"
    within, beyond, figure = _against_floor(cells)
    return within, beyond, f"{figure}; {_seq_len_drift(usable, traces)}"


def _seq_len_drift(usable: Sequence[TraceJudgement], traces: Sequence[Trace]) -> str:
    """Say what another seq_len alone does to the attention: the drift of controls E at the same taps."""
    names = {(item.mode, item.prompt) for item in usable}
    mine = (trace for trace in traces if (trace.header.mode, trace.header.prompt) in names)
    seen = [replace(t, records=tuple(r for r in t.records if r.tensor in ATTENTION_TAPS)) for t in mine]
    drifts = [
        item.drift.value
        for trace in seen
        for arms in (by_arm(trace),)
        for arm in sorted({r.arm for r in trace.records if r.phase == "prefill_ext"})
        for item in pair_arms(arms, "P", arm, NoPayloads()).matched
        if item.drift.value is not None
    ]
    if not drifts:
        return "no longer prefill measured what seq_len does"
    return f"another seq_len alone (prefill_ext controls) drifts up to {number(max(drifts))}"


def _against_floor(cells: Sequence[Cell]) -> _Finding:
    """Compare cells with their floor: all within is H0, one beyond is H1, one untold and none beyond is neither."""
    bad, untold = failing(cells), [cell for cell in cells if cell.status is Status.UNKNOWN]
    if bad:
        first = sort_cells(bad)[0]
        worst = largest(bad)
        assert worst is not None, "a failing cell has an excess"
        beyond = sum(cell.beyond_floor for cell in bad)
        what = "beyond the floor" if beyond == len(bad) else f"more than rounding, {beyond} of them beyond the floor"
        figure = f"{len(bad)} of {len(cells)} {what}, first {where(first)} ({times(first.excess)})"
        return False, True, f"{figure}, largest excess {times(worst.excess)} at {where(worst)}, limit {LIMIT:g}"
    if untold:
        return False, False, f"no figure: {len(untold)} of {len(cells)} differ by an amount that the trace cannot tell"
    return True, False, _largest_words(cells)


def _largest_words(cells: Sequence[Cell]) -> str:
    different, worst = differing(cells), largest(cells)
    if not different or worst is None:
        return f"{len(cells)}/{len(cells)} equal bit for bit"
    lead = f"{len(cells) - len(different)}/{len(cells)} equal, {len(different)} differ but are within the floor"
    shift = ""
    if worst.excess is not None and worst.excess > LIMIT:
        shift = ": no more than a constant along a row, or than its softmax shows"
    return f"{lead}; largest excess {times(worst.excess)} at {where(worst)}, limit {LIMIT:g}{shift}"


def _qkv(usable: Sequence[TraceJudgement]) -> _Finding:
    expected, left_out = [], 0
    for item in usable:
        fair, after = _expected_to_match(item.cells)
        expected += fair
        left_out += after
    note = f"; {left_out} behind an earlier failure of another op are left out" if left_out else ""
    if not expected:
        why = (
            "every Q/K/V tap stands behind an earlier failure of another op"
            if left_out
            else "no Q/K/V tap was recorded"
        )
        return False, False, f"no figure: {why}"
    within, beyond, figure = _against_floor(expected)
    return within, beyond, figure + note


def _expected_to_match(cells: Iterable[Cell]) -> tuple[list[Cell], int]:
    """Return the Q/K/V cells whose inputs agree, and how many follow a failure of another op: those must differ."""
    fair: list[Cell] = []
    after = 0
    disturbed = False
    for cell in sort_cells(cells):
        if cell.tensor not in QKV_TAPS:
            disturbed = disturbed or cell.status is Status.FAIL
        elif disturbed:
            after += 1
        else:
            fair.append(cell)
    return fair, after


def _every_tap(usable: Sequence[TraceJudgement]) -> _Finding:
    return _against_floor([cell for item in usable for cell in item.cells])


def _aligned(usable: Sequence[TraceJudgement]) -> _Finding:
    read = [item for item in usable if item.reading is not Reading.NONE]
    if not read:
        return False, False, "no figure: arm A was not run (mode kv_aligned runs it)"
    cells = [cell for item in read for cell in item.aligned_cells]
    bad = failing(cells)
    own = failing(cell for item in read for cell in item.cells)
    figure = (
        f"{len(bad)} of {len(cells)} pairs fail with prefill's rows, "
        f"{len(own)} with decode's own; reading: {', '.join(dict.fromkeys(item.reading.value for item in read))}"
    )
    if Status.UNKNOWN in {cell.status for cell in cells} and not bad:
        return False, False, "no figure: arm A differs by an amount that the trace cannot tell"
    readings = {item.reading for item in read}
    return readings == {Reading.H0}, bool(readings & {Reading.CONTENTS, Reading.COMPUTATION}), figure


def _controls(usable: Sequence[TraceJudgement]) -> _Finding:
    drifts: dict[str, float] = {}
    for item in usable:
        for arm, drift in item.controls.items():
            if arm.startswith("E"):
                drifts[arm] = max(drift, drifts.get(arm, 0.0))
    if not drifts:
        return False, False, "no figure: no longer prefill was run"
    sizes = ", ".join(f"{arm} {number(drift)}" for arm, drift in sorted(drifts.items(), key=lambda d: (len(d[0]), d)))
    guilty = [failure for item in usable for failure in item.failures if failure.arm[:1] == "E"]
    if guilty:
        return (
            False,
            True,
            f"{len(guilty)} beyond rounding, first {where(guilty[0])} ({times(guilty[0].excess)}); {sizes}",
        )
    return True, False, f"largest drift {sizes}; rounding explains all of it"


def _deterministic(prompts: Sequence[TraceJudgement]) -> _Finding:
    checked = [item.determinism for item in prompts if item.determinism.checked]
    if not checked:
        return False, False, "no figure: no arm was run twice"
    if any(gate.name == "deterministic" and not gate.passed for item in prompts for gate in item.gates):
        return (
            False,
            False,
            f"run-to-run drift up to {number(max(d.largest for d in checked))}, more than rounding explains",
        )
    failed = any(item.first_failure is not None for item in prompts)
    if all(item.equal for item in checked):
        figure = f"P' and D' repeat P and D bit for bit in {count(len(checked), 'trace')}"
        return not failed, failed, figure + ("; so the failure is no run-to-run noise" if failed else "")
    figure = (
        f"run-to-run drift up to {number(max(d.largest for d in checked))}, within rounding; it is part of the floor"
    )
    return not failed, False, figure
