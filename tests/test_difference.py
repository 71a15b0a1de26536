"""diff and baseline: what got worse, held against the floors of both runs; and the baseline file, taken for hostile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import driftprobe as driftprobe_package
from driftprobe.baseline import load_baseline, save_baseline
from driftprobe.difference import BETTER, WORSE, Kind, difference
from driftprobe.errors import OutputError, TraceError, UsageError
from driftprobe.floor import LIMIT
from driftprobe.report.difference import render_json, render_text
from driftprobe.snapshot import Part, Snapshot, State, Tap, decode, encode, snapshot
from make_trace import assert_five_parts
from report_traces import broken_from, prompt_trace, rounding, run, same
from test_output import driftprobe, raised
from test_pytest_plugin import write


def of(change: Any = same, **more: Any) -> Snapshot:
    return snapshot(*run(change, **more))


CLEAN, ROPE, VALUES = of(), of(broken_from(1, "q_rope")), of(broken_from(0, "v_proj"))
TAP = Tap("", 3, "q_rope", 5)


def one(state: State | None, verdict: str = "STRUCTURAL_DRIFT", **more: Any) -> Snapshot:
    """A run of one prompt with one tap."""
    part = Part("kv_aligned", "p0", verdict, "", "", "abc", {} if state is None else {TAP: state})
    return replace(CLEAN, verdict=verdict, parts=(replace(part, **more),))


def kind(old: State | None, new: State | None) -> Kind | None:
    changes = difference(one(old), one(new)).changes
    return changes[0].kind if changes else None


def state(drift: float | None, floor: float = 1.0, status: str = "") -> State:
    return State(drift, floor, status or ("fail" if drift is not None and drift > LIMIT * floor else "pass"))


UNKNOWN = State(None, 1.0, "unknown")
CASES = [
    ("the same", state(3.0), state(3.0), None),
    ("within both floors", state(0.0), state(3.9), None),
    ("fails now", state(1.0), state(4.1), Kind.FAILS_NOW),
    ("fails now by the finer floor alone", state(3.0), state(3.0, 0.5), Kind.FAILS_NOW),
    ("fails as before", state(100.0), state(103.9), None),
    ("fails by more", state(100.0), state(104.1), Kind.FAILS_BY_MORE),
    ("more, but within the new floor's limit", state(100.0), state(108.0, 3.0), None),
    ("fails by less", state(100.0), state(95.9), Kind.FAILS_BY_LESS),
    ("infinitely far, as before", state(float("inf")), state(float("inf")), None),
    ("infinitely far now", state(100.0), state(float("inf")), Kind.FAILS_BY_MORE),
    ("the floor rose with the drift", state(3.0), state(30.0, 10.0), Kind.BEYOND_OLD_FLOOR),
    ("the floor rose alone", state(3.0), state(3.0, 10.0), None),
    ("beyond the old floor, as a softmax's shift was", state(9.0, 1.0, "pass"), state(9.0, 1.0, "pass"), None),
    ("a floor that rose over a failure", state(100.0), state(100.0, 30.0), Kind.BEYOND_OLD_FLOOR),
    ("mended", state(100.0), state(1.0), Kind.MENDED),
    ("mended to the bit", state(100.0), state(0.0), Kind.MENDED),
    ("no longer told", state(1.0), UNKNOWN, Kind.NO_LONGER_TOLD),
    ("never told", UNKNOWN, UNKNOWN, None),
    ("told now", UNKNOWN, state(1.0), None),
    ("lost", state(1.0), None, Kind.LOST),
    ("new", None, state(1.0), Kind.NEW),
]


@pytest.mark.parametrize(("old", "new", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_tap_is_held_against_both_floors(old, new, expected):
    assert kind(old, new) is expected
    found = difference(one(old), one(new))
    assert bool(found.worse) is (expected in WORSE) and bool(found.better) is (expected in BETTER)
    assert found.exit_code == (1 if expected in WORSE else 3 if expected is Kind.LOST else 0)


def test_a_run_is_no_worse_than_itself():
    for found in (CLEAN, ROPE):
        assert difference(found, found).changes == () and difference(found, found).exit_code == 0
        assert difference(found.collapsed(), found.collapsed()).exit_code == 0


def test_rounding_is_no_change_for_the_worse():
    assert difference(CLEAN, of(rounding)).exit_code == 0


def test_a_new_bug_is_told_with_its_taps_and_its_verdicts():
    found = difference(CLEAN, ROPE)
    assert found.exit_code == 1 and all(turn.worse for turn in found.turns) and len(found.turns) == 6
    first = found.worse[0]
    assert (first.kind, first.tap.layer, first.tap.tensor) == (Kind.FAILS_NOW, 1, "q_rope")
    assert {change.kind for change in difference(ROPE, CLEAN).changes} == {Kind.MENDED}
    assert difference(ROPE, CLEAN).exit_code == 0


def test_what_cannot_be_told_now_is_worse_than_a_pass_and_no_pass_after_a_mismatch():
    assert difference(one(state(1.0)), one(state(1.0), "N/A")).exit_code == 1
    assert difference(one(state(9.0), "MISMATCH"), one(state(9.0), "N/A")).exit_code == 3
    assert difference(one(state(1.0), "N/A"), one(state(1.0))).exit_code == 3


def test_other_tokens_and_a_missing_prompt_are_left_out_with_their_reason():
    found = difference(one(state(1.0)), one(state(9.0), tokens="other"))
    assert (found.exit_code, found.changes) == (3, ()) and "other tokens" in found.left_out[0]
    fewer = replace(CLEAN, parts=CLEAN.parts[:-1])
    assert difference(CLEAN, fewer).exit_code == 3 and "not in the new run" in difference(CLEAN, fewer).left_out[0]
    assert difference(fewer, CLEAN).exit_code == 0
    assert difference(one(state(1.0), tokens=""), one(state(9.0))).exit_code == 1


@pytest.mark.parametrize(("name", "value"), [("name", "vllm"), ("dtype", "bfloat16"), ("layers", 7)])
def test_two_engines_are_no_two_runs_of_one(name, value):
    with pytest.raises(UsageError) as caught:
        difference(CLEAN, replace(CLEAN, engine=replace(CLEAN.engine, **{name: value})))
    assert_five_parts(caught.value, what="not two runs of one engine", where=name, measured=str(value))
    assert difference(CLEAN, replace(CLEAN, engine=replace(CLEAN.engine, version="next"))).exit_code == 0


def test_nothing_in_common_is_refused():
    with pytest.raises(UsageError) as caught:
        difference(of(prompts=["a"]), of(prompts=["b"]))
    assert_five_parts(caught.value, what="nothing in common", where="OLD", measured="a (as_designed)")


def test_the_text_names_ten_taps_and_counts_the_rest_and_escapes():
    text = render_text(difference(CLEAN, ROPE))
    assert text.count("fails now ") == 10 and "more\n" in text
    assert "p0_short (kv_aligned): NO_DRIFT → MISMATCH at layer 1 q_rope" in text
    assert text.splitlines()[-1].startswith("result: WORSE: ")
    evil = render_text(difference(one(state(1.0), prompt="a\n\x1b[31m"), one(state(9.0), prompt="a\n\x1b[31m")))
    assert "\x1b" not in evil and "a\\n" in evil


def test_the_json_has_every_tap():
    found = difference(CLEAN, ROPE)
    body = json.loads(render_json(found))
    assert body["schema"] == "driftprobe/diff/1" and body["result"] == "worse"
    assert len(body["worse"]) == len(found.worse) and len(body["better"]) == len(found.better)
    assert len(body["verdicts"]) == 6 and body["verdicts"][0]["new"]["first_tap"] == "layer 1 q_rope"
    (row,) = json.loads(render_json(difference(one(state(1.0)), one(state(float("inf"))))))["worse"]
    assert row["old"] == {"drift": 1.0, "floor": 1.0, "status": "pass"} and row["new"]["drift"] == "inf"


# ---- the file


def test_a_baseline_is_small_and_reads_back_to_four_digits(tmp_path):
    save_baseline(ROPE, tmp_path / "b.json")
    back, kept = load_baseline(tmp_path / "b.json"), ROPE.collapsed()
    assert difference(back, kept).changes == () and back.engine == kept.engine
    for old, new in zip(back.parts, kept.parts, strict=True):
        assert replace(old, taps={}) == replace(new, taps={}) and old.taps.keys() == new.taps.keys()
        for tap, measured in new.taps.items():
            assert old.taps[tap].drift == pytest.approx(measured.drift, rel=5e-4)
            assert old.taps[tap].status == measured.status
    lines = (tmp_path / "b.json").read_text().splitlines()
    assert sum('"q_rope"' in line for line in lines) == 2 * 6, "a tap a line"
    assert json.loads((tmp_path / "b.json").read_text())["schema"] == "driftprobe/baseline/1"


def test_the_ladders_rung_is_part_of_a_run(clean_run):
    result = driftprobe_package.analyze(clean_run)
    found = snapshot(result.judgement, result.traces)
    assert {tap.rung for part in found.parts for tap in part.taps} == {"", "float64"}
    assert difference(found.collapsed(), decode(encode(found, "0").encode(), "x")).changes == ()


def test_the_worst_step_stands_for_a_tap():
    calm, wild = Tap("", 0, "q_rope", 4), Tap("", 0, "q_rope", 5)
    part = replace(CLEAN.parts[0], taps={calm: state(1.0), wild: state(9.0), replace(wild, at=6): UNKNOWN})
    (taps,) = (p.taps for p in replace(CLEAN, parts=(part,)).collapsed().parts)
    assert taps == {Tap("", 0, "q_rope", None): state(9.0)}


def test_only_a_baseline_is_replaced_and_only_when_asked(tmp_path):
    place = tmp_path / "deep" / "b.json"
    save_baseline(CLEAN, place)
    with pytest.raises(OutputError) as caught:
        save_baseline(ROPE, place)
    assert_five_parts(caught.value, what="taken", where="b.json", measured="an earlier baseline")
    save_baseline(ROPE, place, replace=True)
    assert load_baseline(place).verdict == "MISMATCH"
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(place)
    for other in ("thesis.txt", "link", "deep"):
        with pytest.raises(OutputError, match="no baseline"):
            save_baseline(CLEAN, tmp_path / other, replace=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def spoiled(change: Any) -> bytes:
    body = json.loads(encode(CLEAN, "0"))
    change(body)
    return json.dumps(body).encode()


def row(body: dict[str, Any]) -> list[Any]:
    found: list[Any] = body["parts"][0]["taps"][0]
    return found


BAD = {
    "no JSON": b"{",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "another schema": spoiled(lambda body: body.update(schema="driftprobe/baseline/9")),
    "a floor of zero": spoiled(lambda body: row(body).__setitem__(4, 0)),
    "a floor of nan": spoiled(lambda body: row(body).__setitem__(4, "nan")),
    "no floor": spoiled(lambda body: row(body).__setitem__(4, None)),
    "a word for a drift": spoiled(lambda body: row(body).__setitem__(3, "large")),
    "a number in words": spoiled(lambda body: row(body).__setitem__(3, "1.5")),
    "another word for infinity": spoiled(lambda body: row(body).__setitem__(3, "Infinity")),
    "another status": spoiled(lambda body: row(body).__setitem__(5, "fine")),
    "a tap twice": spoiled(lambda body: body["parts"][0]["taps"].append(row(body))),
    "a part twice": spoiled(lambda body: body["parts"].append(body["parts"][0])),
    "a layer in words": spoiled(lambda body: row(body).__setitem__(1, "three")),
    "no engine": spoiled(lambda body: body.pop("engine")),
    "NaN": b'{"schema": NaN}',
}


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD.keys())
def test_a_file_that_is_no_baseline_is_refused(raw, tmp_path):
    (tmp_path / "b.json").write_bytes(raw)
    with pytest.raises(TraceError) as caught:
        load_baseline(tmp_path / "b.json")
    assert_five_parts(caught.value, what="not a baseline", where="b.json")


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(raw):
    with pytest.raises(TraceError):
        decode(raw, "x")


def test_a_missing_and_an_endless_file(tmp_path, monkeypatch):
    with pytest.raises(TraceError, match="No such file"):
        load_baseline(tmp_path / "none.json")
    monkeypatch.setattr("driftprobe.baseline.MAX_BYTES", 10)
    (tmp_path / "b.json").write_text(encode(CLEAN, "0"))
    with pytest.raises(TraceError, match="more than 10 bytes"):
        load_baseline(tmp_path / "b.json")


# ---- the commands


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    traces = [prompt_trace("p0_short", "kv_aligned", change) for change in (same, broken_from(1, "q_rope"))]
    return write(tmp_path / "old", traces[0]), write(tmp_path / "new", traces[1])


def test_diff_exits_with_one_where_something_got_worse(folders):
    old, new = folders
    done = driftprobe("diff", old, new)
    assert done.exit_code == 1 and "fails now" in done.stdout and done.stdout.endswith("floors of both runs\n")
    assert driftprobe("diff", new, old).exit_code == driftprobe("diff", old, old).exit_code == 0
    quiet = driftprobe("diff", old, new, "--quiet")
    assert quiet.stdout.count("\n") == 1 and quiet.stdout.startswith("result: WORSE")
    assert json.loads(driftprobe("diff", old, new, "--json").stdout)["result"] == "worse"
    assert isinstance(raised("diff", old, new / "none"), TraceError)


def test_a_baseline_is_saved_and_checked(folders, tmp_path):
    old, new = folders
    saved = driftprobe("baseline", "save", old, tmp_path / "b.json")
    assert saved.exit_code == 0 and f"driftprobe baseline check NEW {tmp_path / 'b.json'}" in saved.stdout
    assert driftprobe("baseline", "check", old, tmp_path / "b.json").exit_code == 0
    done = driftprobe("baseline", "check", new, tmp_path / "b.json")
    assert done.exit_code == 1 and "layer 1 q_rope of p0_short (kv_aligned): drift 0" in done.stdout
    assert json.loads(driftprobe("baseline", "check", new, tmp_path / "b.json", "--json").stdout)["result"] == "worse"


def test_what_shows_nothing_is_no_baseline(folders, tmp_path):
    path = folders[0] / "p0_short_kv_aligned.jsonl"
    path.write_bytes(path.read_bytes()[:-500])
    error = raised("baseline", "save", folders[0], tmp_path / "b.json")
    assert_five_parts(error, what="no baseline", where="old", measured="N/A: p0_short (kv_aligned)")
    assert not (tmp_path / "b.json").exists()
