"""Planted faults: each is found with its verdict, its first tap and its reading, or says that it cannot act."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from driftprobe import probe  # noqa: E402
from driftprobe.engines.hf import HFEngine, open_engine  # noqa: E402
from driftprobe.errors import UsageError  # noqa: E402
from driftprobe.faults import FAULTS, Fault  # noqa: E402
from driftprobe.result import Result  # noqa: E402
from test_engine_hf import CLEAN, KNOWN, OLD  # noqa: E402

TEXTS = {"n1": b"H", "n2": b"Hi", "n16": b"def main(argv):\n", "n32": b"A decoder reads a prompt in one."}
PROMPTS = {name: list(text) for name, text in TEXTS.items()}
BROAD = [FAULTS[name] for name in (
    "rope_plus_one", "cache_shift", "k_rows_swapped", "v_row_zero", "kv_heads_swapped", "attn_scale",
    "oldest_key_masked", "other_layer_cache", "norm_epsilon", "wrong_token",
)]  # fmt: skip
"""One fault or more of every kind, run broadly; each fault has its own tests beside those of its family."""
OTHERS = [
    name for name in ("qwen3", "gpt_neox", "gemma3", "phi3") if name in KNOWN and not (OLD and name == "gpt_neox")
]


def check(result: Result, fault: Fault) -> None:
    """Assert that every prompt of every mode found what a fault declares."""
    for mode in result.judgement.modes.values():
        for judged in mode.prompts:
            where = f"{fault.name} {mode.mode} {judged.prompt}: {judged.reason}"
            assert judged.verdict.value == fault.verdict, where
            first = judged.first_failure
            if fault.verdict == "MISMATCH":
                assert first is not None, where
                assert (first.tensor, first.layer) == (fault.tensor, fault.layer), where
            if mode.mode == "kv_aligned":
                assert judged.reading.value == fault.reading, where


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("fault", BROAD, ids=lambda fault: fault.name)
def test_the_builtin_model_tells_every_fault(fault: Fault, kernel: str) -> None:
    """Whole in one kernel; the other one's own is the decode computation, which mode kv_aligned has too."""
    lengths, mode = (("n1", "n16"), "both") if kernel == "sdpa" else (("n16",), "kv_aligned")
    prompts = {name: PROMPTS[name] for name in lengths if len(PROMPTS[name]) >= fault.min_prompt}
    check(probe("builtin:tiny", prompts, mode=mode, attn=kernel, fault=fault.name, ladder="off"), fault)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_builtin_model_without_a_fault(kernel: str) -> None:
    ladder = "on" if kernel == "sdpa" else "off"
    result = probe("builtin:tiny", PROMPTS, mode="kv_aligned", attn=kernel, steps=2, payload="none", ladder=ladder)
    assert result.verdict in CLEAN, result.reason


@pytest.mark.parametrize("fault", BROAD, ids=lambda fault: fault.name)
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_tell_every_fault(name: str, fault: Fault) -> None:
    model = models.build(name, attn="sdpa", seed=2)
    check(probe(model, {"n9": models.tokens(9)}, mode="kv_aligned", fault=fault.name, ladder="off"), fault)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fault", ["rope_plus_one", "cache_shift", "kv_heads_swapped", "oldest_key_masked"])
def test_coarse_dtypes_tell_coarse_faults(fault: str, dtype: str) -> None:
    result = probe("builtin:tiny", {"n16": PROMPTS["n16"]}, mode="kv_aligned", dtype=dtype, fault=fault)
    check(result, FAULTS[fault])


@pytest.mark.parametrize("fault", ["rope_plus_one", "attn_scale", "cache_shift"])
def test_faults_are_found_in_later_steps_as_well(fault: str) -> None:
    result = probe("builtin:tiny", {"n16": PROMPTS["n16"]}, mode="kv_aligned", steps=3, fault=fault, ladder="off")
    check(result, FAULTS[fault])


@pytest.mark.parametrize(
    ("name", "fault", "why"),
    [
        ("gpt2", "rope_plus_one", "no rotary embedding"),
        ("bloom", "rope_plus_one", "no rotary embedding"),
        ("falcon", "kv_heads_swapped", "1 KV heads"),
        ("deepseek_v3", "v_row_zero", "latents"),
    ],
)
def test_a_fault_that_cannot_act_says_so(name: str, fault: str, why: str) -> None:
    if name not in KNOWN:
        pytest.skip(f"no {name} in this transformers")
    with pytest.raises(UsageError, match=why):
        probe(models.build(name), {"a": models.tokens(4)}, fault=fault)


def test_a_fault_that_changes_nothing_says_so() -> None:
    model = models.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()  # every score is 0, whatever its scale
    with pytest.raises(UsageError, match="not one bit"):
        probe(model, {"a": models.tokens(4)}, fault="attn_scale")


def test_a_prompt_too_short_for_a_fault_says_so() -> None:
    with pytest.raises(UsageError, match="2 tokens or more"):
        probe("builtin:tiny", {"n1": [72]}, fault="k_rows_swapped")


@pytest.mark.parametrize("fault", ["oldest_key_masked", "v_row_zero"])
def test_a_row_outside_the_window_cannot_be_missed(fault: str) -> None:
    model = models.build("mistral")
    check(
        probe(model, {"n11": models.tokens(11)}, mode="kv_aligned", steps=3, fault=fault, ladder="off"), FAULTS[fault]
    )
    if fault == "oldest_key_masked" or not hasattr(transformers, "Gemma3Config"):  # old caches keep every row
        with pytest.raises(UsageError, match="window of 12"):
            probe(model, {"n12": models.tokens(12)}, mode="kv_aligned", fault=fault)


def test_layers_of_other_shapes_cannot_swap_caches() -> None:
    if "gemma2" not in KNOWN:
        pytest.skip("no gemma2 in this transformers")
    with pytest.raises(UsageError, match="caches of one shape"):
        probe(models.build("gemma2"), {"a": models.tokens(20)}, fault="other_layer_cache")


def test_a_fault_is_gone_when_its_context_ends() -> None:
    engine = open_engine()
    clean = engine._sample()
    with engine.plant("norm_epsilon"):
        pass
    assert all(torch.equal(a, b) for a, b in zip(clean, engine._sample(), strict=True))


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown fault"), HFEngine(models.build("llama")).plant("gremlin"):
        pass
