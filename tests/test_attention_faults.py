"""Faults of positions, heads, scores and cache extent: verdict, first tap, reading, cause and parameters."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from driftprobe import probe  # noqa: E402
from driftprobe.causes import agree  # noqa: E402
from driftprobe.engines.hf import HFEngine  # noqa: E402
from driftprobe.errors import UsageError  # noqa: E402
from driftprobe.faults import FAULTS  # noqa: E402
from driftprobe.result import Result  # noqa: E402
from test_engine_hf import KNOWN  # noqa: E402

LENGTH = 19
EVERYWHERE = [
    ("rope_plus_one", None), ("rope_minus_one", None), ("rope_reset", None), ("rope_base", 4.0), ("rope_base", 1.01),
    ("rope_scaling", 2.0), ("rope_scaling", 1.001), ("rope_partial", None), ("rope_interleaved", None),
    ("k_unrotated", None), ("rope_twice", None), ("prefill_rope", None), ("oldest_key_masked", None),
    ("oldest_row_lost", None),
    ("sink_tokens_lost", None), ("newest_key_masked", None), ("extra_key_visible", None), ("prefill_sees_next", None),
    ("mask_leak", -5.0), ("mask_leak", -10.0), ("kv_heads_swapped", None), ("gqa_tile", None),
    ("q_heads_permuted", None), ("context_heads_rolled", None), ("head_zero", None), ("attn_scale", 1.05),
    ("attn_scale", 1.001), ("scale_missing", None), ("scale_wrong_dim", None), ("prefill_scale", 1.001),
]  # fmt: skip
"""What a plain decoder with RoPE and grouped queries can have."""
OF_THEIR_OWN = {
    "qwen3": ["rope_base", "rope_partial", "attn_scale"],
    "gpt_neox": ["rope_base", "rope_interleaved", "k_unrotated", "kv_heads_swapped"],
    "phi3": ["rope_twice", "gqa_tile"],
    "mistral": ["window_minus_one", "window_plus_one", "mask_leak"],
    "gemma2": [
        "oldest_row_lost",
        "softcap_missing",
        "window_minus_one",
        "window_plus_one",
        "attn_scale",
        "prefill_scale",
    ],
    "gpt_oss": ["sinks_lost", "rope_plus_one", "k_unrotated", "attn_scale", "window_plus_one", "gqa_tile"],
    "bloom": [
        "oldest_row_lost",
        "alibi_offset",
        "attn_scale",
        "prefill_scale",
        "oldest_key_masked",
        "kv_heads_swapped",
        "mask_leak",
    ],
    "deepseek_v3": ["oldest_row_lost", "rope_plus_one", "rope_interleaved", "attn_scale", "extra_key_visible"],
}
"""Architectures with something that a plain decoder has not, and the faults that meet it."""


def found(name: str, fault: str, strength: float | None = None, *, dtype: str = "float32", attn: str = "",
          steps: int = 1, length: int = LENGTH, ladder: str = "off") -> Result:  # fmt: skip
    """Plant a fault in a tiny model of two layers and assert that all of what it declares is found."""
    if name not in KNOWN:
        pytest.skip(f"no {name} in this transformers")
    layers = {"n_layer": 2} if name == "bloom" else {"num_hidden_layers": 2}
    model = models.build(name, attn=attn or models.ARCHITECTURES[name].kernels[-1], dtype=dtype, seed=2, **layers)
    result = probe(model, {"a": models.tokens(length)}, mode="kv_aligned", fault=fault, strength=strength, steps=steps,
                   ladder=ladder)  # fmt: skip
    check(result)
    return result


def check(result: Result) -> None:
    """Assert first tap, reading, cause and parameters of a run with a planted fault."""
    first, expected = result.first_failure, result.expected
    assert result.verdict.value == "MISMATCH", result.reason
    assert first is not None
    assert expected is not None
    assert (first.layer, first.tensor) == (expected.layer, expected.tensor), result.reason
    assert result.judgement.modes["kv_aligned"].prompts[0].reading.value == expected.reading
    assert first.diagnosis is not None, first.root_cause
    told = first.diagnosis
    assert told.cause == expected.cause, told
    assert agree(expected.cause, expected.parameters, told.parameters), (expected.parameters, told.parameters)


@pytest.mark.parametrize(("fault", "strength"), EVERYWHERE)
def test_a_plain_decoder_tells_each_fault_with_its_parameters(fault: str, strength: float | None) -> None:
    found("llama", fault, strength)


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name, faults in OF_THEIR_OWN.items() for fault in faults]
)
def test_other_architectures_tell_theirs(name: str, fault: str) -> None:
    found(name, fault)


@pytest.mark.parametrize("fault", ["extra_key_visible", "mask_leak", "prefill_sees_next", "gqa_tile"])
def test_the_eager_kernel_tells_them_too(fault: str) -> None:
    found("llama", fault, attn="eager")


@pytest.mark.parametrize(
    ("fault", "strength"),
    [
        ("rope_base", 1.01),
        ("attn_scale", 1.001),
        ("mask_leak", -10.0),
        ("prefill_scale", 1.001),
        ("rope_scaling", 1.001),
    ],
)
def test_float64_gives_the_parameter_to_many_digits(fault: str, strength: float) -> None:
    result = found("llama", fault, strength, dtype="float64")
    assert result.first_failure is not None
    assert result.first_failure.diagnosis is not None
    value = next(iter(result.first_failure.diagnosis.parameters.values()))
    wanted = 1.0 / strength if fault == "prefill_scale" else strength
    assert value == pytest.approx(wanted, rel=1e-5)  # angles are computed in float32 inside


@pytest.mark.parametrize(
    ("fault", "strength"),
    [("rope_base", 1.01), ("rope_plus_one", None), ("attn_scale", 1.001), ("mask_leak", -10.0), ("gqa_tile", None)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ladder_leaves_nothing_unexplained(fault: str, strength: float | None, dtype: str) -> None:
    result = found("llama", fault, strength, dtype=dtype, ladder="on")
    assert result.first_failure is not None
    assert result.first_failure.diagnosis is not None
    assert result.first_failure.diagnosis.residual < 1e-14


@pytest.mark.parametrize(
    ("fault", "strength", "cause"),
    [
        ("rope_plus_one", None, "rope_position"),
        ("rope_scaling", 1.05, "rope_scaling"),
        ("rope_reset", None, "rope_position"),
    ],
)
def test_more_steps_tell_an_offset_from_a_factor(fault: str, strength: float | None, cause: str) -> None:
    """At position 20 a factor of 1.05 and an offset of one are the same rotation; at 21 they are not."""
    result = found("llama", fault, strength, steps=3, length=20)
    assert result.first_failure is not None
    assert result.first_failure.diagnosis is not None
    assert result.first_failure.diagnosis.cause == cause


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_offset_of_two_rounded_pairs_is_no_factor(dtype: str) -> None:
    """GPT-NeoX turns 4 of a head's 16 dimensions; rounded, position 32 is found as 31.9998, and 0 is left over."""
    found("gpt_neox", "rope_plus_one", dtype=dtype, length=31)
    found("gpt_neox", "rope_scaling", 1.001, dtype="float16", length=31)


@pytest.mark.parametrize(("name", "fault", "why"), [
    ("llama", "alibi_offset", "no linear biases"), ("llama", "sinks_lost", "no module has sinks"),
    ("llama", "softcap_missing", "no module has"), ("llama", "window_plus_one", "no layer with a sliding window"),
    ("gpt_neox", "gqa_tile", "as many KV heads"), ("bloom", "rope_base", "no rotary module"),
    ("mistral", "extra_key_visible", "a sliding window in every layer"),
])  # fmt: skip
def test_a_fault_of_what_a_model_lacks_says_so(name: str, fault: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        found(name, fault)


def test_a_window_that_is_not_full_cannot_be_too_short() -> None:
    with pytest.raises(UsageError, match="window of 12"):
        found("mistral", "window_minus_one", length=8)


def test_a_strength_needs_a_fault() -> None:
    with pytest.raises(UsageError, match="strength of no fault"):
        probe(models.build("llama"), {"a": models.tokens(4)}, strength=2.0)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bloom"])
def test_a_model_is_as_it_was_when_the_faults_are_gone(name: str) -> None:
    engine = HFEngine(models.build(name, attn="eager"))
    clean = engine._sample(16)
    for fault in FAULTS:
        try:
            with engine.plant(fault):
                pass
        except UsageError:
            continue
    assert all(torch.equal(a, b) for a, b in zip(clean, engine._sample(16), strict=True))
