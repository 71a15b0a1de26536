"""Tiny models of many architectures, from configurations and a fixed seed: no weights are downloaded.

`spread` weights (standard deviation 0.2) give attention scores that differ from key to key, so that masks, positions
and head mappings matter; `plain` weights are what transformers draws by default, and give nearly uniform attention.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

SPREAD = 0.2
VOCABULARY = 160
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


_NO_GQA = ("intermediate_size", "num_key_value_heads")
_NO_ATTENTION = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12}


@dataclass(frozen=True)
class Architecture:
    """One architecture: its classes in transformers and what its tiny configuration says beside the common sizes."""

    prefix: str
    """`Llama` for LlamaConfig and LlamaForCausalLM."""
    own: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    """Common settings that this configuration does not know."""
    kernels: tuple[str, ...] = ("eager", "sdpa")
    head: str = "ForCausalLM"
    """How its causal language model is called after the prefix."""
    config: str = ""
    """The name of its configuration, where that is not the prefix and Config."""


def _moe(**own: Any) -> dict[str, Any]:
    return {"num_experts_per_tok": 2, **own}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("Llama"),
    "qwen2": Architecture("Qwen2"),
    "qwen3": Architecture("Qwen3", {"head_dim": 24}),
    "gpt2": Architecture("GPT2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}, tuple(_SIZES)[1:7],
                         head="LMHeadModel"),
    "gpt_neox": Architecture("GPTNeoX", {"rotary_pct": 0.5}, ("num_key_value_heads",)),
    "gemma2": Architecture("Gemma2", _GEMMA, (), ("eager",)),
    "mistral": Architecture("Mistral", {"sliding_window": 12}),
    "mixtral": Architecture("Mixtral", _moe(num_local_experts=4)),
    "qwen3_moe": Architecture("Qwen3Moe", _moe(num_experts=4, head_dim=16, moe_intermediate_size=48)),
    "smollm3": Architecture("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "phi3": Architecture("Phi3", {"num_hidden_layers": 4}),
    "bloom": Architecture("Bloom", {"n_layer": 3, "n_head": 4}, tuple(_SIZES)[2:7], ("eager",)),
    "opt": Architecture("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}, _NO_GQA),
    "falcon": Architecture("Falcon", {"multi_query": True, "alibi": False}, _NO_GQA),
    "falcon_new": Architecture("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
                               _NO_GQA),
    "stablelm": Architecture("StableLm", {"use_qkv_bias": True}),
    "olmo2": Architecture("Olmo2"),
    "cohere": Architecture("Cohere", {"use_qk_norm": True}),
    "gpt_oss": Architecture("GptOss", _moe(num_local_experts=4, head_dim=16, sliding_window=12), (), ("eager",)),
    "gemma3": Architecture("Gemma3", _GEMMA,
                           config="Gemma3TextConfig"),
    "deepseek_v3": Architecture("DeepseekV3", _moe(
        n_routed_experts=4, n_group=2, topk_group=1, n_shared_experts=1, moe_intermediate_size=48, kv_lora_rank=16,
        q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=1,
        num_key_value_heads=4)),
    "llama4": Architecture("Llama4", _moe(
        attention_chunk_size=12, num_local_experts=4, head_dim=16, intermediate_size_mlp=96, num_experts_per_tok=1,
        interleave_moe_layer_step=2, layer_types=["chunked_attention", "full_attention", "chunked_attention"]),
        config="Llama4TextConfig"),
    "mamba": Architecture("Mamba", {"state_size": 8, "num_hidden_layers": 3}, _NO_ATTENTION, ("eager",)),
    "mamba2": Architecture("Mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 16, "expand": 2,
                                      "n_groups": 2, "chunk_size": 16}, _NO_ATTENTION, ("eager",)),
    "falcon_mamba": Architecture("FalconMamba", {"state_size": 8}, _NO_ATTENTION, ("eager",)),
    "lfm2": Architecture("Lfm2", {"layer_types": ["conv", "full_attention", "conv"],
                                  "block_auto_adjust_ff_dim": False}),
    "jamba": Architecture("Jamba", _moe(num_experts=4, attn_layer_period=3, attn_layer_offset=1, mamba_d_state=8,
                                        expert_layer_period=2, expert_layer_offset=1)),
    "bamba": Architecture("Bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16,
                                    "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16}),
    "falcon_h1": Architecture("FalconH1", {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128,
                                           "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16}),
    "qwen3_next": Architecture("Qwen3Next", _moe(
        num_experts=4, head_dim=16, moe_intermediate_size=48, shared_expert_intermediate_size=48,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"])),
    "zamba2": Architecture("Zamba2", {"layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 8,
                                      "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 2, "chunk_size": 16,
                                      "num_mem_blocks": 1, "time_step_min": 1e-30, "num_key_value_heads": 4}),
}  # fmt: skip


STATEFUL: tuple[str, ...] = tuple(ARCHITECTURES)[tuple(ARCHITECTURES).index("mamba") :]
"""Architectures with layers that keep states in place of rows; they are driven under transformers 5 only.

Zamba 2 clamps its time step from below in a prefill and not in a decode step (transformers 5.23): a bound near zero
takes the difference away.
"""


def configuration(name: str, **changes: Any) -> Any:
    """Return a tiny configuration of an architecture. Raises AttributeError where this transformers lacks it."""
    transformers = importlib.import_module("transformers")
    architecture = ARCHITECTURES[name]
    kind = getattr(transformers, architecture.config or f"{architecture.prefix}Config")
    settings = {key: value for key, value in _SIZES.items() if key not in architecture.drop}
    return kind(**{**settings, **architecture.own, **changes})


def build(
    name: str, *, attn: str = "eager", dtype: str = "float32", spread: bool = True, seed: int = 0, **changes: Any
) -> Any:
    """Return a tiny model in evaluation mode: an architecture, a kernel, a dtype, weights drawn from a seed."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    config = configuration(name, **changes)
    config._attn_implementation = attn
    if dtype == "float64":
        config._experts_implementation = "eager"  # grouped expert matmuls know no float64
    torch.manual_seed(seed)
    model = getattr(transformers, f"{ARCHITECTURES[name].prefix}{ARCHITECTURES[name].head}")(config)
    if spread:
        _draw(model, torch)
    return model.to(getattr(torch, dtype)).eval()


def _draw(model: Any, torch: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, SPREAD)
            else:
                parameter.add_(torch.randn_like(parameter) * SPREAD)
        model.tie_weights()


def tokens(count: int, seed: int = 0) -> list[int]:
    """Return token ids drawn from a seed, none of them 0."""
    torch = importlib.import_module("torch")
    generator = torch.Generator().manual_seed(seed + 1)
    return [int(i) for i in torch.randint(1, VOCABULARY, (count,), generator=generator)]
