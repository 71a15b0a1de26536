"""Boundaries: the lengths that a model's configuration states, and faults that only they can show."""

from __future__ import annotations

from typing import Any

import pytest

from driftprobe.boundaries import LONGEST, boundaries
from driftprobe.plan import Mode, Prompt, make_plan

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from driftprobe import probe  # noqa: E402
from driftprobe.cli import group  # noqa: E402
from driftprobe.engines.hf import HFEngine  # noqa: E402
from driftprobe.engines.hf.cache import past_of  # noqa: E402
from driftprobe.judgement import Verdict  # noqa: E402
from driftprobe.result import Result  # noqa: E402
from test_engine_hf import CLEAN, FIXED_CACHES  # noqa: E402
from test_engine_hf_states import DRIVEN  # noqa: E402

WINDOW = 12
DEFAULT = {"short": models.tokens(2), "n16": models.tokens(16), "n32": models.tokens(32)}
"""The lengths of the built-in prompts."""


def lengths(switches: dict[str, int], **more: int) -> dict[str, int]:
    return {b.name: b.length for b in boundaries(switches, **{"max_positions": 9000, **more}).probed}


def test_each_switch_is_probed_below_at_and_above() -> None:
    assert lengths({"window": 4096}) == {"window_4096-1": 4095, "window_4096": 4096, "window_4096+1": 4097}
    found = boundaries({"window": 12}, max_positions=99).probed
    assert [b.prompt_length for b in found] == [10, 11, 12], "the step's own token is the last of the total"
    assert all(b.why for b in found)


def test_boundaries_of_one_length_are_probed_once() -> None:
    assert lengths({"window": 16, "window.2": 17}) == {"window_16-1": 15, "window_16": 16, "window_16+1": 17,
                                                        "window_17+1": 18}  # fmt: skip


def test_what_does_not_fit_is_left_out_and_said() -> None:
    found = boundaries({"conv": 2, "window": 40, "context": 20000}, max_positions=40, longest=10000)
    assert [b.name for b in found.probed] == ["conv_2", "conv_2+1", "window_40-1", "window_40"]
    assert {b.name: b.why.split(" ")[0] for b in found.left_out} == {
        "conv_2-1": "shorter", "window_40+1": "beyond", "context_20000-1": "beyond", "context_20000": "beyond",
        "context_20000+1": "beyond"}  # fmt: skip
    long = boundaries({"window": LONGEST}, max_positions=1 << 20)
    assert [b.name for b in long.left_out] == [f"window_{LONGEST}+1"]
    assert "longest" in long.left_out[0].why


@pytest.mark.parametrize("steps", [1, 3])
def test_every_probed_boundary_fits_with_all_its_steps(steps: int) -> None:
    for b in boundaries({"positions": 24}, max_positions=24, steps=steps).probed:
        prompt = Prompt(b.name, (5,) * b.prompt_length)
        assert make_plan(Mode.AS_DESIGNED, prompt, steps=steps, seed=0, max_positions=24).arms


SWITCHES: dict[str, dict[str, int]] = {
    "llama": {"positions": 256},
    "gemma2": {"window": 12, "positions": 256},
    "mistral": {"window": 12, "positions": 256},
    "qwen2": {"positions": 256},  # its window is switched off
    "llama4": {"chunk": 12, "positions": 256},
    "mamba2": {"conv": 4, "scan": 16},
    "lfm2": {"conv": 3, "positions": 256},
}


@pytest.mark.parametrize(
    "name", [n for n in SWITCHES if n not in FIXED_CACHES and (DRIVEN or n not in models.STATEFUL)]
)
def test_switches_of_architectures(name: str) -> None:
    if not hasattr(transformers, f"{models.ARCHITECTURES[name].prefix}Config"):
        pytest.skip("not in this transformers")
    assert HFEngine(models.build(name)).facts.switches == SWITCHES[name]


def scaled(kind: str, **more: Any) -> Any:
    """A llama whose RoPE is scaled, by today's name of the setting or the older one."""
    rope = {"rope_type": kind, "factor": 2.0, **more}
    own = {"rope_theta": 10000.0, **rope}
    word = "rope_parameters" if transformers.__version__[0] >= "5" else "rope_scaling"
    return models.build("llama", max_position_embeddings=64, **{word: own if word == "rope_parameters" else rope})


def test_switches_of_scaled_rope() -> None:
    facts = HFEngine(scaled("yarn", original_max_position_embeddings=32)).facts
    assert (facts.switches, facts.max_positions) == ({"context": 32, "positions": 64}, 64)
    facts = HFEngine(scaled("dynamic")).facts
    assert (facts.switches, facts.max_positions) == ({"context": 64, "positions": 128}, 128)


CLEAN_AT = [n for n in ("mistral", "gemma2", "llama4", "mamba2", "lfm2") if n not in FIXED_CACHES]


@pytest.mark.parametrize("name", [n for n in CLEAN_AT if DRIVEN or n not in models.STATEFUL])
def test_boundaries_of_healthy_models_are_clean(name: str) -> None:
    result = probe(models.build(name), {"own": models.tokens(5)}, mode="kv_aligned", payload="none", boundaries=True,
                   longest=40, ladder="off")  # fmt: skip
    assert result.verdict in CLEAN, result.reason
    assert len(result.traces) > 3


def test_a_static_scaling_does_not_switch() -> None:
    model = scaled("yarn", original_max_position_embeddings=32)
    result = probe(model, {"own": models.tokens(5)}, mode="kv_aligned", payload="none", boundaries=True, longest=40,
                   ladder="off")  # fmt: skip
    assert result.verdict in CLEAN, result.reason


def failing(result: Result) -> set[str]:
    judged = result.judgement.modes["kv_aligned"].prompts
    return {item.prompt for item in judged if item.verdict is Verdict.MISMATCH}


def test_dynamic_scaling_is_found_at_the_boundary() -> None:
    """No planted fault: its frequencies depend on the call's length.

    They depend on the calls before it as well: past the boundary they stay as the longest call left them, so the
    prompts after this one agree with themselves.
    """
    result = probe(scaled("dynamic"), DEFAULT, mode="kv_aligned", payload="none", boundaries=True, longest=66,
                   ladder="off")  # fmt: skip
    verdicts = {item.prompt: (item.verdict, item.reason) for item in result.judgement.modes["kv_aligned"].prompts}
    assert all(verdicts[name][0] in CLEAN for name in ("short", "n16")), verdicts
    assert verdicts["context_64-1"][0] is Verdict.MISMATCH, "a prefill of 70 tokens rotates otherwise"


def act_at(model: Any, total: int) -> None:
    """Hide the oldest key in the one decode step that makes the total: a window off by one at its edge."""

    def hook(_model: object, args: object, call: Any) -> Any:
        rows = 0 if call.get("past_key_values") is None else past_of(call).get_seq_length()
        if call["input_ids"].shape[1] != 1 or rows + 1 != total:
            return args, call
        mask = torch.ones(1, total, dtype=torch.long)
        mask[0, 0] = 0
        return args, {**call, "attention_mask": mask}

    model.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("name", ["mistral"])
def test_a_fault_at_the_edge_of_the_window_needs_the_boundary(name: str) -> None:
    model = models.build(name)
    act_at(model, WINDOW)
    result = probe(model, DEFAULT, mode="kv_aligned", payload="none", ladder="off")
    assert result.verdict in CLEAN, result.reason
    result = probe(model, DEFAULT, mode="kv_aligned", payload="none", boundaries=True, longest=20, ladder="off")
    assert failing(result) == {"window_12"}
    assert result.first_failure is not None
    assert result.first_failure.tensor == "attn_scores"


@pytest.mark.skipif(not DRIVEN, reason="this transformers keeps states in caches of their own")
def test_a_fault_at_the_width_of_the_convolution_needs_the_boundary() -> None:
    """A prefill shorter than the kernel pads on the wrong side, here when the total is the kernel's width."""
    from driftprobe.engines.hf.states import stored_states

    model, kernel = models.build("mamba2"), 4

    def hook(_model: object, _args: object, call: Any, output: Any) -> None:
        if call["input_ids"].shape[1] == kernel - 1:
            for layer in range(3):
                for state in stored_states(past_of(output), layer).conv:
                    state.copy_(state.roll(-1, dims=-1))

    model.register_forward_hook(hook, with_kwargs=True)
    assert probe(model, DEFAULT, mode="kv_aligned", payload="none", ladder="off").verdict in CLEAN
    result = probe(model, DEFAULT, mode="kv_aligned", payload="none", boundaries=True, ladder="off")
    assert failing(result) == {f"conv_{kernel}"}


def test_the_command_says_which_boundaries_it_probes(tmp_path: Any) -> None:
    from click.testing import CliRunner

    command = ["run", "--boundaries", "--longest", "20", "--mode", "as_designed", "--prompts", "p0_short",
               "--payload", "none", "--out", str(tmp_path), "--date", "d"]  # fmt: skip
    output = CliRunner().invoke(group, command)
    assert output.exit_code == 0, output.output
    assert "left out positions_" in output.output
    assert "no length at which it switches and that fits" in output.output
