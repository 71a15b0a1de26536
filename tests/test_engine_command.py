"""engines/command.py: any program as an engine, and every way in which it can fail."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from driftprobe.api import RunOptions, run
from driftprobe.cli import group
from driftprobe.engines import open_engine
from driftprobe.engines.base import BUILTIN
from driftprobe.engines.command import CommandEngine, read_program
from driftprobe.errors import EngineError, UsageError
from driftprobe.judgement import Verdict
from driftprobe.plan import Mode
from driftprobe.prompts import make_prompt, make_prompts
from native_header import INCLUDE, ROOT, compiler

STAND_IN = Path(__file__).parent / "stand_in.py"


def described(folder: Path, how: str = "", **fields: object) -> Path:
    """A TOML file that runs the stand-in."""
    command = [sys.executable, str(STAND_IN), "{arm}", "{tokens}", "{prompt_len}", "{steps}", "{mode}", "{out}", how]
    body = {"command": command, **fields}
    path = folder / "engine.toml"
    path.write_text("".join(f"{name} = {_toml(value)}\n" for name, value in body.items()), encoding="utf-8")
    return path


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {json.dumps(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def judged(
    folder: Path, how: str = "", *, modes: tuple[Mode, ...] = (Mode.KV_ALIGNED,), steps: int = 2, **fields: object
):
    engine = open_engine("command", model="", config=str(described(folder, how, **fields)))
    prompts = make_prompts({"a": [3, 1, 4, 1, 5]}, engine)
    return run(engine, prompts, RunOptions(modes=modes, steps=steps, ladder="off"), folder / "out")


def test_a_healthy_program_gets_its_verdict_and_its_output_is_in_the_log(tmp_path):
    result = judged(tmp_path, modes=(Mode.AS_DESIGNED, Mode.KV_ALIGNED))
    assert result.verdict is Verdict.STRUCTURAL_DRIFT
    trace = next(t for t in result.traces if t.header.mode == "kv_aligned")
    assert {r.arm for r in trace.records} == {"P", "D", "P'", "D'", "E1", "E7", "E31", "A"}
    assert {r.token_id for r in trace.records if r.arm == "P"} <= set(trace.header.token_ids)
    log = (tmp_path / "out/run/a_kv_aligned.log").read_text(encoding="utf-8")
    assert "stand-in computes arm A" in log
    assert "--" not in log.split("$ ")[0]


def test_a_fault_of_the_program_is_found(tmp_path):
    result = judged(tmp_path, "fault")
    assert result.verdict is Verdict.MISMATCH
    assert result.first_failure is not None
    assert result.first_failure.tensor == "logits"


@pytest.mark.parametrize(
    ("how", "fields", "words"),
    [
        ("exit E7", {}, ("arm E7", "exit code 3", "CUDA error: out of luck")),
        ("hang E1", {"time_limit": 2.0}, ("arm E1", "still running after 2 s")),
        ("silent E1", {}, ("no trace was written",)),
        ("cut", {}, ("arm D", "incomplete")),
        ("spoil D", {}, ("arm D", "does not validate")),
        ("small sketch D", {}, ("arm D", "sketch_size 16; 64 is needed")),
    ],
)
def test_a_call_that_fails_is_not_available_with_the_reason_and_nothing_is_lost(tmp_path, how, fields, words):
    result = judged(tmp_path, how, modes=(Mode.AS_DESIGNED,), **fields)
    assert result.verdict is Verdict.NOT_AVAILABLE
    for word in words:
        assert word in result.reason
    assert any(r.arm == "P'" for r in result.traces[0].records)


@pytest.mark.parametrize(
    ("how", "words"),
    [("exit P", ("exit code 3", "out of luck")), ("other arm", ("record of arm X",)), ("other token", ("token 1",))],
)
def test_a_program_that_fails_its_trial_is_an_error_in_five_parts(tmp_path, how, words):
    with pytest.raises(EngineError) as caught:
        judged(tmp_path, how)
    for word in words:
        assert word in str(caught.value)


def test_a_failed_trial_names_the_command_and_its_tokens(tmp_path):
    with pytest.raises(EngineError) as caught:
        judged(tmp_path, "exit P", trial=[4, 5, 6])
    assert f"{STAND_IN} P " in caught.value.next_step
    assert "file of 4 5 6:" in caught.value.next_step
    assert str(tmp_path) in caught.value.next_step


def test_what_a_call_left_is_removed_when_the_next_plan_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = open_engine("command", config=str(described(tmp_path)))
    prompts = make_prompts({str(n): [3, 1, 4, 1, n] for n in range(3)}, engine)
    run(engine, prompts, RunOptions(modes=(Mode.AS_DESIGNED,), steps=1, ladder="off"), tmp_path / "out")
    left = [path.name for path in tmp_path.glob("driftprobe-*/*/traces/*")]
    assert set(left) == {"2_as_designed.jsonl"}


def test_a_program_that_is_not_there_is_an_error(tmp_path):
    path = described(tmp_path)
    path.write_text('command = ["./no-such-thing", "{arm}", "{tokens}", "{out}"]', encoding="utf-8")
    with pytest.raises(EngineError, match="cannot be started"):
        open_engine("command", config=str(path))


def test_without_arm_a_there_is_no_kv_aligned(tmp_path):
    with pytest.raises(UsageError, match="cannot align"):
        judged(tmp_path, arms=["P", "D", "E"])
    result = judged(tmp_path, modes=(Mode.AS_DESIGNED,), arms=["P", "D", "E"])
    assert {r.arm for r in result.traces[0].records} == {"P", "D", "E1", "E7", "E31"}


def test_knobs_casts_dtype_and_environment_are_declared(tmp_path):
    path = described(tmp_path, knobs=["threads"], dtype="bfloat16", casts={"k_cache": "float16"}, max_positions=64,
                     environment={"STAND_IN": "heard"})  # fmt: skip
    engine = open_engine("command", config=str(path))
    assert engine.knobs == ("threads",)
    facts = engine.facts
    assert (facts.dtype, facts.casts, facts.max_positions, facts.device) == (
        "bfloat16",
        {"k_cache": "float16"},
        64,
        "heard",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("command = 3", "command"),
        ("command = []", "empty command"),
        ('command = ["x", "{arm}", "{tokens}"]', "no {out}"),
        ('command = ["x", "{arm}", "{tokens}", "{out}", "{nonsense}"]', "unknown placeholder {nonsense}"),
        ('command = ["x", "{arm}", "{tokens}", "{out}"]\ntime_limit = -1', "time_limit"),
        ('command = ["x", "{arm}", "{tokens}", "{out}"]\narms = ["P"]', "arms P"),
        ('command = ["x", "{arm}", "{tokens}", "{out}"]\nknobs = ["volume"]', "knobs volume"),
        ('command = ["x", "{arm}", "{tokens}", "{out}"]\ncolour = "red"', "unknown field colour"),
        ('command = ["x", "{arm}", "{tokens}", "{out}"]\ndtype = "fp12"', "dtype fp12"),
        ('command = ["x", "{arm}", "{tokens}", "{out}"]\n[casts]\nk = "fp12"', "cast to fp12"),
        ("command = [", "TOMLDecodeError"),
        ('command = ["x", "{arm}", "{tokens}", "{out}", "a\\u0000b"]', "NUL character"),
        ('command = ["x", "{arm}", "{tokens}", "{out}"]\n[environment]\nA = "b\\u0000"', "NUL character"),
        ('command = ["x", "{arm}", "{tokens}", "{out}"]\n[environment]\n"A=B" = "c"', "environment variable 'A=B'"),
        ('command = ["x", "{arm}", "{tokens}", "{out}"]\n[environment]\n"" = "c"', "environment variable ''"),
    ],
)
def test_a_description_that_cannot_be_used_is_refused_in_words(tmp_path, text, words):
    path = tmp_path / "engine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_program(path)
    assert words in str(caught.value)


def test_the_command_line_says_what_is_missing_and_what_does_not_fit():
    for arguments, words in (
        (["--engine", "command"], "no description of the program"),
        (["--engine", "command", "--config", "no/such.toml"], "FileNotFoundError"),
        (["--engine", "hf", "--config", "x.toml"], "does not have"),
        (["--engine", "command", "--config", "x.toml", "--dtype", "float16"], "--dtype"),
    ):
        done = CliRunner().invoke(group, ["run", *arguments])
        assert isinstance(done.exception, UsageError)
        assert words in str(done.exception)


@pytest.fixture(scope="module")
def c_engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c_engine")
    subprocess.run([compiler(), "-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{INCLUDE}",
                    str(ROOT / "examples/c_engine/llama.c"), "-o", str(folder / "llama"), "-lm", "-pthread"],
                   check=True)  # fmt: skip
    return folder


def c_result(folder: Path, tmp_path: Path, bug: str | None = None):
    text = (ROOT / "examples/c_engine/driftprobe.toml").read_text(encoding="utf-8")
    if bug:
        text = text.replace('"--out"', f'"--bug", "{bug}", "--out"')
    path = folder / f"{bug}.toml"
    path.write_text(text, encoding="utf-8")
    engine = CommandEngine(read_program(path), folder, "builtin:tiny")
    prompt = make_prompt("a", list(b"A decoder reads a prompt."), engine)
    return run(engine, [prompt], RunOptions(steps=2, ladder="off"), tmp_path / "out")


def test_the_c_engine_is_clean(c_engine, tmp_path):
    result = c_result(c_engine, tmp_path)
    assert result.verdict is Verdict.STRUCTURAL_DRIFT
    assert {m.verdict for m in result.judgement.modes.values()} == {Verdict.STRUCTURAL_DRIFT}


BUGS = {
    "rope_position": ("q_rope", "rotated for position 24, not 25"),
    "wrong_slot": ("k_cache", "row 24 was overwritten by the step's own row 25"),
    "gqa_tile": ("attn_scores", "query heads read KV heads 0, 1, 0, 1, 0, 1"),
    "missing_scale": ("attn_scores", "softmax scale × 5.65685"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_of_the_c_engine_is_found_and_named(c_engine, tmp_path, bug):
    result = c_result(c_engine, tmp_path, bug)
    tensor, cause = BUGS[bug]
    assert result.verdict is Verdict.MISMATCH
    first = result.first_failure
    assert first is not None
    assert (first.layer, first.tensor) == (0, tensor)
    assert cause in result.reports()["B3_66_V2_FINAL_REPORT.md"]


def test_the_c_engine_knows_the_packages_model(c_engine):
    path = c_engine / "plain.toml"
    path.write_text((ROOT / "examples/c_engine/driftprobe.toml").read_text(encoding="utf-8"), encoding="utf-8")
    engine = CommandEngine(read_program(path), c_engine, "builtin:tiny")
    assert engine.model == str(BUILTIN["builtin:tiny"])
    assert engine.taps["attn_scores"] == (0, 1, 2, 3)
    assert engine.detokenize(engine.tokenize("Hello")) == "Hello"
