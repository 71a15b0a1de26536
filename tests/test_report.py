"""The reports: what they must hold, what must never stand in them, and that the evidence follows the data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from driftprobe.judgement import Diagnosis, Judgement, Verdict
from driftprobe.report import REPORTS, final_report, render_all, tsv, verdict_json
from driftprobe.report.evidence import EvidenceRow, evidence_matrix
from driftprobe.report.snippets import MAX_WORDS, shorten, snippets
from driftprobe.report.text import code, number, prose, table
from driftprobe.trace import Trace
from report_traces import broken_from, foreign, judged, prompt_trace, rounding, run, same

Run = tuple[Judgement, tuple[Trace, ...]]
FAULT = broken_from(0, "q_rope")
CONTENTS = broken_from(1, "k_cache", arms=("D", "D'"))
WRONG_TOKEN = broken_from(None, "embed")
GUILTY_CONTROL = broken_from(0, "attn_scores", arms=("E1",))
CASES: dict[str, tuple[object, Verdict]] = {
    "clean": (run, Verdict.NO_DRIFT),
    "rounding": (lambda: run(rounding), Verdict.STRUCTURAL_DRIFT),
    "fault": (lambda: run(FAULT), Verdict.MISMATCH),
    "contents": (lambda: run(CONTENTS), Verdict.MISMATCH),
    "guilty control": (lambda: run(GUILTY_CONTROL), Verdict.MISMATCH),
    "wrong token": (lambda: run(WRONG_TOKEN), Verdict.NOT_AVAILABLE),
    "as_designed only": (lambda: run(FAULT, modes=("as_designed",)), Verdict.MISMATCH),
    "kv_aligned only": (lambda: run(rounding, modes=("kv_aligned",)), Verdict.STRUCTURAL_DRIFT),
    "foreign": (foreign, Verdict.NOT_AVAILABLE),
    "foreign, equal": (lambda: foreign(equal=True), Verdict.NO_DRIFT),
    "foreign, hashes alone": (lambda: foreign(sums=False), Verdict.NOT_AVAILABLE),
}
HEADINGS = (
    "# B3.66 v2 FINAL REPORT", "## 1. Execution Summary", "### Prompts Executed", "### Output Paths",
    "## 2. KV Alignment Analysis (", "### Projection Hashes (Layer 0, ", "### Attention Statistics",
    "### KV Alignment Indicators", "## 3. Drift Structural vs Real Mismatch", "### Hypothesis Testing",
    "### Evidence Matrix", "### Verdict Criteria", "## 4. First Failure by Mode", "### as_designed Mode",
    "### kv_aligned Mode", "## 5. Evidence Snippets (JSON)", "## 6. Conclusion", "## 7. Recommendations",
    "## 8. Artifacts Reference", "**Date**: ", "**Status**: ", "**Mode**: ", "**Generated**: ",
)  # fmt: skip
TABLES = (
    "| Mode | Status | First Failure | Pass/Fail Count |", "| Tensor | Layer | Prompt | Hash | Notes |",
    "| Metric | Pre-Softmax | Post-Softmax |", "| Indicator | Value | Interpretation |",
    "| Hypothesis | Description |", "| Evidence | Supports H₀ | Supports H₁ |", "| Verdict | Condition |",
    "| File | Path |",
)  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Run, Verdict]:
    make, verdict = CASES[request.param]
    return request.param, make(), verdict  # type: ignore[operator]


def test_every_case_leads_to_its_verdict(case: tuple[str, Run, Verdict]) -> None:
    _, (judgement, traces), verdict = case
    assert judgement.verdict is verdict
    assert f"**Verdict**: **{verdict.value}**" in final_report.render(judgement, traces)


def test_every_heading_and_table_of_the_seed_is_there(case: tuple[str, Run, Verdict]) -> None:
    _, (judgement, traces), _ = case
    text = final_report.render(judgement, traces)
    lines = text.splitlines()
    for heading in (*HEADINGS, *TABLES):
        assert any(line.startswith(heading) for line in lines), heading
    order = [text.index(f"\n## {i}. ") for i in range(1, 9)]
    assert order == sorted(order)


def test_every_report_is_rebuilt_byte_for_byte(case: tuple[str, Run, Verdict]) -> None:
    _, (judgement, traces), _ = case
    again = judged(traces)
    assert render_all(judgement, traces) == render_all(again, traces)
    assert list(render_all(judgement, traces)) == list(REPORTS)


def test_tables_keep_their_columns(case: tuple[str, Run, Verdict]) -> None:
    _, (judgement, traces), _ = case
    for name, text in render_all(judgement, traces).items():
        if name.endswith(".md"):
            check_tables(text)


def check_tables(text: str) -> None:
    width = 0
    for line in text.splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        columns = len(re.findall(r"(?<!\\)\|", line))
        assert width in (0, columns), line
        width = columns


def test_tbd_stands_only_where_a_mode_was_not_run(case: tuple[str, Run, Verdict]) -> None:
    name, (judgement, traces), _ = case
    text = final_report.render(judgement, traces)
    missing = [mode for mode in ("as_designed", "kv_aligned") if mode not in judgement.modes]
    if not missing:
        assert "TBD" not in text
        assert "PENDING" not in text
    for mode in missing:
        assert f"| {mode} | PENDING: `driftprobe run --mode {mode}" in text, name
        part = text.split(f"### {mode} Mode")[1].split("###")[0].split("---")[0]
        assert "TBD (not run; `driftprobe run --mode " + mode in part
        rest = [line for line in text.replace(part, "").splitlines() if "TBD" in line or "PENDING" in line]
        assert all(f"--mode {mode}" in line for line in rest), rest


def test_status_says_what_was_run() -> None:
    assert "**Status**: COMPLETE" in final_report.render(*run())
    assert "**Status**: PARTIAL" in final_report.render(*run(modes=("kv_aligned",)))
    cut = tuple(replace(trace, damage="no footer") for trace in run()[1])
    assert "**Status**: INCOMPLETE" in final_report.render(judged(cut), cut)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (same, "gave the same bits at all 120 compared taps"),
        (rounding, "arithmetic explains all of it"),
        (FAULT, "differ by more than arithmetic explains, first at layer 0 q_rope of p"),
        (WRONG_TOKEN, "it cannot be told whether prefill and decode agree"),
    ],
)
def test_conclusions_follow_from_the_verdict(change: object, words: str) -> None:
    text = final_report.render(*run(change))  # type: ignore[arg-type]
    assert words in text.split("## 6. Conclusion")[1]


def test_internal_drift_without_logit_impact_is_said() -> None:
    def inner(arm: str, layer: int | None, tensor: str, array: np.ndarray) -> np.ndarray:
        return array if tensor == "logits" else rounding(arm, layer, tensor, array)

    assert "Internal drift without logit impact" in final_report.render(*run(inner))
    assert "Internal drift without logit impact" not in final_report.render(*run(FAULT))
    assert "Internal drift without logit impact" not in final_report.render(*run(same))


def test_a_planted_fault_is_said_near_the_top() -> None:
    judgement, traces = run(FAULT, labels={"fault": "rope_plus_one"})
    head = final_report.render(judgement, traces).split("## 1.")[0]
    assert "**Planted fault**: `rope_plus_one`" in head
    assert "Planted" not in final_report.render(*run(FAULT))


def test_snippets_are_json_of_at_most_25_words(case: tuple[str, Run, Verdict]) -> None:
    _, (judgement, traces), _ = case
    found = snippets(judgement, traces)
    printed = re.findall(r"```json\n(.*?)\n```", final_report.render(judgement, traces), re.DOTALL)
    assert printed == list(found)
    assert found
    for snippet in found:
        assert len(snippet.split()) <= MAX_WORDS == 25
        assert {"prompt", "layer", "tensor", "hash", "phase"} <= json.loads(snippet).keys()


def test_snippets_show_the_first_failure_or_else_the_projections() -> None:
    at = [json.loads(s)["tensor"] for s in snippets(*run(FAULT))]
    assert at == ["q_rope", "q_rope"]
    control = [json.loads(s)["phase"] for s in snippets(*run(GUILTY_CONTROL))]
    assert control == ["prefill_last", "prefill_ext"]
    assert {json.loads(s)["tensor"] for s in snippets(*run())} == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("words", [1, 5, 12, 30, 400])
def test_a_long_name_is_clipped_to_fit_a_snippet(words: int) -> None:
    name = "word " * words
    snippet = shorten({"prompt": name, "tensor": name, "layer": 0, "hash": "0x1", "phase": "decode0", "step": 0})
    assert len(snippet.split()) <= MAX_WORDS
    assert json.loads(snippet)["layer"] == 0


def test_verdict_json_has_every_field(case: tuple[str, Run, Verdict]) -> None:
    _, (judgement, traces), verdict = case
    text = verdict_json.render(judgement, traces)
    body = json.loads(text, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert list(body) == ["schema", "verdict", "reason", "detection_limit", "detection_limit_detail", "impact", "modes"]
    assert (body["schema"], body["verdict"]) == ("driftprobe/verdict/1", verdict.value)
    assert text.endswith("}\n")
    for name in ("as_designed", "kv_aligned"):
        mode = body["modes"][name]
        assert mode["pairs"] == mode["pass"] + mode["fail"] + mode["unknown"]
        if name not in judgement.modes:
            assert (mode["status"], mode["verdict"], mode["pairs"]) == ("NOT_RUN", "N/A", 0)
            assert mode["first_failure"] is mode["attention"] is None


def test_verdict_json_names_the_failure_and_the_shut_gates() -> None:
    failed = json.loads(verdict_json.render(*run(FAULT)))["modes"]["kv_aligned"]
    assert (failed["first_failure"]["layer"], failed["first_failure"]["tensor"]) == (0, "q_rope")
    assert failed["first_failure"]["excess"] > 4
    assert set(failed["readings"].values()) == {"computation"}
    shut = json.loads(verdict_json.render(*run(WRONG_TOKEN)))["modes"]["kv_aligned"]
    assert [gate["name"] for gate in shut["gates"]["p0_short"]] == ["aligned"]
    assert shut["first_failure"] is None


def test_verdict_json_has_the_cause_for_programs() -> None:
    judgement, traces = run(FAULT)
    assert (
        json.loads(verdict_json.render(judgement, traces))["modes"]["kv_aligned"]["first_failure"]["diagnosis"] is None
    )
    mode = judgement.modes["kv_aligned"]
    assert mode.first_failure is not None
    parameters = {"factor": float("nan"), "heads": (0, 2)}
    found = Diagnosis("score_scale", parameters, 0, "attn_scores", float("inf"), 0.998, z=12.5, side="decode")
    failing = replace(mode, first_failure=replace(mode.first_failure, diagnosis=found))
    told = replace(judgement, modes={**judgement.modes, "kv_aligned": failing})
    body = json.loads(verdict_json.render(told, traces))["modes"]["kv_aligned"]["first_failure"]["diagnosis"]
    assert body == {
        "cause": "score_scale", "parameters": {"factor": "nan", "heads": [0, 2]}, "layer": 0, "tensor": "attn_scores",
        "residual": "inf", "explained": 0.998, "side": "decode", "z": 12.5,
    }  # fmt: skip
    unsure = replace(found, side="", z=None)
    failing = replace(mode, first_failure=replace(mode.first_failure, diagnosis=unsure))
    body = json.loads(verdict_json.render(replace(judgement, modes={"kv_aligned": failing}), traces))
    told_of = body["modes"]["kv_aligned"]["first_failure"]["diagnosis"]
    assert (told_of["side"], told_of["z"]) == (None, None)


def test_non_finite_numbers_are_words() -> None:
    def nan(arm: str, layer: int | None, tensor: str, array: np.ndarray) -> np.ndarray:
        return array * np.float32("nan") if arm in {"D", "D'"} and (layer == 1 or tensor == "logits") else array

    judgement, traces = run(nan)
    assert judgement.verdict is Verdict.MISMATCH
    body = json.loads(verdict_json.render(judgement, traces))
    assert body["modes"]["kv_aligned"]["first_failure"]["drift"] == "inf"
    assert "**Drift**: inf" in final_report.render(judgement, traces)
    assert [number(x) for x in (float("nan"), float("-inf"), 0.0, 1234.5)] == ["nan", "-inf", "0", "1.23e+03"]


def test_the_tsv_has_one_row_a_pair(case: tuple[str, Run, Verdict]) -> None:
    _, (judgement, traces), _ = case
    lines = tsv.render(judgement, traces).splitlines()
    assert lines[0].split("\t") == list(tsv.COLUMNS)
    assert len(lines) - 1 == sum(len(mode.cells) for mode in judgement.modes.values())
    assert {len(line.split("\t")) for line in lines} == {len(tsv.COLUMNS)}


def test_the_tsv_says_status_and_arm_a() -> None:
    rows = [
        dict(zip(tsv.COLUMNS, line.split("\t"), strict=True)) for line in tsv.render(*run(CONTENTS)).splitlines()[1:]
    ]
    failed = [r for r in rows if r["status"] == "fail" and r["mode"] == "kv_aligned"]
    assert failed[0]["tensor"] == "k_cache"
    assert (failed[0]["equal"], failed[0]["aligned_drift"]) == ("false", "0.0")
    assert all(r["layer"] == "" for r in rows if r["tensor"] == "logits")
    assert {r["aligned_drift"] for r in rows if r["mode"] == "as_designed"} == {""}


HOSTILE = (
    "a|b",
    "a\nb",
    "<script>alert(1)</script>",
    "``` x `y`",
    "tab\tbed",
    "# head",
    "a\\|b",
    "a\u2028b",
    "[x](http://y)",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_cannot_break_a_table(name: str) -> None:
    def rename(trace: Trace) -> Trace:
        records = tuple(
            replace(r, prompt=name, hash=name + r.hash, tensor=name if r.tensor == "x_out" else r.tensor)
            for r in trace.records
        )
        labels, engine = {"fault": name, "output": name}, replace(trace.header.engine, model=name)
        header = replace(trace.header, prompt=name, prompt_text=name, run=name, date=name, labels=labels, engine=engine)
        return replace(trace, header=header, records=records, path=f"{name}.jsonl")

    traces = tuple(rename(prompt_trace("p0_short", mode, FAULT)) for mode in ("as_designed", "kv_aligned"))
    judgement = judged(traces)
    plain = judged(tuple(prompt_trace("p0_short", mode, FAULT) for mode in ("as_designed", "kv_aligned")))
    for file, text in render_all(judgement, traces).items():
        if file.endswith(".md"):
            check_tables(text)
            assert "<script>" not in re.sub(r"```(json|bash)\n.*?\n *```", "", text, flags=re.DOTALL)
            assert all(line.startswith(("|", "-", "*", ">", "#", "`", " ", "{", "}")) or line[:1].isalnum() or not line
                       for line in text.split("\n")), file  # fmt: skip
    assert len(tsv.render(judgement, traces).splitlines()) == len(tsv.render(plain, traces).splitlines())
    json.loads(verdict_json.render(judgement, traces))


def test_words_are_escaped_and_code_is_left_readable() -> None:
    assert prose("a|b\n<i> `c` *d*") == "a\\|b\\\\n&lt;i&gt; \\`c\\` \\*d\\*"
    assert prose("k_cache") == "k_cache"
    assert code("p6_len_16") == "`p6_len_16`"
    assert "`" not in code("<b>")
    assert table(("a", "b"), [("1", "2")], "lr") == "| a | b |\n| --- | --: |\n| 1 | 2 |"


ROWS = ("q hashes", "cache rows", "attention", "qkv", "every tap", "arm A", "controls", "deterministic")


def evidence(judgement: Judgement, traces: tuple[Trace, ...]) -> dict[str, EvidenceRow]:
    return dict(zip(ROWS, evidence_matrix(judgement, traces), strict=True))


def ticks(row: EvidenceRow) -> str:
    return {(True, False): "H0", (False, True): "H1", (False, False): "none"}[(row.supports_h0, row.supports_h1)]


def same_q(arm: str, layer: int | None, tensor: str, array: np.ndarray) -> np.ndarray:
    return np.ones((1, 2, 8), dtype=np.float32) if tensor == "q_proj" else array


@pytest.mark.parametrize(
    ("row", "change", "expected", "figure"),
    [
        ("q hashes", same, "H0", "3 distinct q_proj hashes in prefill and 3 in decode over 3 prompts, layer 0"),
        ("q hashes", same_q, "H1", "1 distinct q_proj hash in prefill and 1 in decode over 3 prompts, layer 0; but 3"),
        ("cache rows", same, "H0", "200/200 K rows and 200/200 V rows equal"),
        (
            "cache rows",
            CONTENTS,
            "H1",
            "100/200 K rows and 200/200 V rows equal; 100 are not prefill's, first in layer 1",
        ),
        ("cache rows", broken_from(1, "k_cache", size=3e-7), "H0", "100 differ but are within the floor"),
        (
            "attention",
            same,
            "H0",
            "24/24 equal bit for bit; another seq_len alone (prefill_ext controls) drifts up to 0",
        ),
        ("attention", rounding, "H0", "24 differ but are within the floor"),
        ("attention", FAULT, "H1", "24 of 24 beyond the floor, first layer 0 attn_scores of p0_short"),
        ("qkv", same, "H0", "72/72 equal bit for bit"),
        ("qkv", FAULT, "H1", "first layer 0 q_rope of p0_short"),
        ("qkv", broken_from(0, "attn_scores"), "H0", "36 behind an earlier failure of another op are left out"),
        ("every tap", rounding, "H0", "differ but are within the floor; largest excess ×0."),
        ("every tap", FAULT, "H1", "beyond the floor, first layer 0 q_rope of p0_short, step 0"),
        ("arm A", same, "H0", "0 of 60 pairs fail with prefill's rows, 0 with decode's own; reading: H0"),
        ("arm A", FAULT, "H1", "reading: computation"),
        ("arm A", CONTENTS, "H1", "0 of 60 pairs fail with prefill's rows, "),
        ("controls", same, "H0", "largest drift E1 0; rounding explains all of it"),
        ("controls", GUILTY_CONTROL, "H1", "beyond rounding, first layer 0 attn_scores of p0_short"),
        ("deterministic", same, "H0", "bit for bit in 6 traces"),
        ("deterministic", FAULT, "H1", "so the failure is no run-to-run noise"),
        ("deterministic", broken_from(0, "q_proj", arms=("D'",)), "none", "more than rounding explains"),
        ("deterministic", broken_from(0, "q_proj", arms=("D'",), size=3e-7), "H0", "within rounding; it is part of"),
    ],
)
def test_each_row_of_evidence_follows_its_data(row: str, change: object, expected: str, figure: str) -> None:
    found = evidence(*run(change))[row]  # type: ignore[arg-type]
    assert (ticks(found), found.figure) == (expected, found.figure)
    assert figure in found.figure


def test_a_row_without_data_ticks_nothing_and_says_why() -> None:
    one = evidence(*run(prompts=("p0_short",), modes=("as_designed",)))
    assert (ticks(one["q hashes"]), one["q hashes"].figure[:10]) == ("none", "no figure:")
    assert "arm A was not run" in one["arm A"].figure
    theirs = evidence(*foreign())
    assert {ticks(row) for row in theirs.values()} == {"none"}
    assert all(row.figure.startswith("no figure:") for row in theirs.values())


def test_a_prompt_behind_a_shut_gate_is_no_evidence() -> None:
    found = evidence(*run(WRONG_TOKEN))
    assert {ticks(row) for name, row in found.items() if name != "deterministic"} == {"none"}
    assert "gate 'aligned' is shut" in found["every tap"].figure


def test_the_reports_load_without_torch() -> None:
    script = "import sys; import driftprobe.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
