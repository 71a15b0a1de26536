"""One run of an arm stands in the traces of all modes that have it: each trace is what its plan alone would give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from driftprobe.api import run  # noqa: E402
from driftprobe.capture import CaptureOptions, capture, capture_once, choose_tokens  # noqa: E402
from driftprobe.engines.hf import HFEngine  # noqa: E402
from driftprobe.options import RunOptions, make_plans  # noqa: E402
from driftprobe.plan import Mode, Plan, Prompt, at_rung, together  # noqa: E402
from driftprobe.trace_file import read_trace  # noqa: E402

PROMPTS = [Prompt("p ä", tuple(models.tokens(17)), 'text "payload":"payloads/p'), Prompt("q", tuple(models.tokens(3)))]
MODES = (Mode.AS_DESIGNED, Mode.KV_ALIGNED)


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def subject(request: pytest.FixtureRequest) -> HFEngine:
    return HFEngine(models.build(request.param))


def plans_of(subject: HFEngine, **more: Any) -> list[Plan]:
    return make_plans(subject, PROMPTS, RunOptions(steps=2, **more))


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("payload", ["none", "all"])
def test_traces_and_payloads_are_byte_for_byte_those_of_each_plan_alone(
    subject: HFEngine, payload: str, tmp_path: Path
) -> None:
    options = CaptureOptions(payload=payload)
    for plan in plans_of(subject):
        capture(plan, subject, choose_tokens(plan, subject), tmp_path / "alone", options, lambda _line: None)
    groups = together(plans_of(subject))
    assert [[plan.mode for plan in group] for group in groups] == [[Mode.KV_ALIGNED, Mode.AS_DESIGNED]] * 2
    for group in groups:
        tokens = choose_tokens(group[0], subject)
        capture_once(group, subject, tokens, tmp_path / "once", options, lambda _arm, _line: None)
    alone = everything(tmp_path / "alone")
    assert len([name for name in alone if name.endswith(".jsonl")]) == 4
    assert everything(tmp_path / "once") == alone


def test_a_rung_is_captured_once_too(subject: HFEngine, tmp_path: Path) -> None:
    (group, _) = together(plans_of(subject))
    tokens = choose_tokens(group[0], subject)
    again = [at_rung(plan, "float64") for plan in group]
    with subject.at("float64"):
        paths = capture_once(again, subject, tokens, tmp_path, CaptureOptions(), lambda _arm, _line: None)
        alone = capture(again[1], subject, tokens, tmp_path / "alone", CaptureOptions(), lambda _line: None)
    once, own = read_trace(paths[1]), read_trace(alone)
    assert (once.header, once.records, len(once.events)) == (own.header, own.records, len(own.events))
    costs = [event.measured for path in paths for event in read_trace(path).events if event.event == "cost"]
    assert len(costs) == 2 and costs[0] == costs[1]


def test_plans_of_other_prompts_steps_or_layers_are_not_captured_together(subject: HFEngine) -> None:
    designed, _, aligned, other = plans_of(subject)
    assert together([designed, aligned]) == [(aligned, designed)]
    assert together([designed, other]) == [(designed,), (other,)]
    longer = plans_of(subject, layers=(0,))[2]
    assert together([designed, longer]) == [(designed,), (longer,)]


def test_arms_in_another_order_are_run_apart(subject: HFEngine) -> None:
    designed, _, aligned, _ = plans_of(subject)
    turned = Plan(aligned.mode, aligned.prompt, aligned.steps, aligned.seed, aligned.arms[::-1])
    assert together([designed, turned]) == [(designed,), (turned,)]


class Counted(HFEngine):
    """Notes the arms that are run."""

    def run(self, arm: Any, *given: Any) -> Iterator[Any]:
        self.ran.append(arm.name)
        return super().run(arm, *given)


@pytest.mark.parametrize("alike", [True, False])
def test_a_run_of_both_modes_runs_every_arm_once_and_its_logs_say_so(alike: bool, tmp_path: Path) -> None:
    engine = Counted(models.build("llama"))
    engine.ran, engine.alike_in_modes = [], alike
    run(engine, PROMPTS[1:], RunOptions(ladder="off"), tmp_path / "run")
    assert engine.ran.count("P") == (1 if alike else 2) and engine.ran.count("A") == 1
    designed, aligned = ((tmp_path / f"run/run/q_{mode.value}.log").read_text(encoding="utf-8") for mode in MODES)
    assert ("run once for this mode and kv_aligned" in designed) is alike
    assert ("run once for this mode and as_designed" in aligned) is alike
    assert "arm A " not in designed and "arm A " in aligned and "arm D " in designed
    shared = next((line for line in aligned.splitlines() if "run once" in line), "")
    assert not shared or (shared.endswith(", P@batch, D@batch") and ", A" not in shared)
