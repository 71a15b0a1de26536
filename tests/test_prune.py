"""--payload failing: what is kept, that the verdict stands without the rest, and that the trace stays valid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import test_ties
from driftprobe.fingerprint import Array
from driftprobe.judgement import Status, TraceJudgement, Verdict
from driftprobe.payload import FOLDER, Payloads, write_payloads
from driftprobe.prune import KEPT_FROM, prune_payloads
from driftprobe.trace import Trace
from driftprobe.trace_file import TraceWriter, read_trace
from driftprobe.validate import validate
from driftprobe.verdict import judge_trace
from make_trace import CONTROLS, Change, both, drifting, rotated, scaled, toy, unchanged

D = ("D", "D'")
TAPS = ("x_in", "q_proj", "k_cache", "v_cache", "x_out")


def written(folder: Path, change: Change, **more: object) -> Trace:
    """A trace on disk with the whole tensors of arms P, D and T."""
    trace, arrays = toy(change, **({"taps": TAPS} | more))  # type: ignore[arg-type]
    kept: dict[str, dict[str, Array]] = {arm: {} for arm in {"P", "D", "T"} & {r.arm for r in trace.records}}
    records = []
    for record in trace.records:
        if record.arm in kept:
            name = f"{record.step}.{record.layer}.{record.tensor}"
            whole = arrays.get(record)
            assert whole is not None
            kept[record.arm][name] = whole
            record = replace(record, payload=f"{FOLDER}/p0.{record.arm}.safetensors#{name}")  # noqa: PLW2901
        records.append(record)
    for arm, body in kept.items():
        write_payloads(folder / FOLDER / f"p0.{arm}.safetensors", body)
    with TraceWriter(folder / trace.path, trace.header) as writer:
        for record in records:
            writer.record(record)
    return read_trace(folder / trace.path)


def pruned(
    folder: Path, change: Change, **more: object
) -> tuple[TraceJudgement, TraceJudgement, set[tuple[int | None, str]]]:
    """The judgement before and after, and the places whose tensors are kept."""
    trace = written(folder, change, **more)
    before = judge_trace(trace, Payloads(folder))
    prune_payloads(trace, before, folder)
    after = read_trace(folder / trace.path)
    kept = {(r.layer, r.tensor) for r in after.records if r.payload}
    return before, judge_trace(after, Payloads(folder)), kept


def test_a_clean_run_keeps_its_logits_alone(tmp_path):
    before, after, kept = pruned(tmp_path, unchanged)
    assert kept == {(None, "logits")}
    assert before.verdict is after.verdict is Verdict.NO_DRIFT


def test_a_failing_run_keeps_what_failed_and_the_layer_where_it_began(tmp_path):
    """A diagnosis reads what goes into the op that failed, and must be the same once the trace is pruned."""
    before, after, kept = pruned(tmp_path, drifting(0.1, D, (1, "q_proj"), caches=False))
    began = {(1, tensor) for tensor in TAPS}
    assert kept == {*began, (None, "embed"), (None, "final_norm"), (None, "logits")}
    assert before.verdict is after.verdict is Verdict.MISMATCH
    assert before.first_failure == after.first_failure


def test_a_failing_cache_keeps_the_rows_of_every_layer(tmp_path):
    _, after, kept = pruned(tmp_path, drifting(0.1, D, (1, "k_cache")))
    assert {(0, "k_cache"), (0, "v_cache"), (1, "v_cache")} <= kept  # K may stand where V belongs
    assert (0, "q_proj") not in kept
    assert after.rows


def test_a_drift_near_its_limit_keeps_its_tensors(tmp_path):
    """Else its sketch, which errs by some 9 %, could turn a pass into a failure behind the reader's back."""
    limit = judge_trace(toy(unchanged, taps=TAPS)[0], Payloads(tmp_path)).cells[1].floor.limit
    assert KEPT_FROM < 1
    before, after, kept = pruned(tmp_path, drifting(0.9 * limit, D, (0, "x_in")))
    assert (0, "x_in") in kept
    assert [c.status for c in before.cells] == [c.status for c in after.cells]


def test_a_rotation_that_fails_by_its_distances_keeps_what_it_was_given(tmp_path):
    """In a later layer than the first failure's too: its inputs pass, and without them it would."""
    taps = ("x_in", "q_proj", "q_rope", "k_cache", "x_out")
    wrong = both(rotated, *(drifting_at("q_rope", 0.1, layer) for layer in (0, 1)), drifting_at("q_proj", 1e-7, 1))
    before, after, kept = pruned(tmp_path, wrong, taps=taps, facts={"casts": {"q_proj": "bfloat16"}})
    assert (1, "q_proj") in kept
    assert [c.status for c in before.cells] == [c.status for c in after.cells]
    assert [(c.layer, c.tensor) for c in after.cells if c.status is Status.FAIL] == [(0, "q_rope"), (1, "q_rope")]


def drifting_at(tensor: str, size: float, layer: int) -> Change:
    """One tap of decode in one layer is off by a relative error."""
    return lambda site, array: (
        scaled(array, size) if site.arm in D and (site.layer, site.tensor) == (layer, tensor) else array
    )


def test_an_earlier_tokens_flip_keeps_the_rows_that_show_it(tmp_path):
    """One row among many, within the limit of all of them: nothing but the rows themselves tells why scores fail."""
    routed = {"taps": test_ties.TAPS, "arms": (*CONTROLS, "T"), "steps": 2}
    clean = judge_trace(toy(test_ties.tied(test_ties.CLOSE), **routed)[0], Payloads(tmp_path))
    limit = next(c for c in clean.cells if (c.layer, c.tensor) == (1, "k_cache")).floor.limit
    row = test_ties.row_off(test_ties.DECODED, size=1.5 * limit)
    later = drifting(0.5, D, (1, "attn_scores"), step=1, caches=False)
    before, after, kept = pruned(tmp_path, both(test_ties.tied(test_ties.CLOSE), row, later), **routed)
    assert before.verdict is after.verdict is Verdict.STRUCTURAL_DRIFT, after.reason
    assert before.flips == after.flips and (1, "k_cache") in kept and (1, "q_proj") not in kept


@pytest.mark.parametrize("change", [unchanged, drifting(0.1, D)])
def test_the_pruned_folder_is_valid(tmp_path, change):
    pruned(tmp_path, change)
    assert validate(tmp_path).problems == ()
    assert not list(tmp_path.glob(".*.part"))


def test_a_file_of_which_nothing_is_kept_is_removed(tmp_path):
    trace = written(tmp_path, unchanged)
    judged = judge_trace(trace, Payloads(tmp_path))
    bare = replace(trace, records=tuple(replace(r, payload=None) if r.tensor == "logits" else r for r in trace.records))
    prune_payloads(bare, judged, tmp_path)
    assert not list((tmp_path / FOLDER).iterdir())


def test_an_incomplete_trace_is_left_as_it_is(tmp_path):
    trace = written(tmp_path, unchanged)
    before = (tmp_path / trace.path).read_bytes()
    prune_payloads(replace(trace, damage="cut"), judge_trace(trace, Payloads(tmp_path)), tmp_path)
    assert (tmp_path / trace.path).read_bytes() == before
