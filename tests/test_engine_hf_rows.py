"""Cache rows: what attention can see, sliding windows, alignment and its read-back, models that make tuples, NaN."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from driftprobe import probe  # noqa: E402
from driftprobe.engines.hf import HFEngine, cache  # noqa: E402
from driftprobe.engines.hf.fused import find_layout, same_bits, split  # noqa: E402
from driftprobe.errors import ModelError  # noqa: E402
from driftprobe.judgement import Verdict  # noqa: E402
from test_engine_hf import CLEAN, KNOWN, run_arms, tap  # noqa: E402

WINDOW = 12
SLIDING = {"mistral": (0, 1, 2), "gemma2": (0, 2), "gemma3": (0, 1, 2), "gpt_oss": (0, 2)}
"""Layers with a window of 12, in the tiny models of three layers."""


@pytest.mark.parametrize("name", [name for name in SLIDING if name in KNOWN])
def test_rows_are_cut_to_the_window(name: str) -> None:
    engine = HFEngine(models.build(name, attn=models.ARCHITECTURES[name].kernels[-1]))
    heard = run_arms(engine, 20, "P", "D", "E7")
    for layer in range(3):
        rows = WINDOW if layer in SLIDING[name] else 21
        for arm, items in heard.items():
            for tensor in ("k_cache", "v_cache"):
                found = tap(items, tensor, layer)
                assert (len(found.array), found.row_start) == (rows, 21 - rows), f"{arm} {tensor} of layer {layer}"
            assert tap(items, "attn_probs", layer).array.shape[-1] == rows
            assert np.isfinite(tap(items, "attn_scores", layer).array).all()


@pytest.mark.parametrize("name", [name for name in ("mistral", "gemma2") if name in KNOWN])
def test_a_token_at_the_edge_of_the_window_is_clean(name: str) -> None:
    prompts = {f"n{n}": models.tokens(n) for n in (WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1)}
    result = probe(models.build(name), prompts, mode="kv_aligned", steps=2, payload="none", ladder="off")
    assert result.verdict in CLEAN, result.reason


@pytest.mark.skipif("llama4" not in KNOWN, reason="no llama4 in this transformers")
def test_rows_are_cut_to_the_chunk() -> None:
    """Token 20 is in the second chunk of 12: layers 0 and 2 see rows 12 to 20, whatever their cache still holds."""
    heard = run_arms(HFEngine(models.build("llama4", attn="sdpa")), 20, "P", "D", "E7")
    for items in heard.values():
        spans = [(len(tap(items, "k_cache", i).array), tap(items, "k_cache", i).row_start) for i in range(3)]
        assert spans == [(9, 12), (21, 0), (9, 12)]
        assert [tap(items, "attn_probs", i).array.shape[-1] for i in range(3)] == [9, 21, 9]
        assert all(np.isfinite(tap(items, "attn_scores", i).array).all() for i in range(3))


@pytest.mark.skipif("llama4" not in KNOWN, reason="no llama4 in this transformers")
def test_a_token_at_the_edge_of_the_chunk_is_clean() -> None:
    prompts = {f"n{n}": models.tokens(n) for n in (WINDOW - 2, WINDOW - 1, WINDOW, 2 * WINDOW - 1, 2 * WINDOW)}
    result = probe(models.build("llama4"), prompts, mode="kv_aligned", steps=2, payload="none", ladder="off")
    assert result.verdict in CLEAN, result.reason


@pytest.mark.parametrize("name", [name for name in ("llama", "mistral", "deepseek_v3", "falcon") if name in KNOWN])
def test_an_aligned_cache_is_read_back(name: str) -> None:
    result = probe(models.build(name, attn="sdpa"), {"a": models.tokens(16)}, mode="kv_aligned", steps=2)
    assert [trace.header.rung for trace in result.traces] == ["", "float64"]
    events = [event for trace in result.traces for event in trace.events if event.event == "cache_readback"]
    assert [event.step for event in events] == [0, 1] * 2
    assert all(event.measured["rows"] > 0 and event.measured["different"] == 0 for event in events)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_rows_of_a_latent_cache_are_the_keys_and_values_made_from_it(kernel: str) -> None:
    if "deepseek_v3" not in KNOWN:
        pytest.skip("no deepseek_v3 in this transformers")
    heard = run_arms(HFEngine(models.build("deepseek_v3", attn=kernel)), 6, "P", "D")
    for items in heard.values():
        assert tap(items, "k_cache", 1).array.shape == (7, 4, 24)
        assert tap(items, "v_cache", 1).array.shape == (7, 4, 16)
        assert (tap(items, "k_rope", 1).array[0] == tap(items, "k_cache", 1).array[-1]).all()


def test_a_cache_that_does_not_keep_what_it_is_given_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    from driftprobe.engines.hf import engine

    honest = engine.stored_rows
    monkeypatch.setattr(
        engine, "stored_rows", lambda cache, layer: tuple(rows.clone() for rows in honest(cache, layer))
    )
    model = models.build("llama", dtype="float32")
    result = probe(
        model, {"a": models.tokens(16)}, mode="kv_aligned", payload="none", fault="cache_shift", ladder="off"
    )
    assert result.verdict is Verdict.NOT_AVAILABLE
    assert "read back" in result.reason


@pytest.mark.parametrize("steps", [1, 3])
def test_a_prompt_of_one_token(steps: int) -> None:
    result = probe(models.build("llama"), {"one": [5]}, mode="both", steps=steps, payload="none", ladder="off")
    assert result.verdict in CLEAN, result.reason
    records = result.traces[0].records
    assert {r.logical_tok_idx for r in records} == set(range(1, steps + 1))
    assert all(r.shape is not None and r.shape[0] == 1 + r.step + 1 for r in records if r.tensor == "k_cache")


@pytest.mark.parametrize("where", ["model.embed_tokens", "model.layers.1.self_attn.v_proj", "lm_head"])
def test_nan_weights_are_a_finding(where: str) -> None:
    model = models.build("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_submodule(where).weight[:, 3] = float("nan")
    result = probe(model, {"a": models.tokens(4)}, mode="kv_aligned", ladder="off")
    assert result.verdict in (Verdict.NOT_AVAILABLE, Verdict.MISMATCH)
    assert "NaN" in result.reason, result.reason


def test_nan_in_decode_alone_is_a_mismatch() -> None:
    model = models.build("llama")
    spoil = lambda _m, args, out: out * float("nan") if args[0].shape[1] == 1 else out  # noqa: E731
    model.model.layers[1].mlp.register_forward_hook(spoil)
    result = probe(model, {"a": models.tokens(4)}, mode="kv_aligned")
    assert result.verdict is Verdict.MISMATCH
    assert result.first_failure is not None
    assert (result.first_failure.tensor, result.first_failure.layer) == ("mlp_out", 1)


def test_a_model_with_a_fixed_cache_of_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 before 4.56: given a growing cache it forgets its window in decode, and the bug would be ours."""
    monkeypatch.setattr(cache, "knows_windows", lambda: False)
    model = models.build("llama")
    model.config.cache_implementation = "hybrid"
    with pytest.raises(ModelError, match=r"4\.56"):
        HFEngine(model)


class Tuples(torch.nn.Module):
    """A model of before the Cache objects: it fails on one, and hands back keys and values in tuples."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.get_input_embeddings = model.get_input_embeddings

    def forward(self, input_ids: Any, position_ids: Any = None, past_key_values: Any = None, **kw: Any) -> Any:
        held = transformers.DynamicCache()
        for layer, (keys, values) in enumerate(past_key_values or ()):
            held.update(keys + 0, values + 0, layer)
        output = self.inner(input_ids, position_ids=position_ids, past_key_values=held, **kw)
        rows = zip(*[iter(_rows(output.past_key_values))] * 2, strict=True)
        return SimpleNamespace(logits=output.logits, past_key_values=tuple(rows))


def _rows(past: Any) -> list[Any]:
    held = cache.opened(past)
    return [rows for layer in range(cache.layer_count(held)) for rows in cache.stored_rows(held, layer)]


@pytest.mark.parametrize("fault", [None, "cache_shift", "k_rows_swapped", "v_row_zero", "rope_plus_one"])
def test_a_model_that_makes_tuples(fault: str | None) -> None:
    from driftprobe.faults import FAULTS

    model = Tuples(models.build("llama"))
    assert set(HFEngine(model).taps) >= {"k_rope", "k_cache", "v_cache", "q_proj"}
    result = probe(model, {"a": models.tokens(7)}, mode="kv_aligned", fault=fault, ladder="off")
    if fault is None:
        assert result.verdict in CLEAN, result.reason
        return
    judged, declared = result.judgement.modes["kv_aligned"].prompts[0], FAULTS[fault]
    assert judged.verdict is Verdict.MISMATCH
    assert judged.first_failure is not None
    found = (judged.first_failure.tensor, judged.first_failure.layer, judged.reading.value)
    assert found == (declared.tensor, declared.layer, declared.reading)


@pytest.mark.parametrize(
    ("layout", "heads", "groups"), [("concatenated", 4, 2), ("per_head", 4, 4), ("per_group", 4, 2)]
)
def test_the_layout_of_a_fused_projection_is_the_one_whose_v_is_cached(layout: str, heads: int, groups: int) -> None:
    fused = torch.randn(1, 3, (heads + 2 * groups) * 8, generator=torch.Generator().manual_seed(0))
    parts = split(layout, fused, heads, groups)
    assert find_layout(fused, parts["v_proj"][0, 2:3], 2, heads, groups) == layout
    assert sum(part.numel() for part in parts.values()) == fused.numel()
    assert find_layout(fused, torch.zeros_like(parts["v_proj"][0, 2:3]), 2, heads, groups) is None


def test_same_bits_knows_nan_and_signed_zero() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(3))
