"""How commands tell a verdict: text, JSON by its schema, GitHub's commands and summary, JUnit XML, one quiet line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

import report_traces
from driftprobe.cli import group
from driftprobe.cli.on_a_node import given_arguments
from driftprobe.cli.run import command as run_command
from driftprobe.errors import DriftprobeError, OutputError, UsageError
from driftprobe.report import github, junit, verdict_json
from driftprobe.trace import Trace
from make_trace import assert_five_parts, drifting, toy
from report_traces import broken_from, prompt_trace, rounding, run, same
from test_pytest_plugin import write

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "docs/verdict.schema.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A traces folder of one prompt, wrong from layer 1 q_rope on."""
    return write(tmp_path / "rope", prompt_trace("p0_short", "kv_aligned", broken_from(1, "q_rope")))


def driftprobe(*words: object) -> Result:
    return CliRunner().invoke(group, [str(word) for word in words])


def raised(*words: object) -> DriftprobeError:
    error = driftprobe(*words).exception
    assert isinstance(error, DriftprobeError)
    return error


def test_text_names_the_next_command(folder):
    done = driftprobe("analyze", folder)
    assert done.exit_code == 1 and "verdict: MISMATCH" in done.output
    assert re.search(
        r"^  next: +driftprobe run --mode kv_aligned --model builtin:tiny .*--layers 0,1 ", done.output, re.MULTILINE
    )


def test_quiet_is_one_line(folder):
    done = driftprobe("analyze", folder, "--quiet")
    assert done.exit_code == 1 and done.output.count("\n") == 1
    assert done.output.startswith("verdict: MISMATCH — decode0 differs from prefill_last at layer 1 q_rope")


@pytest.mark.parametrize("option", [("--json",), ("--format", "json")])
def test_json_is_the_verdict_and_nothing_else(folder, option):
    done = driftprobe("analyze", folder, *option)
    body = json.loads(done.stdout)
    assert done.exit_code == 1 and body["verdict"] == "MISMATCH"
    (folder.parent / "kept").mkdir()
    driftprobe("analyze", folder, "--output", folder.parent / "kept")
    assert done.stdout == (folder.parent / "kept/verdict.json").read_text(encoding="utf-8")


def test_compare_tells_its_sides_apart_from_its_json(folder, tmp_path):
    clean = write(tmp_path / "clean", prompt_trace("p0_short", "kv_aligned", same))
    words = ("compare", clean, folder, "--out", tmp_path / "out", "--date", "d")
    done = driftprobe(*words, "--json")
    assert json.loads(done.stdout)["verdict"] == "MISMATCH" and "reference:" in done.stderr
    assert "reference:" in driftprobe(*words).stdout
    assert driftprobe(*words, "--quiet").stdout.startswith("verdict: MISMATCH — ")


def test_two_formats_and_an_unknown_one_are_refused(folder):
    assert_five_parts(raised("analyze", folder, "--format", "sarif"), what="unknown format", where="--format",
                      measured="sarif")  # fmt: skip
    error = raised("analyze", folder, "--json", "--format", "github")
    assert_five_parts(error, what="two formats", where="--json", measured="github")
    assert isinstance(error, UsageError)


def test_github_annotates_and_writes_the_summary(folder, tmp_path, monkeypatch):
    (tmp_path / "summary.md").write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    done = driftprobe("analyze", folder, "--format", "github")
    lines = done.stdout.splitlines()
    token = lines[0].removeprefix("::stop-commands::")
    assert done.exit_code == 1 and len(token) == 32 and lines.index(f"::{token}::") > 3
    errors = [line for line in lines if line.startswith("::error")]
    assert lines[-1:] == errors and len(errors) == 1
    assert errors[0].startswith(
        "::error title=driftprobe%3A MISMATCH at layer 1 q_rope (p0_short%2C kv_aligned)::drift "
    )
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("before\n### driftprobe: MISMATCH\n") and "**Root cause**" in summary
    assert "| kv\\_aligned |" in summary or "| kv_aligned |" in summary


def test_how_it_is_told_is_no_business_of_another_machine():
    words = ["--host", "node", "--json", "--format", "json", "--junit", "x.xml", "--quiet", "--steps", "2"]
    assert given_arguments(run_command.make_context("run", words)) == ["--steps", "2"]


def test_a_summary_that_cannot_be_written_is_told(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "summary.md"))
    error = raised("analyze", folder, "--format", "github")
    assert isinstance(error, OutputError)
    assert_five_parts(error, what="cannot write", where="summary.md")


def hostile() -> tuple[Any, tuple[Trace, ...]]:
    """A judgement whose trace brings in line ends, markup and workflow commands."""
    evil = "x\n::error::owned\r\n<script>|`]]>\x1b[31m\u0000\ud800%0A"
    trace, _ = toy(drifting(0.1, start=(1, "x_out")), mode="kv_aligned", facts={"model": evil})
    records = tuple(r if r.tensor != "x_out" else type(r)(**{**_fields(r), "tensor": evil}) for r in trace.records)
    header = type(trace.header)(**{**_fields(trace.header), "taps": {}, "labels": {"output": evil}})
    traces = (Trace(header, records, trace.events, trace.path),)
    return report_traces.judged(traces), traces


def _fields(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__dataclass_fields__}


def test_what_a_trace_brings_in_is_no_command_no_markup_and_no_xml():
    judgement, traces = hostile()
    assert judgement.first_failure is not None and "::error" in judgement.first_failure.tensor
    for line in github.annotate(judgement, "r.md"):
        assert line.startswith(("::error title=", "::warning title=")) and line.isprintable()
        assert "%0A" not in line.replace("%250A", "")
    summary = github.summary(judgement, traces, "r.md")
    assert not re.search(r"^(::|<)", summary, re.MULTILINE) and "<script" not in summary and "\x1b" not in summary
    document = junit.render(judgement, traces)
    document.encode("utf-8")
    assert ElementTree.fromstring(document.encode("utf-8")).tag == "testsuites"


def test_many_prompts_are_counted_not_flooded():
    judgement, _ = run(broken_from(0, "v_proj"), prompts=[f"p{i}" for i in range(8)])
    lines = github.annotate(judgement, "")
    assert len(lines) == github.MOST + 1 == 10 and lines[-1].endswith("::and 7 prompts more")


def test_a_clean_run_is_a_notice():
    (line,) = github.annotate(run()[0], "")
    assert line.startswith("::notice title=driftprobe%3A NO_DRIFT::all ")


def test_junit_counts_what_failed_and_what_could_not_be_told(folder, tmp_path):
    path = folder / "p0_short_kv_aligned.jsonl"
    write(folder, prompt_trace("p6_len_16", "kv_aligned"), prompt_trace("p6_len_32", "kv_aligned"))
    cut = folder / "p6_len_32_kv_aligned.jsonl"
    cut.write_bytes(cut.read_bytes()[:-500])
    done = driftprobe("analyze", path.parent, "--junit", tmp_path / "out.xml")
    assert done.exit_code == 1
    root = ElementTree.parse(tmp_path / "out.xml").getroot()
    suite = root[0]
    assert {name: root.get(name) for name in ("tests", "failures", "errors")} == {
        "tests": "3", "failures": "1", "errors": "1"}  # fmt: skip
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    failure = cases["p0_short"].find("failure")
    assert failure is not None and failure.get("type") == "MISMATCH" and "layer 1 q_rope" in (failure.text or "")
    assert cases["p6_len_32"].find("error") is not None and cases["p6_len_16"].find("system-out") is not None
    assert_five_parts(
        raised("analyze", folder, "--junit", tmp_path / "no" / "x.xml"), what="cannot write", where="x.xml"
    )


# ---- the schema


def strict(schema: Any) -> Any:
    """The same schema, that allows no field which it does not name: a new field must be published."""
    if isinstance(schema, dict):
        more = (
            {"additionalProperties": False} if "properties" in schema and "additionalProperties" not in schema else {}
        )
        return {key: strict(value) for key, value in schema.items()} | more
    return [strict(item) for item in schema] if isinstance(schema, list) else schema


def validate(document: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(strict(SCHEMA)).validate(json.loads(document))


CHANGES = {"clean": same, "rounding": rounding, "rope": broken_from(1, "q_rope"), "infinite": broken_from(
    0, "x_out", size=float("inf")), "controls": broken_from(0, "v_proj", arms=("E1",))}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_schema_holds_for_what_is_written(change):
    for modes in (("as_designed",), ("as_designed", "kv_aligned")):
        judgement, traces = run(change, modes=modes)
        validate(verdict_json.render(judgement, traces))


def test_the_schema_holds_for_strangers_and_for_a_run_with_its_ladder(clean_run):
    for equal in (True, False):
        validate(verdict_json.render(*report_traces.foreign(equal)))
    validate((clean_run / "verdict.json").read_text(encoding="utf-8"))


SPOILED = [
    lambda body: body.update(verdict="PASS"),
    lambda body: body.pop("reason"),
    lambda body: body["modes"]["kv_aligned"].update(pairs=-1),
    lambda body: body["modes"]["kv_aligned"]["first_failure"].update(drift=None),
    lambda body: body["modes"]["kv_aligned"]["first_failure"].update(drift="NaN"),
    lambda body: body.update(schema="driftprobe/verdict/2"),
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_the_schema_refuses_what_is_no_verdict(spoil):
    jsonschema = pytest.importorskip("jsonschema")
    body = json.loads(verdict_json.render(*run(broken_from(1, "q_rope"))))
    spoil(body)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body, SCHEMA)


def test_the_page_documents_every_field_of_the_schema():
    page = (ROOT / "docs/verdict-json.md").read_text(encoding="utf-8")
    names: set[str] = set()

    def walk(schema: Any) -> None:
        if isinstance(schema, dict):
            names.update(schema.get("properties", {}))
            for value in schema.values():
                walk(value)
        elif isinstance(schema, list):
            for value in schema:
                walk(value)

    walk(SCHEMA)
    assert len(names) > 60
    for name in names - {"min", "max", "mean"}:
        assert f"`{name}`" in page, name


def test_a_run_that_needs_nothing_more_is_not_told_to_run_again():
    from driftprobe.report.conclusion import next_command
    from driftprobe.verdict import base_traces
    from report_traces import broken_from, run

    judgement, traces = run()
    assert next_command(judgement, base_traces(traces)) == ""
    judgement, traces = run(broken_from(1, "q_rope"))
    assert next_command(judgement, base_traces(traces)).startswith("driftprobe run ")
