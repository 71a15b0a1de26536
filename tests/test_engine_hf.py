"""The Hugging Face engine on many architectures: the taps that each has, clean verdicts, and nothing disturbed."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from driftprobe import probe  # noqa: E402
from driftprobe.engines.base import Tapped  # noqa: E402
from driftprobe.engines.hf import HFEngine  # noqa: E402
from driftprobe.engines.hf.host import to_array  # noqa: E402
from driftprobe.errors import EngineError  # noqa: E402
from driftprobe.judgement import Verdict  # noqa: E402
from driftprobe.plan import Mode, Prompt, make_plan  # noqa: E402

CLEAN = (Verdict.NO_DRIFT, Verdict.STRUCTURAL_DRIFT)
OLD = transformers.__version__[0] == "4" and int(transformers.__version__.split(".")[1]) < 57
FIXED_CACHES = ("gemma2", "gemma3") if OLD else ()
"""Architectures whose own cache is refused; see new_cache."""
KNOWN = [
    name
    for name, a in models.ARCHITECTURES.items()
    if hasattr(transformers, a.config or f"{a.prefix}Config") and name not in (*FIXED_CACHES, *models.STATEFUL)
]
CASES = [(name, kernel) for name in KNOWN for kernel in models.ARCHITECTURES[name].kernels]
PROMPTS = {f"n{length}": models.tokens(length) for length in (1, 16, 33)}

_ATTENTION = "attn_norm q_proj k_proj v_proj q_rope k_rope k_cache v_cache attn_scores attn_probs attn_ctx attn_out"
LLAMA = frozenset(f"embed x_in {_ATTENTION} x_mid ffn_norm mlp_out x_out final_norm logits".split())
ROPE, NORMS = frozenset({"q_rope", "k_rope"}), frozenset({"q_norm", "k_norm"})
EXPERTS = frozenset({"router_logits", "expert_ids"})
TAPS: dict[str, frozenset[str]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | NORMS,
    "gpt2": LLAMA - ROPE,
    "gpt_neox": LLAMA - {"x_mid"},  # the MLP reads the layer's own input
    "gemma2": LLAMA,
    "gemma3": LLAMA | NORMS,
    "mistral": LLAMA,
    "mixtral": LLAMA | EXPERTS,
    "qwen3_moe": LLAMA | NORMS | EXPERTS,
    "smollm3": LLAMA,
    "phi3": LLAMA,
    "bloom": LLAMA - ROPE,
    "mpt": LLAMA - ROPE,
    "opt": LLAMA - ROPE,
    "falcon": LLAMA - {"x_mid", "ffn_norm"},  # one norm for attention and MLP
    "falcon_new": LLAMA - {"x_mid"},
    "stablelm": LLAMA,
    "olmo2": (LLAMA | NORMS) - {"attn_norm", "ffn_norm"},  # its norms stand after attention and MLP
    "cohere": (LLAMA | NORMS) - {"x_mid", "ffn_norm"},
    "gpt_oss": LLAMA | EXPERTS,
    "llama4": LLAMA | {"router_logits"},
    "deepseek_v3": (LLAMA | EXPERTS) - {"k_proj", "v_proj"},  # made from a latent, all rows at once
}
"""From transformers 4.57 on, in every kernel."""
SOME_LAYERS = {
    "deepseek_v3": dict.fromkeys(EXPERTS, (1, 2)),  # the first layer is dense
    "llama4": {"router_logits": (1,)},  # every second layer has experts
    "smollm3": dict.fromkeys(ROPE, (0, 2)),  # layer 1 does not rotate
}


def run_arms(engine: HFEngine, length: int, *names: str) -> dict[str, list[Tapped]]:
    """Return arm -> what it handed out, of a kv_aligned plan over one prompt."""
    prompt = Prompt("p", tuple(models.tokens(length)))
    plan = make_plan(Mode.KV_ALIGNED, prompt, steps=1, seed=0, max_positions=256)
    tokens = (*prompt.token_ids, *engine.greedy(prompt.token_ids, 1), *prompt.token_ids * 40)
    layers = frozenset(range(engine.facts.layers))
    found: dict[str, list[Any]] = {}
    for arm in [arm for arm in plan.arms if arm.name in names]:
        handed_out = list(engine.run(arm, tokens, layers))
        found[arm.name] = [item for item in handed_out if isinstance(item, Tapped)]
    return found


def tap(items: list[Tapped], tensor: str, layer: int | None = None) -> Tapped:
    return next(item for item in items if (item.tensor, item.layer) == (tensor, layer))


@pytest.mark.skipif(OLD, reason="older layouts")
@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_taps_of_each_architecture(name: str, kernel: str) -> None:
    engine = HFEngine(models.build(name, attn=kernel))
    assert set(engine.taps) == TAPS[name]
    everywhere = tuple(range(engine.facts.layers))
    some = SOME_LAYERS.get(name, {})
    assert all(where in ((), some.get(tensor, everywhere)) for tensor, where in engine.taps.items())


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_clean_runs_are_not_mismatches(name: str, kernel: str) -> None:
    ladder = "auto" if kernel == models.ARCHITECTURES[name].kernels[-1] else "off"  # in float64 one kernel is enough
    result = probe(models.build(name, attn=kernel), PROMPTS, mode="kv_aligned", payload="none", ladder=ladder)
    assert result.verdict in CLEAN, result.reason


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [n for n in ("llama", "gemma2", "mistral", "gpt2", "mixtral") if n in KNOWN])
def test_clean_runs_in_other_dtypes(name: str, dtype: str) -> None:
    model = models.build(name, attn=models.ARCHITECTURES[name].kernels[-1], dtype=dtype, seed=1)
    result = probe(model, {"n33": PROMPTS["n33"]}, mode="kv_aligned", steps=2, payload="none", ladder="off")
    assert result.verdict in CLEAN, result.reason


def test_float32_inside_float64_is_declared_and_measured() -> None:
    """Norms and softmax compute in float32 there; here one of them drifts by 4e-7, which float64 cannot explain."""
    assert HFEngine(models.build("llama")).facts.casts == {}
    model = models.build("llama", dtype="float64")
    assert HFEngine(model).facts.casts == {"inside ops": "float32"}
    if "gemma3" in KNOWN:
        result = probe(models.build("gemma3", dtype="float64"), {"n16": PROMPTS["n16"]}, payload="none")
        assert result.verdict in CLEAN, result.reason


def test_plain_weights_are_clean_too() -> None:
    model = models.build("qwen2", attn="sdpa", spread=False)
    result = probe(model, {"n16": PROMPTS["n16"]}, mode="kv_aligned", steps=2, payload="none", ladder="off")
    assert result.verdict in CLEAN, result.reason


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_capture_does_not_disturb(name: str, kernel: str, dtype: str) -> None:
    if OLD and (name, dtype) == ("opt", "float64"):
        pytest.skip("its mask overflows there")
    model = models.build(name, attn=kernel, dtype=dtype)
    engine = HFEngine(model)
    heard = run_arms(engine, 17, "P", "D")
    ids = torch.tensor([models.tokens(17)])
    new = torch.tensor([engine.greedy(models.tokens(17), 1)])
    with torch.no_grad():
        bare_prefill = model(torch.cat([ids, new], dim=1), use_cache=True).logits[0, -1:]
        cache = model(ids, use_cache=True).past_key_values
        bare_decode = model(new, past_key_values=cache, use_cache=True).logits[0, -1:]
    assert tap(heard["P"], "logits").array.tobytes() == to_array(bare_prefill).tobytes()
    assert tap(heard["D"], "logits").array.tobytes() == to_array(bare_decode).tobytes()


def state_of(model: Any) -> tuple[object, ...]:
    """Return what a run could leave behind: hooks, modes, flags, module globals, the registry of kernels."""
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for n, m in model.named_modules()]
    space = sys.modules[type(model).__module__].__dict__
    registry = space.get("ALL_ATTENTION_FUNCTIONS")
    kernels = dict(getattr(registry, "_local_mapping", registry) or {})
    attributes = sorted(key for m in model.modules() for key in vars(m))
    grads = [p.requires_grad for p in model.parameters()]
    stack = getattr(torch.overrides, "_get_current_function_mode_stack", list)
    modes = list(stack())
    return hooks, space.get("eager_attention_forward"), kernels, attributes, grads, modes, torch.is_grad_enabled()


@pytest.mark.parametrize("fault", [None, "attn_scale", "kv_heads_swapped", "v_row_zero"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_everything_is_put_back(kernel: str, fault: str | None) -> None:
    model = models.build("llama", attn=kernel)
    before = state_of(model)
    probe(model, {"a": [5, 6]}, mode="kv_aligned", payload="none", fault=fault)
    assert state_of(model) == before


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_everything_is_put_back_after_a_failure(kernel: str) -> None:
    model = models.build("llama", attn=kernel)
    before, engine = state_of(model), HFEngine(model)
    prompt = Prompt("p", tuple(models.tokens(4)))
    prefill = make_plan(Mode.AS_DESIGNED, prompt, steps=1, seed=0, max_positions=256).arms[0]

    def broken(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("out of memory")

    hook = model.model.layers[1].mlp.register_forward_hook(broken)
    with pytest.raises(EngineError, match="out of memory"):
        list(engine.run(prefill, (*prompt.token_ids, 1), frozenset({0, 1, 2})))
    hook.remove()
    assert state_of(model) == before


def test_a_model_object_is_left_as_it_was() -> None:
    model = models.build("llama", attn="sdpa", attention_dropout=0.5).train().requires_grad_(True)
    model.model.layers[1].eval()  # a part of it frozen
    calls: list[int] = []
    own = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    before = state_of(model)
    result = probe(model, {"a": PROMPTS["n16"]}, mode="kv_aligned", payload="none")
    assert result.verdict in CLEAN, result.reason  # dropout was off while it ran
    assert calls, "the model's own hook was not called"
    assert state_of(model) == before
    assert all(p.grad is None for p in model.parameters())
    own.remove()


def test_a_hook_of_the_model_is_part_of_the_model() -> None:
    model = models.build("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: out * 2)
    heard = run_arms(HFEngine(model), 5, "P")["P"]
    total = tap(heard, "x_mid", 1).array + tap(heard, "mlp_out", 1).array
    np.testing.assert_allclose(total, tap(heard, "x_out", 1).array, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in ("gemma2", "gemma3", "olmo2")])
def test_the_taps_add_up(name: str) -> None:
    """Residual streams are sums of taps, probabilities sum to one, scores of one row do not see the future."""
    engine = HFEngine(models.build(name))
    heard = run_arms(engine, 6, "P")["P"]
    x_in, x_out = tap(heard, "x_in", 1).array, tap(heard, "x_out", 1).array
    parts = x_in + tap(heard, "attn_out", 1).array + tap(heard, "mlp_out", 1).array
    np.testing.assert_allclose(parts, x_out, rtol=1e-4, atol=1e-4 * np.abs(x_out).max())
    sums = tap(heard, "attn_probs", 1).array.sum(axis=-1)
    assert tap(heard, "attn_probs", 1).source == "captured"
    assert sums.max() < 1 + 1e-5
    assert sums.min() < 1 - 1e-5 if name == "gpt_oss" else np.allclose(sums, 1)  # a sink takes its share
    assert tap(heard, "attn_scores", 1).array.shape[-1] == len(tap(heard, "k_cache", 1).array) == 7


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_scores_are_query_times_key(name: str, kernel: str) -> None:
    engine = HFEngine(models.build(name, attn=kernel))
    if "q_rope" not in engine.taps or name in ("gemma2", "gemma3", "deepseek_v3"):
        pytest.skip("no query at hand, a soft cap or a scale of its own")
    heard = run_arms(engine, 6, "D")["D"]
    query, keys = tap(heard, "q_rope", 2).array[0], tap(heard, "k_cache", 2).array
    keys = np.repeat(keys, len(query) // keys.shape[1], axis=1)
    expected = np.einsum("hd,shd->hs", query, keys) / np.sqrt(query.shape[-1])
    found = tap(heard, "attn_scores", 2).array[0]
    shift = found.max(axis=-1) - expected.max(axis=-1) if name == "gpt_oss" else np.zeros(len(query))
    np.testing.assert_allclose(found, expected + shift[:, None], rtol=1e-4, atol=1e-4 * np.abs(expected).max())
