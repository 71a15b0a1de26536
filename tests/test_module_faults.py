"""Faults of modules: verdict, first tap, reading, cause, parameters, and the side at fault."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from driftprobe.causes import agree  # noqa: E402
from driftprobe.diagnose import diagnose  # noqa: E402
from driftprobe.engines.hf import HFEngine  # noqa: E402
from driftprobe.errors import UsageError  # noqa: E402
from driftprobe.explain import explain  # noqa: E402
from driftprobe.faults import FAULTS  # noqa: E402
from driftprobe.fingerprint import Array  # noqa: E402
from driftprobe.hypotheses.blame import blame  # noqa: E402
from driftprobe.judgement import Diagnosis, Failure  # noqa: E402
from driftprobe.payload import Payloads  # noqa: E402
from driftprobe.scene import Scene  # noqa: E402
from driftprobe.trace import Record  # noqa: E402
from driftprobe.verdict import judge  # noqa: E402
from planted import with_fault  # noqa: E402
from test_engine_hf import KNOWN  # noqa: E402

CASES = [
    ("llama", "norm_epsilon", 1e-4), ("llama", "norm_epsilon_prefill", 1e-5), ("olmo2", "norm_epsilon", 0.01),
    ("llama", "norm_offset", 0.01), ("gemma2", "norm_offset", 1.0), ("qwen3", "qk_norm_missing", 1.0),
    ("cohere", "qk_norm_missing", 1.0), ("bloom", "final_norm_missing", 1.0), ("gpt2", "bias_missing", 1.0),
    ("qwen2", "bias_missing", 1.0), ("gpt_neox", "bias_missing_prefill", 1.0), ("qwen3", "adapter_unmerged", 0.01),
    ("llama", "weights_quantised", 8.0), ("gpt2", "weights_quantised", 4.0), ("phi3", "weights_quantised_prefill", 8.0),
    ("deepseek_v3", "adapter_unmerged", 0.001), ("deepseek_v3", "weights_quantised", 8.0),
    ("deepseek_v3", "weights_quantised_prefill", 4.0),
    ("llama", "activation_other", 1.0), ("gpt2", "activation_tanh", 1.0), ("mixtral", "activation_other", 1.0),
    ("mixtral", "experts_swapped", 1.0), ("qwen3_moe", "topk_not_renormalised", 1.0),
    ("mixtral", "topk_not_renormalised", 1.0), ("qwen3_moe", "expert_dropped", 1.0),
    ("llama", "residual_from_norm", 1.0), ("cohere", "residual_from_norm", 1.0),
    ("gemma2", "residual_skips_attention", 1.0), ("gemma3", "embedding_scale_missing", 1.0),
    ("gpt2", "learned_position_plus_one", 1.0), ("opt", "learned_position_plus_one", 1.0),
    ("gemma2", "logit_softcap_missing", 1.0), ("cohere", "logit_scale", 1.001), ("llama", "logit_scale", 1.05),
    ("llama", "stale_output_embedding", 0.01), ("llama", "length_dependent", 1e-3),
]  # fmt: skip
WIDE = [("llama", "norm_epsilon", 1e-5), ("mixtral", "experts_swapped", 1.0), ("gpt2", "weights_quantised", 8.0)]
"""Run in float64, where predictions fit to that dtype's rounding but for the models' own float32 casts."""
LENGTH = 9


def named(
    name: str, fault: str, strength: float, dtype: str = "float32", ladder: str = "off"
) -> tuple[Failure, Diagnosis]:
    """Plant a fault in a tiny model and assert that all of what it declares is found, and on the right side."""
    if name not in KNOWN:
        pytest.skip(f"no {name} in this transformers")
    model = models.build(name, dtype=dtype, seed=1)
    steps = 2 if fault == "adapter_unmerged" else 1  # one step shows no rank but one
    expected, judged, _ = with_fault(model, fault, models.tokens(LENGTH), strength=strength, steps=steps, ladder=ladder)
    first = judged.first_failure
    assert judged.verdict.value == "MISMATCH", judged.reason
    assert first is not None
    assert (first.layer, first.tensor) == (expected.layer, expected.tensor)
    assert judged.reading.value == expected.reading
    found = first.diagnosis
    assert found is not None, first.root_cause
    assert found.cause == expected.cause == FAULTS[fault].cause
    assert agree(found.cause, expected.parameters, found.parameters), found.parameters
    assert found.side == FAULTS[fault].side, first.root_cause
    return first, found


@pytest.mark.parametrize(("name", "fault", "strength"), CASES)
def test_a_fault_of_a_module_is_named_with_its_parameter_and_side(name: str, fault: str, strength: float) -> None:
    named(name, fault, strength)


@pytest.mark.parametrize(("name", "fault", "strength"), WIDE)
def test_float64_names_it_as_well(name: str, fault: str, strength: float) -> None:
    named(name, fault, strength, "float64")


@pytest.mark.parametrize(("name", "fault", "strength"), [*WIDE, ("phi3", "weights_quantised_prefill", 8.0)])
def test_on_the_ladder_the_prediction_fits_to_the_rungs_own_rounding(name: str, fault: str, strength: float) -> None:
    _, found = named(name, fault, strength, "bfloat16" if fault == "weights_quantised" else "float32", "on")
    assert found.residual < 1e-12


def test_every_fault_of_modules_has_a_case() -> None:
    from driftprobe.faults import modules

    assert {fault.name for fault in modules.FAULTS} == {fault for _, fault, _ in CASES}


def test_the_parameters_that_depend_on_the_prompt() -> None:
    _, found = named("opt", "learned_position_plus_one", 1.0)
    assert found.parameters == {"used": LENGTH + 1, "expected": LENGTH}
    _, found = named("mixtral", "experts_swapped", 1.0)
    chosen, used = found.parameters["chosen"], found.parameters["used"]
    assert isinstance(chosen, tuple) and used == tuple(3 - expert for expert in chosen)


def test_the_sentence_says_which_side_and_why() -> None:
    decode, _ = named("llama", "norm_epsilon", 0.01)
    prefill, _ = named("llama", "norm_epsilon_prefill", 0.01)
    assert "decode is the wrong side: prefill's attn_norm agrees with a replay from its input" in decode.root_cause
    assert "prefill is the wrong side: decode's attn_norm agrees with a replay from its input" in prefill.root_cause


@pytest.mark.parametrize(
    ("name", "fault", "why"),
    [
        ("llama", "bias_missing", "has a bias"),
        ("llama", "expert_dropped", "experts"),
        ("llama", "embedding_scale_missing", "not scaled"),
        ("bloom", "learned_position_plus_one", "position embedding"),
        ("llama", "logit_softcap_missing", "soft-capped"),
        ("llama", "activation_tanh", "silu"),
    ],
)
def test_a_fault_without_its_module_says_so(name: str, fault: str, why: str) -> None:
    with pytest.raises(UsageError, match=why), HFEngine(models.build(name)).plant(fault):
        pass


@pytest.mark.parametrize("fault", ["norm_offset", "weights_quantised", "activation_other", "residual_from_norm"])
def test_nothing_of_a_fault_stays_in_the_model(fault: str) -> None:
    engine = HFEngine(models.build("llama", seed=1))
    clean, state = engine._sample(), list(engine.model.named_parameters())
    with engine.plant(fault):
        pass
    assert all(torch.equal(a, b) for a, b in zip(clean, engine._sample(), strict=True))
    assert all(a is b for (_, a), (_, b) in zip(state, engine.model.named_parameters(), strict=True))
    assert not any("forward" in module.__dict__ for module in engine.model.modules())


class Altered:
    """Payloads with one constant changed."""

    def __init__(self, payloads: Payloads, name: str, array: Array) -> None:
        self.payloads, self.name, self.array = payloads, name, array

    def get(self, record: Record) -> Array | None:
        return self.array if record.tensor == self.name else self.payloads.get(record)


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 2), ()])
def test_a_constant_of_an_odd_shape_explains_nothing_and_breaks_nothing(shape: tuple[int, ...]) -> None:
    """A trace may come from anywhere."""
    model = models.build("llama", seed=1)
    _, judged, result = with_fault(model, "norm_epsilon", models.tokens(LENGTH), keep=True)
    first, trace = judged.first_failure, result.traces[0]
    assert first is not None
    odd = Altered(Payloads(result.folder), "attn_norm.weight", np.full(shape, 2.0))
    scene = Scene(trace, judged, replace(first, diagnosis=None), odd)
    assert blame(scene) is None or shape == ()
    found = explain(scene)
    assert found is None or found.side == ""
    assert diagnose(judge(result.traces, odd), result.traces, odd).first_failure is not None
