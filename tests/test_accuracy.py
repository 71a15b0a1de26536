"""The measurement: its rules, its rates, its book-keeping, and a small part of it run for real."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("scipy")

import ml_dtypes
import torch

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import cases, models, report, run, score, store, truth
from benchmarks.accuracy.benign import BENIGN, Benign
from benchmarks.accuracy.cases import Case
from benchmarks.accuracy.keepers import to_fp8
from benchmarks.accuracy.measure import measure, plan_of
from benchmarks.accuracy.outcome import CANNOT_ACT, ERROR, OK, Answer, Outcome, RuleAnswer, Wanted
from benchmarks.accuracy.path_faults import PATH_FAULTS
from benchmarks.accuracy.paths import ARCHITECTURES, PAIRS
from benchmarks.accuracy.rules import RULES, Tapped, ask
from benchmarks.accuracy.score import BLACK_BOX, LADDER, Scored
from driftprobe.capture import choose_tokens

BY_NAME = {rule.name: rule for rule in RULES}
CASE = Case("fault", "attn_scale", "llama", "float32", "eager", 17, 1, 0, 1.01)


def pair(reference: object, candidate: object, wide: object = None, tensor: str = "logits") -> Tapped:
    return Tapped(
        None, tensor, np.asarray(reference), np.asarray(candidate), None if wide is None else np.asarray(wide)
    )


def says(rule: str, tap: Tapped) -> bool | None:
    found = ask(BY_NAME[rule], [tap])
    return None if found is None else found.detected


ONE = np.linspace(0.1, 1.0, 10, dtype=np.float32)


@pytest.mark.parametrize(
    ("rule", "passes", "fails"),
    [
        ("hash equality", ONE, np.nextafter(ONE, np.float32(2))),
        ("assert_close", ONE * np.float32(1 + 1e-6), ONE * np.float32(1 + 1e-4)),
        ("allclose 1e-5", ONE * np.float32(1 + 5e-6), ONE * np.float32(1 + 2e-5)),
        ("calc_diff 1e-3", ONE * np.float32(1.04), ONE * np.float32(1.05)),  # 1 − 2c/(1 + c²): 7.7e-4 and 1.2e-3
        ("logits NMSE 1e-2", ONE * np.float32(1.09), ONE * np.float32(1.11)),
        ("top-1 agreement", ONE * 7, ONE[::-1]),
    ],
)
def test_each_rule_passes_below_its_limit_and_fails_above(rule: str, passes: np.ndarray, fails: np.ndarray) -> None:
    assert says(rule, pair(ONE, passes)) is False
    assert says(rule, pair(ONE, fails)) is True


def test_rules_with_a_wide_reference_judge_errors_by_the_reference_s_own() -> None:
    wide = np.linspace(0.1, 1.0, 10)
    reference = (wide * (1 + 1e-2)).astype(np.float32)
    for rule, factor in (("2 × reference error", 2.0), ("compiler check", 2.0)):
        assert says(rule, pair(reference, (wide * (1 + 0.9e-2 * factor)).astype(np.float32), wide)) is False, rule
        assert says(rule, pair(reference, (wide * (1 + 4e-2 * factor)).astype(np.float32), wide)) is True, rule
        assert says(rule, pair(reference, reference)) is None, rule


def test_masked_scores_are_equal_and_a_mask_on_one_side_is_not() -> None:
    masked = np.array([1.0, -np.inf, 2.0], dtype=np.float32)
    for rule in RULES:
        if not rule.only:
            assert says(rule.name, pair(masked, masked.copy(), masked.astype(np.float64))) is False, rule.name
            seen = np.array([1.0, 0.5, 2.0], dtype=np.float32)
            assert says(rule.name, pair(masked, seen, masked.astype(np.float64))) is True, rule.name


def test_assert_close_takes_each_dtype_s_own_tolerance() -> None:
    for dtype, relative in ((ml_dtypes.bfloat16, 1.6e-2), (np.float16, 1e-3)):
        near = (ONE.astype(np.float64) * (1 + relative / 4)).astype(dtype)
        assert says("assert_close", pair(ONE.astype(dtype), near)) is False
        assert says("assert_close", pair(ONE.astype(dtype), (ONE * (1 + 4 * relative)).astype(dtype))) is True


def test_a_rule_names_the_first_tap_that_breaks_it() -> None:
    taps = [Tapped(0, "q_proj", ONE, ONE), Tapped(0, "q_rope", ONE, 2 * ONE), Tapped(0, "attn_out", ONE, 3 * ONE)]
    found = ask(BY_NAME["calc_diff 1e-3"], taps)
    assert found is not None
    assert (found.layer, found.tensor) == (0, "q_rope")
    assert ask(BY_NAME["top-1 agreement"], taps) is None, "a rule of logits has nothing to say without them"


def test_wilson_intervals_are_the_published_ones() -> None:
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", method 3 of table I
    for (hits, of), (low, high) in {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611),
                                    (1, 29): (0.0061, 0.1718)}.items():  # fmt: skip
        found = score.rate(hits, of)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert score.rate(0, 0).value is None


def test_cases_are_the_same_in_every_run_and_unique() -> None:
    everything = cases.full()
    assert everything == cases.full()
    assert len({case.id for case in everything}) == len(everything)
    assert cases.find(everything[7].id) == everything[7]
    assert {case.id for case in cases.quick()} <= {case.id for case in everything}


def test_a_sample_draws_new_cases_before_those_that_were_published(tmp_path):
    first = cases.sample(40)
    kinds = [case.kind == "fault" for case in first]
    assert (kinds.count(True), kinds.count(False)) == (40, 40)
    published = tmp_path / "accuracy.json"
    published.write_text(json.dumps({"schema": 1, "cases": [{"case": case.id, "status": "ok"} for case in first]}))
    later = cases.sample(40, 7, store.measured_in(published))
    assert not {case.id for case in later} & {case.id for case in first}
    assert [case.kind for case in later].count("fault") == 7
    everything = len(cases.full())
    assert len(cases.sample(everything, everything, store.measured_in(published))) == everything


def test_every_fault_and_variation_is_measured_in_every_architecture_and_dtype() -> None:
    from driftprobe.faults import FAULTS

    everything = [case for case in cases.full() if not case.path]
    where = {(case.kind, case.name, case.architecture, case.dtype) for case in everything}
    for architecture in models.architectures():
        for dtype in models.DTYPES:
            for kind, names in (("fault", FAULTS), ("benign", BENIGN)):
                assert all((kind, name, architecture, dtype) in where for name in names)
    for low, high in ((0, models.WINDOW), (models.WINDOW, 16), (16, 64), (64, 100)):
        assert any(low <= case.length < high for case in everything)


def test_what_is_tuned_on_and_what_is_held_out_never_meet() -> None:
    assert not set(models.TUNED) & set(models.HELD_OUT)
    assert not set(models.TUNED_SEEDS) & set(models.HELD_OUT_SEEDS)
    for case in cases.full():
        known = case.architecture in models.TUNED and case.seed in models.TUNED_SEEDS
        assert case.held_out is not known


def test_every_pair_and_every_fault_of_a_path_is_measured_on_both_sides() -> None:
    everything = [case for case in cases.full() if case.path]
    clean = {(case.path, case.architecture, case.dtype) for case in everything if case.kind == "benign"}
    assert len(clean) == len(PAIRS) * len(ARCHITECTURES) * len(models.DTYPES)
    for fault in PATH_FAULTS.values():
        met = [case for case in everything if case.name == fault.name]
        assert {case.side for case in met} == set(fault.sides), fault.name
        assert {case.path for case in met} <= set(fault.pairs)
        assert {case.strength for case in met} == (set(fault.strengths) if len(fault.strengths) > 1 else {None})
    assert {"reference", "candidate"} <= {case.side for case in everything if case.name == "prefill_weights"}
    kinds = [case.kind for case in cases.quick() if case.path]
    assert (kinds.count("fault"), kinds.count("benign")) == (10, 5)


PATH = Case("fault", "prefill_epsilon", "llama", "float32", "eager", 15, 3, 0, 1e-1, "chunked", "reference")


@pytest.mark.parametrize(("name", "path", "side", "tap"), [
    ("prefill_epsilon", "chunked", "reference", (1, "attn_norm")),
    ("one_token_projection", "chunked", "candidate", (1, "attn_out")),
    ("prefill_weights", "cache_off", "reference", (1, "mlp.down_proj")),
    ("pad_positions", "padded_left", "reference", (None, "model.rotary_emb")),
    ("chunk_position", "chunked", "reference", (None, "model.rotary_emb")),
    ("crop_one_less", "second_prompt", "candidate", (None, "model.rotary_emb")),
    ("row_lost", "chunked", "candidate", (1, "attn_ctx")),
])  # fmt: skip
def test_a_fault_on_a_path_is_found_where_it_is(name: str, path: str, side: str, tap: tuple[int | None, str]) -> None:
    found = measure(replace(PATH, name=name, path=path, side=side, strength=None))
    assert found.status == OK, found.detail
    assert found.wanted is not None and (found.wanted.layer, found.wanted.tensor) == tap
    for answer in (found.black_box, found.ladder):
        assert answer is not None and answer.tap_exact, answer
    assert found.ladder is not None and found.ladder.cause_exact is bool(found.wanted.cause), found.ladder
    assert bool(found.wanted.cause) is (name != "row_lost")
    assert found.change is not None and found.change > 1e-3
    assert found.floors is not None and found.floors > 1
    assert found.rules["hash equality"] is not None and found.rules["hash equality"].detected


def test_a_fault_on_a_path_is_told_from_the_path_without_it() -> None:
    """What the pair itself changes (rounding in chunks) is not the fault's."""
    clean = measure(replace(PATH, kind="benign", name="none", strength=None, side=""))
    assert clean.ladder is not None and clean.black_box is not None
    assert not clean.ladder.detected and not clean.black_box.detected
    weak, strong = (measure(replace(PATH, name="one_token_projection", strength=s)).change or 0 for s in (1e-3, 1e-1))
    assert 0 < 30 * weak < strong


def test_a_path_that_a_model_does_not_have_says_so() -> None:
    found = measure(Case("benign", "none", "mamba2", "float32", "eager", 15, 3, 0, None, "second_prompt"))
    assert found.status == CANNOT_ACT and "cropped" in found.detail


def test_a_fault_that_no_entry_of_the_dictionary_is_is_a_miss_like_any_other() -> None:
    """The tables, the bar and the list of misses count it alike."""
    wanted = Wanted("MISMATCH", 1, "attn_out", family="paths")
    ours = Answer("MISMATCH", "", 1, "attn_out", detected=True, tap_exact=True)
    item = Scored(PATH, Outcome(PATH.id, OK, wanted=wanted, black_box=ours, change=1.0, roundoff=1e-7))
    assert (score.row(BLACK_BOX, [item]).detection.of, score.row(BLACK_BOX, [item]).diagnosis.of) == (1, 1)
    assert [kind for kind, _, _ in score.misses([item])] == [score.NO_ENTRY]
    (line,) = [target for target in score.targets([item]) if target.what.startswith("diagnosis")]
    assert (line.reached.hits, line.reached.of) == (0, 1)
    assert item.family == "paths"
    assert any("`prefill_epsilon` (1)" in line for line in report._without_entry([item]))
    declared = replace(item, outcome=replace(item.outcome, wanted=replace(wanted, cause="norm_epsilon")))
    assert score.row(BLACK_BOX, [declared]).diagnosis.of == 1
    assert [kind for kind, _, _ in score.misses([declared])] == ["no or another diagnosis"]


def outcome(case: Case, **said: object) -> Outcome:
    wanted = Wanted("MISMATCH", 0, "attn_scores", "computation", "score_scale", {"factor": 1.01}, "scores")
    ours = Answer("MISMATCH", "", 0, "attn_scores", "computation", "score_scale", {"factor": 1.0099}, True, True, True)
    found = Outcome(case.id, OK, "", 0.1, wanted, ours, None, {"hash equality": RuleAnswer(True, 0, "embed")},
                    20.0, 1e-2, 6e-8)  # fmt: skip
    return replace(found, **said)  # type: ignore[arg-type]


def test_rates_count_visible_faults_and_first_taps() -> None:
    faint = [Scored(CASE, outcome(CASE)), Scored(CASE, outcome(CASE, change=1e-6))]
    ours, theirs = score.row(BLACK_BOX, faint), score.row("hash equality", faint)
    assert (ours.detection.hits, ours.detection.of, ours.first_tap.hits, ours.diagnosis.hits) == (1, 1, 1, 1)
    assert (theirs.detection.hits, theirs.first_tap.hits, theirs.diagnosis.hits) == (1, 0, 0)
    assert score.row(LADDER, faint).detection.of == 0
    assert faint[0].strength == "> 10"


def test_what_is_not_as_it_must_be_is_a_miss() -> None:
    wrong = outcome(CASE)
    wrong = Outcome(**{**{name: getattr(wrong, name) for name in wrong.__slots__},
                       "black_box": Answer("STRUCTURAL_DRIFT")})  # fmt: skip
    assert [kind for kind, _, _ in score.misses([Scored(CASE, wrong)])] == ["not detected"]
    harmless = Case("benign", "threads", "llama", "float32", "eager", 17, 1, 0)
    alarm = Outcome(harmless.id, OK, wanted=Wanted("no MISMATCH"), black_box=Answer("MISMATCH", detected=True))
    scored = [Scored(harmless, alarm)]
    assert [kind for kind, _, _ in score.misses(scored)] == [f"false alarm ({BLACK_BOX})"]
    assert score.targets(scored)[0].reached.hits == 1
    assert harmless.id in report.markdown(scored, "", 0)


def test_an_error_is_a_missed_fault_or_an_alarm() -> None:
    coarse = replace(CASE, dtype="bfloat16")
    harmless = Case("benign", "threads", "llama", "float32", "eager", 17, 1, 0)
    token = replace(CASE, name="wrong_token", strength=None)  # its answer is N/A: in no line of the bar
    failed = [Scored(case, Outcome(case.id, ERROR, "broke")) for case in (coarse, harmless, token)]
    alarms, *lines = score.targets(failed)
    assert (alarms.reached.hits, alarms.reached.of) == (1, 1)
    assert [(line.reached.hits, line.reached.of) for line in lines] == [(0, 1)] * 5
    for rule in (LADDER, BLACK_BOX):
        found = score.row(rule, failed)
        assert (found.detection.hits, found.detection.of, found.false_alarms.hits) == (0, 1, 1)
    assert score.row("hash equality", failed).detection.of == 0
    assert [ours.false_alarms.hits for _, _, ours, _ in score.beaten(failed)] == [1] * len(RULES)
    page = report.markdown(failed, "", 0)
    assert "no entry for" not in page and page.count("| error |") == 3


def test_the_page_says_how_often_there_is_no_answer() -> None:
    harmless = Case("benign", "threads", "llama", "float32", "eager", 17, 1, 0)
    said = [Outcome(harmless.id, OK, wanted=Wanted("no MISMATCH"), black_box=Answer(word), ladder=Answer("NO_DRIFT"))
            for word in ("N/A", "NO_DRIFT")]  # fmt: skip
    scored = [*(Scored(harmless, one) for one in said), Scored(CASE, outcome(CASE, black_box=Answer("N/A")))]
    off = score.unanswered(scored, BLACK_BOX)
    assert (off.hits, off.of, score.unanswered(scored, LADDER).hits) == (1, 2, 0)
    (line,) = [line for line in report.markdown(scored, "", 0).splitlines() if line.startswith("N/A, clean and benign")]
    assert "0.00% (0/2;" in line and "50.00% (1/2;" in line
    assert score.row(BLACK_BOX, scored).detection.hits == 0
    assert b'"not_available"' in report.as_json(scored, "", 0)


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [
        ((True, False), (True, False), ""),
        ((True, False), (True, True), score.FEWER),
        ((True, False), (False, False), score.MORE),
        ((True, True), (False, False), ""),
        ((False, False), (True, True), ""),
    ],
)
def test_a_rule_is_beaten_by_more_found_or_fewer_alarms_and_not_by_as_much(
    ours: tuple[bool, bool], theirs: tuple[bool, bool], wanted: str
) -> None:
    said = {"black_box": Answer("MISMATCH", detected=ours[0]), "rules": {"hash equality": RuleAnswer(theirs[0])}}
    harmless = Case("benign", "threads", "llama", "float32", "eager", 17, 1, 0)
    quiet = Outcome(harmless.id, OK, wanted=Wanted("no MISMATCH"), black_box=Answer("", detected=ours[1]),
                    rules={"hash equality": RuleAnswer(theirs[1])})  # fmt: skip
    scored = [Scored(CASE, replace(outcome(CASE), **said)), Scored(harmless, quiet)]  # type: ignore[arg-type]
    name, _, _, how = score.beaten(scored)[[rule.name for rule in RULES].index("hash equality")]
    assert (name, how) == ("hash equality", wanted)
    line = next(x for x in report.markdown(scored, "", 0).splitlines() if x.startswith("| beats hash equality"))
    assert line.endswith(f"| met: {wanted} |" if wanted else "| **missed** |")


def test_the_page_lists_what_is_missed_with_the_ladder_off_and_says_what_it_stands_on() -> None:
    coarse = replace(CASE, dtype="bfloat16")
    missed = replace(
        outcome(coarse, floors=0.2), black_box=Answer("STRUCTURAL_DRIFT"), ladder=Answer("", detected=True)
    )
    faint = replace(missed, floors=0.05)
    scored = [Scored(coarse, missed), Scored(coarse, faint), Scored(CASE, replace(missed, case=CASE.id))]
    assert score.faint_misses(scored) == [(scored[0], missed.black_box)]
    page = report.markdown(scored, "driftprobe 1, git commit abc1234, sources 0123", 997)
    assert "| attn_scale | 1 |" in page.partition("### Ladder off")[2]
    for words in ("git commit abc1234, sources 0123", "3 of the full set's 1,000 cases are measured",
                  "decisions/0003-limit.md", "are left out of the cases: other threads"):  # fmt: skip
        assert words in page


def test_the_page_names_the_commit_of_the_sources_that_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"sources {store.digest()}" in command.versions()
    assert command.versions("0123", "abc1234").endswith("git commit abc1234, sources 0123")
    assert command.versions("0123").endswith("git commit unknown, sources 0123")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert "git commit unknown" in command.versions()


def test_a_stopped_measurement_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.accuracy import measure as module

    asked: list[str] = []

    def counted(case: Case) -> Outcome:
        asked.append(case.id)
        return Outcome(case.id, OK)

    monkeypatch.setattr(module, "measure", counted)
    results, chosen = tmp_path / "results.jsonl", cases.full()[:4]
    run.run(chosen[:2], results, 1, lambda _: None)
    with results.open("ab") as file:
        file.write(b'{"sources": "cut o')  # the program was stopped while it wrote
    done = run.run(chosen, results, 1, lambda _: None)
    assert asked == [case.id for case in chosen]
    assert set(done) == set(asked)
    assert set(store.read(results, store.digest())) == set(asked)
    assert store.read(results, "another version") == {}


def test_the_digest_tells_sources_apart(tmp_path: Path) -> None:
    for name in store.SOURCES:
        place = tmp_path / name
        place = place if place.suffix else place / "a.py"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("1")
    before = store.digest(tmp_path)
    assert store.digest(tmp_path) == before
    (tmp_path / "src/driftprobe/a.py").write_text("2")
    assert store.digest(tmp_path) != before


def test_an_infinite_change_is_written_as_a_word() -> None:
    body = report.as_json([Scored(CASE, outcome(CASE, change=math.inf))], "", 0)
    assert b'"change": "inf"' in body


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_outcome_with_a_number_that_is_not_finite_is_read_as_it_was_written(tmp_path: Path, value: float) -> None:
    """JSON has no such numbers; a null would take the strongest faults out of every line of the bar."""
    path = tmp_path / "results.jsonl"
    answer = Answer("MISMATCH", parameters={"factor": value, "keys": [1, value]}, detected=True)
    written = outcome(CASE, change=value, floors=value, black_box=answer)
    list(store.append(path, "here", [written]))
    assert b"null" not in path.read_bytes().partition(b'"floors"')[2]
    back = store.read(path, "here")[CASE.id]
    assert repr(back) == repr(written)  # a NaN is not equal to itself
    assert Scored(CASE, back).visible is Scored(CASE, written).visible is (value == math.inf)


def test_the_quick_choice_runs_without_an_error_a_false_alarm_or_a_missed_fault(tmp_path: Path) -> None:
    """One test: a second one would measure all of it again in the other worker."""
    chosen = cases.quick()
    done = run.run(chosen, tmp_path / "results.jsonl", 1, lambda _: None)
    measured = [Scored(case, done[case.id]) for case in chosen]
    assert [s.outcome.detail for s in measured if s.outcome.status == "error"] == []
    assert sum(s.outcome.status == OK for s in measured) > len(measured) / 2
    assert sum(s.visible for s in measured) > len(measured) / 5
    kinds = {
        kind: [s.case.id for k, s, _ in score.misses(measured) if k == kind] for kind, _, _ in score.misses(measured)
    }
    wrong = {kind: found for kind, found in kinds.items() if kind.startswith(("false alarm", "not detected"))}
    assert wrong == {}


@pytest.mark.parametrize(
    "name",
    ["benign:keys_float16/gpt_oss/float32/eager/n12/k1/s0", "clean:none/mixtral/bfloat16/sdpa/n12/k4/s1"],
)
def test_what_once_was_a_false_alarm_is_none(name: str) -> None:
    """A declared cast that later layers amplify; and a longer prefill that chose other experts for a decoded token."""
    found = measure(cases.find(name))
    assert found.status == OK, found.detail
    for answer in (found.black_box, found.ladder):
        assert answer is not None and answer.verdict == "STRUCTURAL_DRIFT", answer


_FINE = ("cache_bfloat16", "cache_float16", "split_qkv", "transposed_weights")
"""Variations that a bfloat16 model of this size rounds away."""


_MAY_CHANGE_NOTHING = {"static_cache", "threads", "chunks_16", "chunks_7", "fused_qkv"}


@pytest.mark.parametrize("name", sorted(set(BENIGN) - _MAY_CHANGE_NOTHING))
def test_a_variation_does_vary_and_leaves_the_engine_as_it_was(name: str) -> None:
    """A variation that changes not one bit anywhere would be no test."""
    architecture = {"split_qkv": "phi3", "router_tie": "qwen3_moe"}.get(name, "llama")
    dtype = "float32" if name in _FINE else "bfloat16"
    case = Case("benign", name, architecture, dtype, "eager", 17, 1, 0)
    engine = models.engine(*case.model)
    plan = plan_of(case, engine)
    tokens = choose_tokens(plan, engine)
    before = truth.run_clean(engine, plan, tokens)
    with BENIGN[name].keep(engine):
        varied = truth.run_clean(engine, plan, tokens)
    after = truth.run_clean(engine, plan, tokens)
    assert max(truth.changes(before, varied).values()) > 0.0
    assert max(truth.changes(before, after).values()) == 0.0
    assert engine.facts.casts == {}


def test_a_variation_that_changes_not_one_bit_is_refused_and_counted_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENIGN, "nothing", Benign("nothing", "changes nothing", lambda _engine: nullcontext()))
    for name in ("nothing", "chunks_16"):  # nine tokens are one chunk of sixteen
        found = measure(Case("benign", name, "llama", "bfloat16", "eager", 9, 1, 0))
        assert found.status == CANNOT_ACT and "not one bit" in found.detail, name
    assert measure(Case("benign", "chunks_7", "llama", "bfloat16", "eager", 9, 1, 0)).status == OK


def test_a_variation_counts_wherever_it_changes_what_the_run_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one step, say, and for one token: what a look at other tokens would not show."""
    case = Case("benign", "one_step", "llama", "float32", "eager", 9, 2, 0)
    engine = models.engine(*case.model)
    chosen = choose_tokens(plan_of(case, engine), engine)[case.length + 1]

    @contextmanager
    def keep(engine: Any) -> Iterator[None]:
        def nudge(_model: Any, _args: Any, call: dict[str, Any], found: Any) -> None:
            if call["input_ids"].tolist() == [[chosen]]:
                found.logits *= 1 + 2.0**-22

        hook = engine.model.register_forward_hook(nudge, with_kwargs=True)
        yield
        hook.remove()

    monkeypatch.setitem(BENIGN, "one_step", Benign("one_step", "changes one step", keep))
    found = measure(case)
    assert found.status == OK, found.detail


def test_the_fp8_cache_has_scales_that_keep_rows_of_any_size() -> None:
    rows = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size in (1e-6, 1.0, 1e6):  # without a scale the first are zero, and the last are not a number
        kept_rows = to_fp8(rows * size)
        assert float((kept_rows / size - rows).norm() / rows.norm()) < 2.0**-4
        torch.testing.assert_close(kept_rows.abs().amax(-1), (rows * size).abs().amax(-1))


def test_the_fp8_cache_without_a_scale_is_measured_too() -> None:
    """A row far from one shows it: e4m3 has no number under 2⁻⁹, and a scale would have kept it."""
    engine = models.engine("llama", "float32", "eager", 0)
    rows = torch.full((1, 2, 1, 16), 2.0**-12)
    kept_rows = {}
    for name in ("cache_fp8", "cache_fp8_unscaled"):
        with BENIGN[name].keep(engine):
            assert engine.facts.casts == {"k_cache": "float8_e4m3fn", "v_cache": "float8_e4m3fn"}  # it keeps both so
            cache = engine.make_cache()
            cache.update(rows, rows, 0)
            kept_rows[name] = cache.update(rows, rows, 0)[0]
    assert float(kept_rows["cache_fp8"].max()) == pytest.approx(2.0**-12, rel=2.0**-4)
    assert float(kept_rows["cache_fp8_unscaled"].max()) == 0.0


def test_chunks_feed_the_whole_prompt_and_leave_what_is_read_alone() -> None:
    case = Case("benign", "chunks_7", "llama", "float32", "eager", 17, 2, 0)
    plan = plan_of(case, models.engine(*case.model))
    chunked = BENIGN["chunks_7"].plan(plan)
    by_name = {arm.name: arm for arm in chunked.arms}
    assert [(call.start, call.stop) for call in by_name["D"].passes[:3]] == [(0, 7), (7, 14), (14, 17)]
    assert chunked.reads == plan.reads
    assert [arm for arm in chunked.arms if arm.name == "P"] == [arm for arm in plan.arms if arm.name == "P"]


def test_the_clean_model_is_the_measure_of_a_fault() -> None:
    strong, weak = (
        measure(Case("fault", "norm_epsilon", "llama", "float32", "eager", 17, 1, 0, s)) for s in (1e-1, 1e-3)
    )
    assert strong.floors is not None
    assert weak.floors is not None
    assert strong.floors > 30 * weak.floors > 30


@pytest.mark.parametrize(
    ("name", "strength", "floors"), [("length_dependent", 1e-1, 1e3), ("prefill_sees_next", None, math.inf)]
)
def test_a_fault_that_only_a_longer_prefill_has_counts(name: str, strength: float | None, floors: float) -> None:
    """P of 12 tokens and decode are as they were; a prefill of 43 is not, or sees a token that P has not."""
    case = Case("fault", name, "llama", "float32", "eager", 11, 1, 0, strength)
    found = measure(case)
    assert Scored(case, found).visible, found.change
    assert found.floors is not None and found.floors >= floors
    assert found.ladder is not None and found.ladder.detected


def test_a_longer_prefill_adds_nothing_to_a_fault_that_every_prefill_has() -> None:
    changed = {("P", 0, 1, "x"): 0.1, ("D", 0, 1, "x"): 0.0, ("E7", 0, 1, "x"): 0.3, ("P", 1, 1, "x"): 0.0,
               ("E7", 1, 1, "x"): 0.2}  # fmt: skip
    compared, longer = truth.apart(changed)
    assert (truth.at(compared, 1, "x"), truth.at(longer, 1, "x")) == (0.1, 0.2)


def test_the_bound_of_a_longer_prefill_does_not_lean_on_it() -> None:
    """A fault under the limit raises the floor of P and D to its own size: in that floor it would be one at most."""
    found = measure(cases.find("fault:length_dependent@0.01/qwen3/float16/sdpa/n13/k1/s0"))
    assert found.floors is not None and found.floors > 2.0
