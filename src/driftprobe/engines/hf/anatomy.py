"""Where the taps of a transformers model are: its modules, found by structure and by the names that models use.

Names are only a first guess. A tap counts when a trial run has seen it fire with tensors that fit (`trial.py`), so
a name that means something else in some architecture costs a tap, never a wrong number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from driftprobe.errors import ModelError

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MIXER = ("mixer", "mamba", "linear_attn", "conv", "temporal_block")
_MIXER_HOLDER = ("mamba_decoder",)
"""A layer inside the layer that holds the mixer (Zamba)."""
_ATTN_NORM = ("input_layernorm", "ln_1", "self_attn_layer_norm", "norm_1", "attention_norm", "ln_attn",
              "operator_norm", "norm")  # fmt: skip
_FFN_NORM = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "final_layer_norm", "norm_2",
             "ffn_norm", "ln_mlp")  # fmt: skip
_MLP = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "moe")
_MLP_FIRST, _MLP_LAST = ("fc1",), ("fc2",)
"""An MLP whose two projections stand in the layer itself (OPT)."""
_MLP_RESULT = ("dense_4h_to_h", "down_proj")
"""The last projection of an MLP that adds the residual too (BLOOM, MPT): its result is what is added."""
_Q, _K, _V = ("q_proj", "wq", "q_b_proj"), ("k_proj", "wk"), ("v_proj", "wv")
_Q_NORM, _K_NORM = ("q_norm", "q_layernorm", "query_layernorm"), ("k_norm", "k_layernorm", "key_layernorm")
_OUT = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_ROUTER = ("gate", "router")
_FINAL_NORM = ("norm", "embedding_norm", "final_layernorm", "ln_f", "final_layer_norm", "norm_f")
_FUSED = ("qkv_proj", "c_attn", "Wqkv", "query_key_value", "kv_b_proj")
"""Projections whose output holds more than one of q, k and v; how, a trial finds out (`fused.py`)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer and the modules of it that carry taps; None where it has no such module."""

    index: int
    module: nn.Module
    attention: nn.Module | None
    attn_norm: nn.Module | None
    q_proj: nn.Module | None
    k_proj: nn.Module | None
    v_proj: nn.Module | None
    fused: nn.Module | None
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    out_proj: nn.Module | None
    ffn_norm: nn.Module | None
    mlp_in: nn.Module | None
    """What the MLP's input goes into."""
    mlp_out: nn.Module | None
    """What the MLP's result comes out of."""
    router: nn.Module | None
    mixer: nn.Module | None = None
    """A state-space, convolution or linear-attention mixer: it keeps states in the cache, and no rows."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The modules of one model that carry taps, and the counts needed to put heads on their own axis."""

    embed: nn.Module | None
    layers: tuple[Layer, ...]
    final_norm: nn.Module | None
    heads: int
    kv_heads: int
    rotary: bool


def dissect(model: Any) -> Anatomy:
    """Return the anatomy of a causal language model. Raises ModelError where no decoder layers are found."""
    refuse_compiled(model)
    config = text_config(model)
    count = int(getattr(config, "num_hidden_layers", 0) or 0)
    parent, stack = _decoder_stack(model, count)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    return Anatomy(
        embed=model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None,
        layers=tuple(_layer(index, module) for index, module in enumerate(stack)),
        final_norm=_child(parent, _FINAL_NORM),
        heads=heads,
        kv_heads=_kv_heads(config) or heads,
        rotary=bool(getattr(config, "rotary_dim", None))
        or any("rotary" in name.rsplit(".", 1)[-1] for name, _ in model.named_modules()),
    )


def refuse_compiled(model: nn.Module) -> None:
    """Raise ModelError for a model that torch.compile has taken in: its modules' hooks no longer fire.

    So too for CUDA graphs that it makes: a replayed graph runs no Python.
    """
    wrapped = ["the model object"] if hasattr(model, "_orig_mod") else []
    inner = [name or "the model" for name, module in model.named_modules() if _is_compiled(module)]
    if wrapped or inner:
        raise ModelError(
            "a compiled model cannot be listened to", where=type(model).__name__,
            measured=f"torch.compile on {', '.join([*wrapped, *inner][:3])}",
            allowed="the model as plain PyTorch modules",
            next_step="probe it before it is compiled (model._orig_mod, or load it anew); to judge the compiled one, "
            "compare traces of your own: docs/engines.md",
        )  # fmt: skip


def _is_compiled(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(forward, "_torchdynamo_orig_callable")


def text_config(model: Any) -> Any:
    """Return the configuration of the language part of a model."""
    config = getattr(model, "config", None)
    return config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config


def _kv_heads(config: Any) -> int:
    """Return the count of key/value heads where the configuration states one; Falcon has its own words for it."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    names = ("num_key_value_heads", "num_kv_heads")
    return next((int(count) for name in names if (count := getattr(config, name, None))), 0)


def _decoder_stack(model: nn.Module, count: int) -> tuple[nn.Module, nn.ModuleList]:
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count > 0:
                return module, child
    raise ModelError(
        "no decoder layers found", where=type(model).__name__,
        measured=f"no list of {count} modules (config.num_hidden_layers)",
        allowed="a causal language model whose layers stand in one nn.ModuleList",
        next_step="hand over the causal language model itself, not a wrapper",
    )  # fmt: skip


def _layer(index: int, module: nn.Module) -> Layer:
    attention = _child(module, _ATTENTION)
    inner = _child(attention, _ATTENTION) if attention is not None else None
    core = inner if inner is not None else attention
    mlp = _child(module, _MLP)
    result = _child(mlp, _MLP_RESULT) if _adds_residual(mlp) else None
    return Layer(
        index=index,
        module=module,
        attention=core,
        attn_norm=_child(module, _ATTN_NORM),
        q_proj=_child(core, _Q),
        k_proj=_child(core, _K),
        v_proj=_child(core, _V),
        fused=_child(core, _FUSED),
        q_norm=_child(core, _Q_NORM),
        k_norm=_child(core, _K_NORM),
        out_proj=_child(core, _OUT),
        ffn_norm=_child(module, _FFN_NORM),
        mlp_in=mlp if mlp is not None else _child(module, _MLP_FIRST),
        mlp_out=result if result is not None else mlp if mlp is not None else _child(module, _MLP_LAST),
        router=_child(mlp, _ROUTER),
        mixer=_mixer(module),
    )


def _adds_residual(mlp: nn.Module | None) -> bool:
    return mlp is not None and "residual" in inspect.signature(mlp.forward).parameters


def _mixer(layer: nn.Module) -> nn.Module | None:
    """Return the module that keeps states: one with a convolution of its own, which no attention has."""
    found = _child(layer, _MIXER) or _child(_child(layer, _MIXER_HOLDER), _MIXER)
    convolves = found is not None and any(isinstance(child, nn.Conv1d) for child in found.modules())
    return found if convolves else None


def _child(module: nn.Module | None, names: Iterable[str]) -> nn.Module | None:
    if module is None:
        return None
    found = (getattr(module, name, None) for name in names)
    return next((child for child in found if isinstance(child, nn.Module)), None)
