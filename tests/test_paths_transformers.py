"""probe_paths on transformers models: chunks, generate, padded batches, a second prompt; attention and other mixers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from driftprobe import Verdict, probe_paths  # noqa: E402
from models import VOCABULARY, build, tokens  # noqa: E402

IDS = tokens(14)
PASSED = {Verdict.NO_DRIFT, Verdict.STRUCTURAL_DRIFT}
Path = Callable[[Any], Any]


def whole(model: Any) -> None:
    model(torch.tensor([IDS]), use_cache=False)


def cached(*cuts: int) -> Path:
    """Feed the text in pieces on one cache."""

    def run(model: Any) -> None:
        cache = None
        for start, stop in pairwise(cuts):
            cache = model(torch.tensor([IDS[start:stop]]), past_key_values=cache, use_cache=True).past_key_values

    return run


chunked = cached(0, 5, 10, 14)


def generating(use_cache: bool) -> Path:
    def run(model: Any) -> None:
        ids = torch.tensor([IDS[:9]])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False,
                       use_cache=use_cache)  # fmt: skip

    return run


def padded(side: str, *, positions: bool = True) -> Path:
    """The text with two tokens of padding, beside a shorter one."""

    def run(model: Any) -> None:
        rows = [IDS[3:9], IDS]
        width = len(IDS) + 2
        gaps = [[0] * (width - len(row)) for row in rows]
        left = side == "left"
        ids = torch.tensor([gap + row if left else row + gap for gap, row in zip(gaps, rows, strict=True)])
        mask = (ids != 0).long()
        more = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions else {}
        model(ids, attention_mask=mask, use_cache=False, **more)

    return run


def second_prompt(kept: int) -> Path:
    """Another text first; then `kept` of its rows stay (six are shared) and ours goes on behind them."""

    def run(model: Any) -> None:
        cache = model(torch.tensor([[*IDS[:6], 5, 6, 7, 8]]), use_cache=True).past_key_values
        try:
            cache.crop(kept)
        except ValueError:  # newer versions are told how many rows go
            cache.crop(kept - cache.get_seq_length())
        for start, stop in pairwise((6, 10, 11, 12, 13, 14)):
            model(torch.tensor([IDS[start:stop]]), past_key_values=cache, use_cache=True)

    return run


CLEAN = {
    "chunked": (whole, chunked),
    "generate": (generating(False), generating(True)),
    "left": (whole, padded("left")),
    "right": (whole, padded("right")),
    "second": (whole, second_prompt(6)),
}


@pytest.mark.parametrize(("architecture", "dtype", "case"), [
    ("llama", "float32", "chunked"), ("llama", "bfloat16", "generate"), ("llama", "float32", "left"),
    ("llama", "bfloat16", "left"), ("llama", "float32", "second"), ("gpt2", "float32", "right"),
    ("gpt2", "bfloat16", "second"), ("gpt2", "float32", "generate"), ("gemma2", "float32", "chunked"),
    ("mixtral", "float32", "chunked"), ("mixtral", "bfloat16", "left"), ("bloom", "float32", "chunked"),
])  # fmt: skip
def test_equal_paths_pass(architecture: str, dtype: str, case: str) -> None:
    reference, candidate = CLEAN[case]
    result = probe_paths(build(architecture, dtype=dtype), reference=reference, candidate=candidate, ladder="off")
    assert result.verdict in PASSED, result.reason
    assert result.traces[0].events[0].measured["common"] >= 13
    assert {"embed", "x_in", "attn_norm", "attn_out", "x_out", "logits"} <= set(result.traces[0].header.taps)


@pytest.mark.parametrize(("architecture", "tensor"), [("llama", "model.rotary_emb"), ("gpt2", "transformer.wpe")])
def test_wrong_positions_in_a_padded_batch(architecture: str, tensor: str) -> None:
    result = probe_paths(build(architecture), reference=whole, candidate=padded("left", positions=False), ladder="off")
    failure = result.first_failure
    assert failure is not None, result.reason
    assert (failure.tensor, failure.position) == (tensor, 0)


@pytest.mark.parametrize("turned", [False, True], ids=["candidate", "reference"])
def test_a_cache_cropped_by_one_too_few(turned: bool) -> None:
    paths = [whole, second_prompt(7)][:: -1 if turned else 1]
    result = probe_paths(build("gpt2"), reference=paths[0], candidate=paths[1], ladder="off")
    failure = result.first_failure
    if turned:  # the reference's own cache then says where its tokens stand, and nothing else was ever there
        assert result.verdict is not Verdict.NO_DRIFT and result.verdict is not Verdict.STRUCTURAL_DRIFT
        return
    assert failure is not None, result.reason
    assert (failure.tensor, failure.position) == ("transformer.wpe", 6)
    assert result.traces[0].events[0].measured["moved"] > 0


def hooked(module: Callable[[Any], Any], change: Callable[[Any], Any], first: int) -> Path:
    """The chunked path with a module's output changed in calls of fewer tokens than `first`."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        if value.numel() // value.shape[-1] >= first:
            return output
        return (change(value), *output[1:]) if isinstance(output, tuple) else change(value)

    def run(model: Any) -> None:
        handle = module(model).register_forward_hook(hook)
        try:
            cached(0, 9, 10, 11, 12, 13, 14)(model)
        finally:
            handle.remove()

    return run


@pytest.mark.parametrize("turned", [False, True], ids=["candidate", "reference"])
@pytest.mark.parametrize(("architecture", "module", "tap"), [
    ("llama", lambda m: m.model.layers[1].mlp.down_proj, (1, "mlp.down_proj")),
    ("llama", lambda m: m.model.layers[2].self_attn.q_proj, (2, "q_proj")),
    ("mixtral", lambda m: m.model.layers[1].mlp.experts, (1, "mlp.experts")),
])  # fmt: skip
def test_a_kernel_that_is_wrong_for_one_token(architecture: str, module: Any, tap: Any, turned: bool) -> None:
    model = build(architecture)
    try:
        module(model)
    except AttributeError:
        pytest.skip("named otherwise in this version")
    paths = [whole, hooked(module, lambda value: value * 1.001, 2)][:: -1 if turned else 1]
    result = probe_paths(model, reference=paths[0], candidate=paths[1], ladder="off")
    failure = result.first_failure
    assert failure is not None, result.reason
    assert ((failure.layer, failure.tensor), failure.position) == (tap, 9)


_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
              "max_position_embeddings": 256}  # fmt: skip
_OTHERS: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 8},
    "FalconMamba": {"state_size": 8},
    "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "Lfm2": {**_ATTENTION, "layer_types": ["conv", "full_attention", "conv"]},
    "Qwen3Next": {**_ATTENTION, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * 2,
                  "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                  "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
    "RecurrentGemma": {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 96, "lru_width": 64,
                       "attention_window_size": 16, "block_types": ["recurrent", "recurrent", "attention"]},
}  # fmt: skip


def other(name: str, dtype: str) -> Any:
    kinds = [getattr(transformers, f"{name}{end}", None) for end in ("Config", "ForCausalLM")]
    if None in kinds:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    return kinds[1](kinds[0](**{**_SIZES, **_OTHERS[name]})).to(getattr(torch, dtype)).eval()


def stepping(model: Any) -> None:
    """A prefill, then token by token on the state that the model keeps or hands back."""
    name = "cache_params" if "mamba" in model.config.model_type else "past_key_values"
    state = None
    for start, stop in pairwise((0, 9, 10, 11, 12, 13, 14)):
        span = torch.arange(start, stop)
        more: dict[str, Any] = {"cache_position": span} if "mamba" in model.config.model_type else {}
        if model.config.model_type == "recurrent_gemma":
            more = {"cache_position": span, "position_ids": span[None]}
        if state is not None:
            more[name] = state
        state = getattr(model(torch.tensor([IDS[start:stop]]), use_cache=True, **more), name, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", _OTHERS)
def test_mixers_that_are_no_attention(name: str, dtype: str) -> None:
    model = other(name, dtype)
    result = probe_paths(model, reference=whole, candidate=stepping, ladder="off")
    assert result.traces[0].events[0].measured["compared"] == len(IDS)
    assert {"embed", "x_in", "x_out", "logits"} <= set(result.traces[0].header.taps)
    if name == "RecurrentGemma" and not agrees(model):  # so it is in transformers 5.23: told without us
        assert result.verdict is Verdict.MISMATCH
        return
    assert result.verdict in PASSED, result.reason


def agrees(model: Any) -> bool:
    """Whether the step behind a prefill gives the logits of the whole text, measured by hand."""
    with torch.no_grad():
        expected = model(torch.tensor([IDS[:10]]), use_cache=False).logits[0, -1]
        for start, stop in ((0, 9), (9, 10)):
            span = torch.arange(start, stop)[None]
            found = model(torch.tensor([IDS[start:stop]]), use_cache=True, position_ids=span).logits[0, -1]
    return bool((found - expected).norm() < 0.05 * expected.norm())


def test_a_state_that_a_step_does_not_get_is_found_in_the_mixer() -> None:
    """RecurrentGemma resets its state where a position id is 0, as a step without position ids has it."""
    model = other("RecurrentGemma", "float32")

    def forgetting(model: Any) -> None:
        for start, stop in pairwise((0, 9, 10, 11)):
            span = torch.arange(start, stop)
            model(torch.tensor([IDS[start:stop]]), use_cache=True, cache_position=span,
                  position_ids=(span if start == 0 else span * 0)[None])  # fmt: skip

    result = probe_paths(model, reference=whole, candidate=forgetting, ladder="off")
    failure = result.first_failure
    assert failure is not None, result.reason
    assert (failure.layer, failure.tensor, failure.position) == (0, "temporal_block.rg_lru", 9)


def test_the_ladder_is_climbed_and_agrees() -> None:
    result = probe_paths(build("llama", dtype="bfloat16"), reference=whole, candidate=chunked, positions=6)
    ladder = result.judgement.ladders[0]
    assert result.verdict in PASSED and ladder.rung == "float64"
    assert ladder.judged.verdict in PASSED
    drifts = [cell.drift.value for cell in ladder.judged.cells if cell.drift.value]
    assert max(drifts, default=0.0) < 1e-12  # some machines compute both bit for bit alike


def test_the_ladder_tells_a_fault_under_the_floor_of_bfloat16() -> None:
    """A thousandth of a projection is less than bfloat16 rounds; in float64 it stands alone."""
    wrong = hooked(lambda m: m.model.layers[1].mlp.down_proj, lambda value: value * 1.0003, 2)
    result = probe_paths(build("llama", dtype="bfloat16"), reference=whole, candidate=wrong)
    failure = result.first_failure
    assert failure is not None, result.reason
    assert (failure.layer, failure.tensor, failure.position, failure.rung) == (1, "mlp.down_proj", 9, "float64")
