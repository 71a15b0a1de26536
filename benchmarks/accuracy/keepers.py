"""How the benign variations are made: contexts on an engine, or another way to make a plan's calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy import kernels
from driftprobe.engines.hf import attention as hf_attention
from driftprobe.errors import EngineError, UsageError
from driftprobe.plan import Pass, Plan

Tensor = torch.Tensor
Keeper = Callable[[Any], AbstractContextManager[None]]
"""Keeps a variation in an engine while the context lasts."""


def cannot_vary(name: str, measured: str, allowed: str) -> UsageError:
    """Return the error that says why a variation cannot be made in a model."""
    return UsageError("the variation cannot act here", where=name, measured=measured, allowed=allowed,
                      next_step="leave this case out")  # fmt: skip


# --- attention ---------------------------------------------------------------------------------------------------

_SPECIAL = ("attn_logit_softcapping", "sinks")


def attention(name: str, kernel: kernels.Kernel, casts: dict[str, str] | None = None, *, plain: bool = False) -> Keeper:
    """Return a variation that computes one-token calls on filled caches with another kernel.

    A `plain` kernel knows no soft-cap of the scores and no sinks.
    """

    @contextmanager
    def keep(engine: Any) -> Iterator[None]:
        functions = list(attention_functions(engine))
        if not functions:
            raise cannot_vary(name, "attention that is computed inside its module", "a model that calls a function")
        special = [
            n for layer in engine.anatomy.layers for n in _SPECIAL if getattr(layer.attention, n, None) is not None
        ]
        if plain and special:
            raise cannot_vary(name, f"attention with {special[0]}", "attention without soft-cap and sinks")
        with ExitStack() as stack:
            for mapping, key in functions:
                stack.enter_context(hf_attention.replaced(mapping, key, _in_decode(mapping[key], kernel)))
            stack.enter_context(declared(engine, casts or {}))
            if plain:
                _try(name, engine)
            yield

    return keep


def _try(name: str, engine: Any) -> None:
    """Raise where torch has no such kernel for a model's heads: K and V of different sizes, say."""
    try:
        engine.greedy(list(range(1, 6)), 2)
    except EngineError as error:
        raise cannot_vary(name, error.measured[:120], "heads that torch has this kernel for") from error


def attention_functions(engine: Any) -> Iterator[tuple[Any, str]]:
    """Yield where the attention functions of a model's layers are looked up: a mapping and a name in it."""
    return hf_attention.attention_functions(
        layer.attention for layer in engine.anatomy.layers if layer.attention is not None
    )


def _in_decode(function: Callable[..., Any], kernel: kernels.Kernel) -> Callable[..., Any]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        *args: Any, **kw: Any,
    ) -> Any:  # fmt: skip
        if query.shape[2] > 1 or key.shape[2] == 1:
            return function(module, query, key, value, attention_mask, *args, **kw)
        scale = kw.get("scaling")
        given = kernels.prepare(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scale is None else scale,
                                kw.get("softcap"), kw.get("s_aux"))  # fmt: skip
        return kernel(given), None

    return attention


@contextmanager
def declared(engine: Any, casts: dict[str, str]) -> Iterator[None]:
    """Declare casts for an engine, as its maker would, while the context lasts."""
    before = engine._declared
    engine._declared = {**before, **casts}
    try:
        yield
    finally:
        engine._declared = before


# --- the cache ---------------------------------------------------------------------------------------------------


def rounded_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return what brings rows to a dtype and back to their own."""
    return lambda rows: rows.to(dtype).to(rows.dtype)


def to_fp8(rows_BGSD: Tensor) -> Tensor:
    """float8 e4m3 with one scale for each row and head, which brings the largest element to the largest number."""
    dtype = torch.float8_e4m3fn
    scale = rows_BGSD.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / torch.finfo(dtype).max
    return rounded_to(dtype)(rows_BGSD / scale) * scale


def to_int8(rows_BGSD: Tensor) -> Tensor:
    """Symmetric int8 with one scale for each row and head, as KV cache quantisation commonly has it."""
    scale = rows_BGSD.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    return (rows_BGSD / scale).round().clamp(-127, 127) * scale


def coarse_cache(name: str, dtype: str, rounded: Callable[[Tensor], Tensor]) -> Keeper:
    """Return a cache that keeps its rows coarsely: a prefill attends to what it computed, decode to what is kept."""

    @contextmanager
    def keep(engine: Any) -> Iterator[None]:
        plain = engine.make_cache

        def made() -> Any:
            cache = plain()
            if not hasattr(cache, "update"):
                raise cannot_vary(name, "a cache that is kept in tuples", "a Cache object")
            kind = type(cache)

            def update(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> Any:
                stored = kind.update(self, rounded(key_states), rounded(value_states), *args, **kw)
                fresh = (key_states, value_states)
                alone = all(mine.shape == new.shape for mine, new in zip(stored, fresh, strict=True))
                return fresh if alone else stored

            cache.__class__ = type(f"Coarse{kind.__name__}", (kind,), {"update": update})
            return cache

        with _attribute(engine, "make_cache", made), declared(engine, {"k_cache": dtype, "v_cache": dtype}):
            yield

    return keep


@contextmanager
def static_cache(engine: Any) -> Iterator[None]:
    """Keep K and V in a cache of fixed size, 128 rows. Raises UsageError where a layer has a sliding window."""
    from transformers import StaticCache

    from driftprobe.engines.hf.attention import sliding_window

    windows = [sliding_window(layer.attention, layer.index) for layer in engine.anatomy.layers]
    if any(windows) or not hasattr(engine.make_cache(), "update"):
        raise cannot_vary("static_cache", f"windows {windows}", "a Cache object, no sliding window")

    def made() -> Any:
        return StaticCache(config=engine.model.config, max_cache_len=128)

    with _attribute(engine, "make_cache", made):
        yield


@contextmanager
def _attribute(thing: Any, name: str, value: object) -> Iterator[None]:
    own = vars(thing)
    before, had = own.get(name), name in own
    setattr(thing, name, value)
    try:
        yield
    finally:
        if had:
            setattr(thing, name, before)
        else:
            delattr(thing, name)


# --- projections -------------------------------------------------------------------------------------------------

Forward = Callable[[Tensor], Tensor]


@contextmanager
def _in_decode_calls(modules: list[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Compute some modules in another way wherever they are given one token."""
    with ExitStack() as stack:
        for module, other in modules:
            plain = module.forward

            def forward(hidden: Tensor, plain: Any = plain, other: Forward = other) -> Any:
                one = hidden.dim() >= 2 and hidden.numel() == hidden.shape[-1]
                return other(hidden) if one else plain(hidden)

            stack.enter_context(_attribute(module, "forward", forward))
        yield


@contextmanager
def fused_qkv(engine: Any) -> Iterator[None]:
    """Compute q, k and v of one token in one product. Raises UsageError where they are not three plain projections."""
    modules: list[tuple[nn.Module, Forward]] = []
    for layer in engine.anatomy.layers:
        parts = (layer.q_proj, layer.k_proj, layer.v_proj)
        if not all(type(part) is nn.Linear for part in parts):
            continue
        low = 0
        for part in parts:
            high = low + part.weight.shape[0]
            modules.append((part, partial(_sliced, parts, low, high)))
            low = high
    if not modules:
        raise cannot_vary("fused_qkv", "no three plain projections", "a model with q, k and v apart")
    with _in_decode_calls(modules):
        yield


def _sliced(parts: tuple[Any, ...], low: int, high: int, hidden: Tensor) -> Tensor:
    weight = torch.cat([part.weight for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    return nn.functional.linear(hidden, weight, bias)[..., low:high]


@contextmanager
def split_qkv(engine: Any) -> Iterator[None]:
    """Compute one token's fused projection in three. Raises UsageError where there is none."""
    found = [layer.fused for layer in engine.anatomy.layers if layer.fused is not None]
    modules = [(module, partial(_in_thirds, module)) for module in found if type(module) is nn.Linear]
    if not modules:
        raise cannot_vary("split_qkv", "no fused projection", "a model with q, k and v in one matrix")
    with _in_decode_calls(modules):
        yield


def _in_thirds(module: Any, hidden: Tensor) -> Tensor:
    biases = [None] * 3 if module.bias is None else module.bias.chunk(3)
    parts = [nn.functional.linear(hidden, w, b) for w, b in zip(module.weight.chunk(3), biases, strict=True)]
    return torch.cat(parts, dim=-1)


@contextmanager
def transposed_weights(engine: Any) -> Iterator[None]:
    """Multiply one token with weights laid out the other way. Raises UsageError without a linear module."""
    modules = [m for m in engine.model.modules() if type(m) is nn.Linear and m.weight.dim() == 2]
    if not modules:
        raise cannot_vary("transposed_weights", "no plain linear module", "a model of linear modules")
    with _in_decode_calls([(module, partial(_transposed, module)) for module in modules]):
        yield


def _transposed(module: Any, hidden: Tensor) -> Tensor:
    product = hidden @ module.weight.t().contiguous()
    return product if module.bias is None else product + module.bias


def _batched(module: Any, hidden: Tensor) -> Tensor:
    """The product of a batch of two; the other row is another token's."""
    return nn.functional.linear(torch.cat([hidden, hidden.roll(1, -1)]), module.weight, module.bias)[: len(hidden)]


def batch(name: str, *, left: bool) -> Keeper:
    """Return a decode step whose products are those of a batch of two, padded on one side: the row that we read."""

    @contextmanager
    def keep(engine: Any) -> Iterator[None]:
        modules = [m for m in engine.model.modules() if type(m) is nn.Linear and m.weight.dim() == 2]
        with ExitStack() as stack:
            stack.enter_context(attention(name, kernels.padded(5, left=left))(engine))
            stack.enter_context(_in_decode_calls([(module, partial(_batched, module)) for module in modules]))
            yield

    return keep


# --- calls -------------------------------------------------------------------------------------------------------


@contextmanager
def several_tokens(engine: Any) -> Iterator[None]:
    """Refuse a model whose mixers carry a state: transformers does not feed those several tokens on a filled cache."""
    if "chunks" not in engine.knobs:
        raise cannot_vary("chunks", "mixers with a state", "a cache that takes several tokens when it is filled")
    yield


def chunked(size: int, plan: Plan) -> Plan:
    """Return the plan with the decode arms' own prefill in chunks."""
    arms = []
    for arm in plan.arms:
        first = arm.passes[0]
        if first.reads or first.start or first.stop <= size or arm.keeps_rows_for is not None:
            arms.append(arm)
            continue
        bounds = [*range(0, first.stop, size), first.stop]
        chunks = [Pass(low, high) for low, high in itertools.pairwise(bounds)]
        arms.append(replace(arm, passes=(*chunks, *arm.passes[1:])))
    return replace(plan, arms=tuple(arms))


@contextmanager
def threads(engine: Any) -> Iterator[None]:
    """Decode on another number of threads."""
    before = torch.get_num_threads()

    def enter(_model: Any, _args: Any, call: dict[str, Any]) -> None:
        torch.set_num_threads(2 if call["input_ids"].shape[1] == 1 else 1)

    hook = engine.model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        torch.set_num_threads(before)


# --- ties --------------------------------------------------------------------------------------------------------


@contextmanager
def router_tie(engine: Any) -> Iterator[None]:
    """Experts 1, 2 and 3 score within a rounding error of each other, and decode adds up in another order."""
    weights = [layer.router.weight for layer in engine.anatomy.layers if hasattr(layer.router, "weight")]
    if not weights:
        raise cannot_vary("router_tie", "no router", "a mixture of experts")
    with torch.no_grad(), ExitStack() as stack:
        for weight in weights:
            stack.callback(weight.copy_, weight.clone())
            step = torch.finfo(weight.dtype).eps
            for expert in range(2, len(weight)):
                weight[expert] = weight[1] * (1 + step * (expert - 1))
        stack.enter_context(transposed_weights(engine))
        yield


@contextmanager
def argmax_tie(engine: Any) -> Iterator[None]:
    """Every token's logit has a twin within a rounding error, and decode adds up in another order."""
    head = engine.model.get_output_embeddings()
    if head is None:
        raise cannot_vary("argmax_tie", "no output embedding", "a model with one")
    with torch.no_grad(), ExitStack() as stack:
        weight = head.weight
        if weight is engine.model.get_input_embeddings().weight:
            head.weight = nn.Parameter(weight.clone())
            stack.callback(setattr, head, "weight", weight)
        else:
            stack.callback(weight.copy_, weight.clone())
        half = len(weight) // 2
        head.weight[half : 2 * half] = head.weight[:half] * (1 + torch.finfo(weight.dtype).eps)
        stack.enter_context(transposed_weights(engine))
        yield
