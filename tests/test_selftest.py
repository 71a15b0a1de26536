"""The self-test: it fires for every family, it fails where the probe is blind, and it says what it could have seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from click.testing import CliRunner  # noqa: E402

import models  # noqa: E402
from driftprobe import floor, self_test, selftest  # noqa: E402
from driftprobe.cli import group  # noqa: E402
from driftprobe.faults import FAULTS  # noqa: E402
from driftprobe.judgement import Verdict  # noqa: E402
from test_engine_hf_states import DRIVEN  # noqa: E402


def few(monkeypatch: pytest.MonkeyPatch, *names: str, **changes: object) -> None:
    """Keep to some faults, so that a test is quick."""
    chosen = {name: replace(FAULTS[name], **changes) for name in names}  # type: ignore[arg-type]
    monkeypatch.setattr(selftest, "FAULTS", chosen)


def test_every_family_that_can_act_fires(tmp_path: Path) -> None:
    found = self_test("builtin:tiny", ladder="off", out=tmp_path / "run")
    trials = {trial.family: trial for trial in found.trials}
    assert set(trials) == {fault.family or "other" for fault in FAULTS.values()}
    assert found.passed
    assert found.clean is Verdict.STRUCTURAL_DRIFT
    for trial in found.trials:
        assert trial.fired == trial.acted
        assert trial.located or not trial.acted, trial
        assert bool(trial.reason) != trial.acted
    assert "no layer with a conv_state" in trials["state-space"].reason
    body = json.loads((tmp_path / "run" / "self_test.json").read_text(encoding="utf-8"))
    assert body["passed"] is True
    assert len(body["trials"]) == len(trials)
    page = (tmp_path / "run" / "SELF_TEST.md").read_text(encoding="utf-8")
    assert all(trial.fault in page for trial in found.trials)
    assert f"{found.limits[-1].limit:.2e}" in page


def test_limits_are_the_clean_runs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, "rope_plus_one")
    found = self_test(models.build("llama"), ladder="on")
    assert {limit.layer for limit in found.limits} == {None, 0, 1, 2}
    assert all(0 < limit.limit < 1e-4 and limit.rung is not None and limit.rung < 1e-12 for limit in found.limits)
    best, worst = found.by_tap["q_rope"]
    assert best.limit == min(limit.limit for limit in found.limits if limit.tensor == "q_rope") <= worst.limit


@pytest.mark.skipif(not DRIVEN, reason="this transformers keeps states in caches of their own")
def test_families_that_cannot_act_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, "rope_plus_one", "conv_window_short")
    found = self_test(models.build("mamba2"), ladder="off")
    assert [(trial.family, trial.acted, trial.fired) for trial in found.trials] == [
        ("positions", False, False), ("state-space", True, True)]  # fmt: skip
    assert "0 KV heads" in found.trials[0].reason
    assert found.trials[1].cause_agrees
    assert found.passed


def test_a_blind_probe_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, "norm_epsilon")
    monkeypatch.setattr(floor, "LIMIT", 1e9)
    found = self_test("builtin:tiny", ladder="off")
    assert not found.passed
    assert "STRUCTURAL_DRIFT" in found.trials[0].reason


def test_an_unclean_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, "rope_plus_one")
    model = models.build("llama")
    spoil = lambda _m, args, out: out * 1.01 if args[0].shape[1] == 1 else out  # noqa: E731
    model.model.layers[1].mlp.register_forward_hook(spoil)
    found = self_test(model, ladder="off")
    assert found.trials[0].fired
    assert found.clean is Verdict.MISMATCH
    assert not found.passed


def test_the_subtlest_strength_that_is_seen_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, "norm_epsilon", strengths=(0.01, 1e-3, 1e-9, 1e-30))
    assert self_test("builtin:tiny", ladder="off").trials[0].strength == 1e-3


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, "norm_epsilon")
    place = ["--ladder", "off", "--out", str(tmp_path), "--date", "d", "--name", "n"]
    for command in (["self-test"], ["run", "--self-test"]):  # the second takes the place of the first
        output = CliRunner().invoke(group, [*command, *place], standalone_mode=False)
        assert "self-test: PASSED — 1 of 1 families seen" in output.output, output.output
        assert output.return_value == 0
    assert (tmp_path / "d" / "n" / "SELF_TEST.md").is_file()
    monkeypatch.setattr(floor, "LIMIT", 1e9)
    output = CliRunner().invoke(group, ["self-test", *place], standalone_mode=False)
    assert output.return_value == 1
