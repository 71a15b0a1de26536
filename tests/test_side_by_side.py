"""driftprobe compare: two runs on the same tokens, prefill with prefill and decode with decode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from driftprobe.api import compare
from driftprobe.cli import group
from driftprobe.errors import OutputError, UsageError
from driftprobe.extents import BY_HASH, NO_CONTROL, NOT_KEPT
from driftprobe.judgement import Verdict
from driftprobe.payload import payload_file, write_payloads
from driftprobe.result import analyze
from driftprobe.trace import FAILED, Event, Trace
from driftprobe.trace_file import TraceWriter
from make_trace import Change, both, drifting, toy, unchanged, without


def put(folder: Path, change: Change = unchanged, *, payload: bool = False, edit=lambda trace: trace, **more) -> Path:
    """Write one side's run into a folder."""
    trace, arrays = toy(change, **more)
    trace = edit(trace)
    kept = {}
    with TraceWriter(folder / "traces" / trace.path, trace.header) as writer:
        for record in trace.records:
            if payload and record.arm in ("P", "D"):
                name = ".".join(map(str, record.key))
                kept.setdefault(record.arm, {})[name] = arrays.get(record)
                stem = trace.path.removesuffix(".jsonl")
                record = replace(record, payload=f"{payload_file(stem, record.arm)}#{name}")  # noqa: PLW2901
            writer.record(record)
        for event in trace.events:
            writer.event(event)
    for arm, arrays_ in kept.items():
        write_payloads(folder / "traces" / payload_file(trace.path.removesuffix(".jsonl"), arm), arrays_)
    return folder


def tokens(*ids: int):
    """An edit that gives a trace its token ids; the prompt of `toy` has 5."""
    return lambda trace: replace(trace, header=replace(trace.header, token_ids=ids))


def only(*places: tuple[int | None, str], arms: tuple[str, ...] = ("D", "D'")) -> Change:
    """Arms that record these places alone."""
    return lambda site, array: array if site.arm not in arms or (site.layer, site.tensor) in places else None


def verdicts(result) -> dict[str, Verdict]:
    return {judged.prompt: judged.verdict for mode in result.judgement.modes.values() for judged in mode.prompts}


def compared(tmp_path: Path, left: Path, right: Path):
    return compare(left, right, tmp_path / "out", date="d")


def rounded(site, array):
    """Another engine's rounding: every element off by half a unit of float32, in a way of its own."""
    noise = np.random.default_rng(7 + len(site.tensor) + (site.layer or 0)).choice([-1, 1], array.shape)
    return (array * (1 + noise * np.float32(2**-24))).astype(array.dtype) if site.tensor != "embed" else array


def test_the_same_run_twice_is_no_drift(tmp_path):
    result, left_out = compared(tmp_path, put(tmp_path / "a"), put(tmp_path / "b"))
    assert result.verdict is Verdict.NO_DRIFT
    assert left_out == []
    assert [t.header.prompt for t in result.traces] == ["p0.decode", "p0.prefill"]


def test_another_engines_rounding_is_structural(tmp_path):
    result, _ = compared(tmp_path, put(tmp_path / "a"), put(tmp_path / "b", rounded))
    assert result.verdict is Verdict.STRUCTURAL_DRIFT


@pytest.mark.parametrize("payload", [False, True])
def test_a_fault_in_one_engines_decode_is_found_there_and_prefill_passes(tmp_path, payload):
    right = put(tmp_path / "b", drifting(0.1, start=(1, "q_rope")), payload=payload)
    result, _ = compared(tmp_path, put(tmp_path / "a", payload=payload), right)
    assert result.verdict is Verdict.MISMATCH
    first = result.first_failure
    assert first is not None
    assert (first.prompt, first.layer, first.tensor) == ("p0.decode", 1, "q_rope")
    assert verdicts(result) == {"p0.decode": Verdict.MISMATCH, "p0.prefill": Verdict.NO_DRIFT}


def test_a_fault_in_both_phases_of_one_engine_is_found_though_its_own_run_is_clean(tmp_path):
    """What a run of one engine cannot see: prefill and decode that are wrong alike."""
    every = ("P", "D", "P'", "D'", "E1", "E7", "E31", "N1", "N2", "A")
    right = put(tmp_path / "b", drifting(0.01, arms=every, start=(1, "attn_out")))
    assert analyze(right).verdict is Verdict.NO_DRIFT
    result, _ = compared(tmp_path, put(tmp_path / "a"), right)
    assert result.verdict is Verdict.MISMATCH
    assert result.first_failure is not None
    assert result.first_failure.tensor == "attn_out"


def test_other_tokens_are_not_compared_and_it_says_where(tmp_path):
    left, right = put(tmp_path / "a", edit=tokens(*range(40))), put(tmp_path / "b", edit=tokens(0, 1, 9, *range(3, 40)))
    with pytest.raises(UsageError, match="token 2 and token 9 at position 2"):
        compared(tmp_path, left, right)
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_one_side_lacks_is_told(tmp_path):
    left, right = put(tmp_path / "a"), put(tmp_path / "b")
    put(right, prompt="extra")
    _, left_out = compared(tmp_path, left, right)
    assert len(left_out) == 1
    assert left_out[0].startswith("prompt extra: only ")


def test_a_tap_that_one_engine_lacks_is_left_out_and_listed(tmp_path):
    taps = ("attn_norm", "q_proj", "k_cache", "attn_out", "x_out")
    left, right = put(tmp_path / "a", taps=taps), put(tmp_path / "b", taps=taps[1:])
    result, _ = compared(tmp_path, left, right)
    assert result.verdict is Verdict.NO_DRIFT
    report = result.reports()["B3_66_V2_FINAL_REPORT.md"]
    assert "only the reference has this tap" in report
    assert "attn_norm" in report


def test_the_side_with_noise_arms_is_the_reference(tmp_path):
    left, right = put(tmp_path / "a", arms=("P'", "D'", "E1")), put(tmp_path / "b", arms=("P'", "D'", "E1", "N1", "N2"))
    result, _ = compared(tmp_path, left, right)
    assert result.traces[0].header.labels["reference"].endswith("/b")
    prefill: Trace = next(t for t in result.traces if t.header.prompt == "p0.prefill")
    assert {r.arm for r in prefill.records} == {"P", "D", "P'", "D'", "E1", "D@E1", "N1", "N2"}


def test_the_command_prints_both_sides_and_the_verdict(tmp_path):
    left, right = put(tmp_path / "a"), put(tmp_path / "b", drifting(0.1, start=(0, "q_proj")))
    done = CliRunner().invoke(group, ["compare", str(left), str(right), "--out", str(tmp_path / "o"), "--date", "d"])
    assert "verdict: MISMATCH" in done.output
    assert "reference: " in done.output
    assert done.exit_code == 1
    assert (tmp_path / "o/d/compare/B3_66_V2_FINAL_REPORT.md").is_file()


def crashed(*, arms: tuple[str, ...], event: bool = True):
    """An edit: these arms failed and left no record."""

    def edit(trace: Trace) -> Trace:
        told = tuple(Event(event=f"{FAILED}exit code 139", arm=arm) for arm in arms) if event else ()
        return replace(trace, records=tuple(r for r in trace.records if r.arm not in arms), events=told)

    return edit


@pytest.mark.parametrize("event", [True, False])
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_decode_that_crashed_on_one_side_is_not_available(tmp_path, side, event):
    """With its event, or with nothing but a plan that nobody kept."""
    edits = {side: crashed(arms=("D", "D'"), event=event)}
    left, right = (put(tmp_path / name, edit=edits.get(name, lambda trace: trace)) for name in "ab")
    result, _ = compared(tmp_path, left, right)
    assert verdicts(result) == {"p0.decode": Verdict.NOT_AVAILABLE, "p0.prefill": Verdict.NO_DRIFT}
    assert result.verdict is Verdict.NOT_AVAILABLE
    assert f"/{side}, its arm D: {'exit code 139' if event else 'no record of step 0'}" in result.reason
    assert "exit code 139" in result.reports()["B3_66_V2_FINAL_REPORT.md"] or not event


def test_a_decode_that_crashed_on_both_sides_is_told_in_the_prefills_trace(tmp_path):
    sides = [put(tmp_path / name, edit=crashed(arms=("D", "D'"))) for name in "ab"]
    result, _ = compared(tmp_path, *sides)
    assert verdicts(result) == {"p0.prefill": Verdict.NOT_AVAILABLE}
    assert "exit code 139" in result.reason


def test_a_control_that_failed_is_not_available_as_in_its_own_run(tmp_path):
    right = put(tmp_path / "b", edit=crashed(arms=("E1",)))
    result, _ = compared(tmp_path, put(tmp_path / "a"), right)
    assert verdicts(result) == {"p0.decode": Verdict.NO_DRIFT, "p0.prefill": Verdict.NOT_AVAILABLE}
    assert "its arm E1" in result.reason


def test_a_trace_that_was_cut_is_not_available(tmp_path):
    right = put(tmp_path / "b")
    path = next((right / "traces").glob("*.jsonl"))
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    result, _ = compared(tmp_path, put(tmp_path / "a"), right)
    assert result.verdict is Verdict.NOT_AVAILABLE
    assert "incomplete" in result.reason


def test_a_phase_that_one_side_never_ran_is_not_available(tmp_path):
    def prefill_alone(trace: Trace) -> Trace:
        reads = tuple(read for read in trace.header.reads if read.arm[0] != "D")
        return replace(crashed(arms=("D", "D'"), event=False)(trace), header=replace(trace.header, reads=reads))

    result, _ = compared(tmp_path, put(tmp_path / "a"), put(tmp_path / "b", edit=prefill_alone))
    assert result.verdict is Verdict.NOT_AVAILABLE
    assert "nothing was compared" in result.reason


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize(
    "places", [((None, "embed"), (0, "x_in")), ((None, "embed"), *((0, t) for t in ("x_in", "x_out")))]
)
def test_a_side_that_ends_early_cannot_pass(tmp_path, side, places):
    changes = {side: only(*places, arms=("P", "P'", "D", "D'", "E1", "E7"))}
    left, right = (put(tmp_path / name, changes.get(name, unchanged)) for name in "ab")
    result, _ = compared(tmp_path, left, right)
    assert result.verdict is Verdict.NOT_AVAILABLE
    lacking, having = ("reference", "candidate") if side == "a" else ("candidate", "reference")
    assert f"the {lacking} lacks the last tap of the {having}: logits" in result.reason
    assert "lacks the last tap" in result.reports()["B3_66_V2_FINAL_REPORT.md"]


def test_logits_that_are_missing_at_one_of_two_positions_cannot_pass(tmp_path):
    right = put(tmp_path / "b", without(arm="D", tensor="logits", step=1), steps=2)
    result, _ = compared(tmp_path, put(tmp_path / "a", steps=2), right)
    assert verdicts(result) == {"p0.decode": Verdict.NOT_AVAILABLE, "p0.prefill": Verdict.NO_DRIFT}


def test_a_fault_in_what_a_side_has_is_found_though_it_ends_early(tmp_path):
    change = both(drifting(0.1, start=(1, "q_rope")), without(tensor="logits"))
    result, _ = compared(tmp_path, put(tmp_path / "a"), put(tmp_path / "b", change))
    assert result.verdict is Verdict.MISMATCH
    assert result.first_failure is not None
    assert result.first_failure.tensor == "q_rope"


def test_other_shapes_cannot_pass_but_other_rows_of_a_cache_can(tmp_path):
    def cut(tensor: str, columns: slice, rows: slice = slice(None)) -> Change:
        return lambda site, array: array[rows, columns] if site.tensor == tensor else array

    left = put(tmp_path / "a")
    result, _ = compared(tmp_path, left, put(tmp_path / "b", cut("q_proj", slice(1))))
    assert result.verdict is Verdict.NOT_AVAILABLE
    assert "the two sides have other shapes: layer 0 q_proj" in result.reason
    result, _ = compared(tmp_path, left, put(tmp_path / "c", cut("k_cache", slice(None), slice(2, None))))
    assert result.verdict is Verdict.NO_DRIFT
    assert "the two sides keep other rows" in result.reports()["B3_66_V2_FINAL_REPORT.md"]


CACHES = ("k_cache", "v_cache")


def padded(*tensors: str, by: int = 3, value: float = 9.0, axis: int = 0) -> Change:
    """Every arm holds more rows, or keys, than the step has positions."""

    def change(site, array):
        if site.tensor not in tensors:
            return array
        more = np.full_like(np.take(array, [0], axis=axis), value)
        return np.concatenate([array, *[more] * by], axis=axis)

    return change


def starting(first: int, *tensors: str):
    """An edit: these taps' first row is of a later position."""
    return lambda trace: replace(
        trace, records=tuple(replace(r, row_start=first) if r.tensor in tensors else r for r in trace.records)
    )


def events(result, prompt: str) -> dict[str, dict[str, int]]:
    trace: Trace = next(t for t in result.traces if t.header.prompt == prompt)
    return {event.event: event.measured for event in trace.events}


def test_rows_of_a_padded_cache_are_paired_by_position_and_the_rest_is_told(tmp_path):
    left, right = put(tmp_path / "a", payload=True), put(tmp_path / "b", padded(*CACHES), payload=True)
    result, _ = compared(tmp_path, left, right)
    assert result.verdict is Verdict.NO_DRIFT, result.reason
    for phase in ("prefill", "decode"):
        over = events(result, f"p0.{phase}")["not compared: rows that the candidate alone has"]
        assert over == {f"layer {layer} {tap}": 3 for layer in (0, 1) for tap in CACHES}
    trace = next(t for t in result.traces if t.header.prompt == "p0.prefill")
    here = {r.arm: r for r in trace.records if (r.layer, r.tensor) == (0, "k_cache")}
    assert here.keys() >= {"P", "D", "P'", "D'", "E1", "D@E1"}, "controls are cut too"
    assert {r.shape for r in here.values()} == {(6, 2, 64)}
    assert "rows that the candidate alone has" in result.reports()["B3_66_V2_FINAL_REPORT.md"]


def test_a_fault_in_a_row_of_both_is_found_whatever_else_they_keep(tmp_path):
    def spoiled(site, array):
        if site.arm[0] == "D" and (site.layer, site.tensor) == (1, "v_cache"):
            array = array.copy()
            array[2] = 0.0
        return array

    left, right = put(tmp_path / "a", payload=True), put(tmp_path / "b", both(spoiled, padded(*CACHES)), payload=True)
    result, _ = compared(tmp_path, left, right)
    first = result.first_failure
    assert first is not None
    assert (first.prompt, first.layer, first.tensor) == ("p0.decode", 1, "v_cache")
    assert first.diagnosis is not None
    assert (first.diagnosis.cause, first.diagnosis.parameters) == ("cache_zero", {"rows": (2,)})


@pytest.mark.parametrize("first", [0, 2])
def test_a_window_is_compared_where_it_is(tmp_path, first):
    """One side has dropped two rows; named for other positions than they are of, they are other rows."""
    window = lambda site, array: array[2:] if site.tensor in CACHES else array  # noqa: E731
    left = put(tmp_path / "a", payload=True)
    right = put(tmp_path / "b", window, payload=True, edit=starting(first, *CACHES))
    result, _ = compared(tmp_path, left, right)
    assert result.verdict is (Verdict.NO_DRIFT if first else Verdict.MISMATCH)
    assert "not compared: rows that the reference alone has" in events(result, "p0.decode")


@pytest.mark.parametrize("payload", [True, False])
def test_as_many_rows_of_other_positions_are_not_compared_with_each_other(tmp_path, payload):
    left = put(tmp_path / "a", payload=payload)
    shifted = lambda site, array: np.roll(array, -1, axis=0) if site.tensor in CACHES else array  # noqa: E731
    right = put(tmp_path / "b", shifted, payload=payload, edit=starting(1, *CACHES))
    result, _ = compared(tmp_path, left, right)
    assert result.verdict is Verdict.NO_DRIFT
    assert any(event.startswith("not compared: ") for event in events(result, "p0.decode"))


@pytest.mark.parametrize(("value", "seen"), [(-np.inf, False), (0.5, True)])
def test_keys_that_one_side_alone_has_may_be_left_over_where_they_are_masked(tmp_path, value, seen):
    left = put(tmp_path / "a", payload=True)
    right = put(tmp_path / "b", padded("attn_scores", value=value, axis=-1), payload=True)
    result, _ = compared(tmp_path, left, right)
    assert result.verdict is (Verdict.MISMATCH if seen else Verdict.NO_DRIFT)
    if seen:
        assert result.first_failure is not None
        assert result.first_failure.tensor == "attn_scores"
    else:
        over = events(result, "p0.decode")["not compared: keys without weight that the candidate alone has"]
        assert over == {"layer 0 attn_scores": 3, "layer 1 attn_scores": 3}


@pytest.mark.parametrize("size", [0.0, 0.5])
def test_without_whole_tensors_other_rows_are_left_over_and_hashes_say_whether_the_shared_ones_are_equal(
    tmp_path, size
):
    change = both(drifting(size, arms=("D", "D'"), start=(1, "k_cache")), padded(*CACHES))
    result, _ = compared(tmp_path, put(tmp_path / "a"), put(tmp_path / "b", change))
    told = events(result, "p0.decode")
    assert told[f"not compared: {BY_HASH}"]["layer 0 k_cache"] == 1
    assert (f"not compared: {NOT_KEPT}" in told) == bool(size)


def test_a_control_whose_rows_cannot_be_cut_is_left_over_and_told(tmp_path):
    change = both(drifting(1e-7, arms=("E1",), start=(0, "k_cache")), padded(*CACHES))
    left, right = put(tmp_path / "a", payload=True), put(tmp_path / "b", change, payload=True)
    result, _ = compared(tmp_path, left, right)
    assert result.verdict is Verdict.NO_DRIFT
    assert events(result, "p0.prefill")[f"not compared: {NO_CONTROL}"]["layer 0 k_cache"] == 1


def test_a_next_token_of_its_own_is_not_available_and_what_lies_before_it_is_compared(tmp_path):
    mine, theirs = tuple(range(40)), (*range(6), 30, *range(7, 40))
    left = put(tmp_path / "a", steps=2, edit=tokens(*mine))
    result, left_out = compared(tmp_path, left, put(tmp_path / "b", steps=2, edit=tokens(*theirs)))
    assert result.verdict is Verdict.NOT_AVAILABLE
    assert "token 6 and token 30 at position 6 (each side chose its own next token)" in result.reason
    assert left_out == ["prompt p0: token 6 and token 30 at position 6 (each side chose its own next token)"]
    assert {r.logical_tok_idx for t in result.traces for r in t.records} == {5}


def test_a_prefill_whose_fault_chose_another_token_is_found_before_it(tmp_path):
    theirs = (*range(6), 30, *range(7, 40))
    right = put(tmp_path / "b", drifting(0.1, arms=("P", "P'", "E1", "E7"), start=(1, "attn_out")), steps=2,
                edit=tokens(*theirs))  # fmt: skip
    result, _ = compared(tmp_path, put(tmp_path / "a", steps=2, edit=tokens(*range(40))), right)
    assert verdicts(result) == {"p0.decode": Verdict.NOT_AVAILABLE, "p0.prefill": Verdict.MISMATCH}
    assert result.verdict is Verdict.MISMATCH


def test_one_prompt_with_a_token_of_its_own_makes_the_whole_not_available(tmp_path):
    left, right = put(tmp_path / "a"), put(tmp_path / "b")
    put(left, prompt="p1", edit=tokens(*range(40)))
    put(right, prompt="p1", edit=tokens(*range(5), 30, *range(6, 40)))
    result, _ = compared(tmp_path, left, right)
    assert result.verdict is Verdict.NOT_AVAILABLE
    assert verdicts(result)["p0.decode"] is Verdict.NO_DRIFT
    assert "chose its own next token" in result.reason
    done = CliRunner().invoke(group, ["compare", str(left), str(right), "--out", str(tmp_path / "o"), "--date", "d"])
    assert done.exit_code == 3


def test_the_command_counts_beside_the_verdict_what_was_not_compared(tmp_path):
    left, right = put(tmp_path / "a"), put(tmp_path / "b", without(tensor="attn_norm"))
    done = CliRunner().invoke(group, ["compare", str(left), str(right), "--out", str(tmp_path / "o"), "--date", "d"])
    assert done.exit_code == 0, done.output
    for phase in ("decode", "prefill"):
        assert f"not compared:    2 of p0.{phase}: only the reference has this tap (layer 0 attn_norm" in done.output


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["a", "b", "a/traces", "a/traces/deep/er", ".", "link", "out/../b"])
def test_a_comparison_never_takes_the_place_of_its_sides(tmp_path, place):
    base = tmp_path / "base"
    left, right = put(base / "a"), put(base / "b")
    (base / "link").symlink_to(left)
    before = files(base)
    for sides in ((left, right), (left / "traces", right / "traces")):
        with pytest.raises(OutputError, match=r"overwrite what it compares|is a link"):
            compare(*sides, base / place)
        assert files(base) == before


@pytest.mark.parametrize("hidden", [".out.partial", ".out.old"])
def test_nor_does_it_build_itself_where_a_side_lies(tmp_path, hidden):
    left, right = put(tmp_path / hidden), put(tmp_path / "b")
    before = files(tmp_path)
    with pytest.raises(OutputError, match="overwrite what it compares"):
        compared(tmp_path, left, right)
    assert files(tmp_path) == before


def test_a_run_is_not_replaced_by_a_comparison_but_a_comparison_is(tmp_path):
    left, right, third = (put(tmp_path / name) for name in "abc")
    before = files(third)
    with pytest.raises(OutputError, match="holds a run"):
        compare(left, right, third)
    assert files(third) == before
    for _ in range(2):
        result, _ = compared(tmp_path, left, right)
    assert result.verdict is Verdict.NO_DRIFT


def small_sketches(trace: Trace) -> Trace:
    """An edit: sketches of 16 sums."""
    records = tuple(replace(r, sketch=None if r.sketch is None else r.sketch[:16]) for r in trace.records)
    return replace(trace, header=replace(trace.header, sketch_size=16), records=records)


def test_sketches_of_two_sizes_are_refused_with_both_sides_named(tmp_path):
    left, right = put(tmp_path / "a"), put(tmp_path / "b", edit=small_sketches)
    with pytest.raises(UsageError) as caught:
        compared(tmp_path, left, right)
    assert caught.value.what == "sketches of two sizes"
    assert f"{left}: sketch_size 64; {right}: sketch_size 16" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_sketches_of_another_size_on_both_sides_are_compared(tmp_path):
    left, right = (put(tmp_path / name, edit=small_sketches) for name in "ab")
    assert compared(tmp_path, left, right)[0].verdict is Verdict.NO_DRIFT


def test_a_side_without_sketches_takes_the_others_size(tmp_path):
    def bare(trace: Trace) -> Trace:
        return replace(trace, records=tuple(replace(record, sketch=None) for record in trace.records))

    left, right = put(tmp_path / "a", edit=bare), put(tmp_path / "b", edit=small_sketches)
    assert compared(tmp_path, left, right)[0].verdict is Verdict.NO_DRIFT


def test_the_command_speaks_of_reference_and_candidate(tmp_path):
    left, right = put(tmp_path / "a"), put(tmp_path / "b")
    done = CliRunner().invoke(group, ["compare", str(left), str(right), "--out", str(tmp_path / "o"), "--date", "d"])
    assert "verdict: NO_DRIFT — reference and candidate agree bit for bit" in done.output
    done = CliRunner().invoke(group, ["analyze", str(left)])
    assert "verdict: NO_DRIFT — prefill and decode agree bit for bit" in done.output


def test_sides_that_name_their_prompts_tokens_alone_are_compared(tmp_path):
    left, right = (put(tmp_path / name, edit=tokens(*range(5))) for name in "ab")
    result, _ = compared(tmp_path, left, right)
    assert result.verdict is Verdict.NO_DRIFT
    assert result.traces[0].header.prompt_len == 5
