"""Listens to one forward call: forward hooks, the cache's `update`, and the attention function it calls.

The model's code is not touched and the attention kernel that the user asked for still computes. Where a fused kernel
hides the scores they are recomputed here from the captured query and key, and marked so.

Axes: B batch (1), T tokens of this call, H query heads, G key/value heads, S visible rows, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from driftprobe.engines.hf.anatomy import Anatomy, Layer

Tensor = torch.Tensor
Place = tuple[int | None, str]


@dataclass(slots=True)
class Rows:
    """Cache rows as attention saw them in one layer: `[G, S, D]` each, in order of position."""

    keys_GSD: Tensor
    values_GSD: Tensor


@dataclass(slots=True)
class Heard:
    """What one forward call let us hear. Tensors are copies of the asked rows only."""

    wanted: tuple[int, ...]
    """Rows of this call that are read, 0-based within the call."""
    first_position: int
    tokens: int
    taps: dict[Place, list[Tensor]] = field(default_factory=dict)
    """Tap -> one tensor `[1, …]` for each wanted row."""
    row_start: dict[Place, list[int]] = field(default_factory=dict)
    recomputed: set[Place] = field(default_factory=set)
    cache: dict[int, Rows] = field(default_factory=dict)
    """Layer -> the rows that the cache handed to attention."""
    identity: dict[Place, int] = field(default_factory=dict)
    """Tap -> address of the tensor it was taken from, to tell taps that are one and the same tensor."""

    def visible(self, row: int, stored: int, window: int | None) -> tuple[int, int, int]:
        """Return (low, high, start): columns [low, high) of `stored` that a row may see, and the first's position."""
        position = self.first_position + row
        offset = self.first_position + self.tokens - stored
        start = max(offset, position + 1 - window if window else 0, 0)
        return start - offset, position + 1 - offset, start


class Spy:
    """Hooks for one model, put in once and listening only while a `Heard` is set."""

    def __init__(self, anatomy: Anatomy, layers: frozenset[int] | None = None) -> None:
        self.anatomy = anatomy
        self.layers = layers
        self.heard: Heard | None = None

    @contextmanager
    def installed(self) -> Iterator[Spy]:
        """Keep the hooks in while the context lasts; everything is put back at its end."""
        with ExitStack() as stack:
            for module, hook, before in self._hooks():
                if module is None:
                    continue
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                stack.callback(register(hook, with_kwargs=True).remove)
            stack.enter_context(_attention_calls(self))
            yield self

    def _hooks(self) -> Iterator[tuple[Any, Callable[..., None], bool]]:
        yield self.anatomy.embed, self._output(None, "embed"), False
        yield self.anatomy.final_norm, self._output(None, "final_norm"), False
        for layer in self._chosen():
            i = layer.index
            yield layer.module, self._input(i, "x_in"), True
            yield layer.attn_norm, self._output(i, "attn_norm"), False
            yield layer.attention, self._input(i, "_attention_in"), True
            yield layer.q_proj, self._heads(i, "q_proj"), False
            yield layer.k_proj, self._heads(i, "k_proj"), False
            yield layer.v_proj, self._heads(i, "v_proj"), False
            yield layer.fused, self._fused(layer), False
            yield layer.q_norm, self._heads(i, "q_norm"), False
            yield layer.k_norm, self._heads(i, "k_norm"), False
            yield layer.out_proj, self._context_in(i), True
            yield layer.out_proj, self._output(i, "attn_out"), False
            yield layer.ffn_norm, self._input(i, "x_mid"), True
            yield layer.ffn_norm, self._output(i, "ffn_norm"), False
            yield layer.mlp, self._input(i, "_mlp_in"), True
            yield layer.router, self._output(i, "router_logits"), False
            yield layer.mlp, self._output(i, "mlp_out"), False
            yield layer.module, self._output(i, "x_out"), False

    def _chosen(self) -> list[Layer]:
        return [layer for layer in self.anatomy.layers if self.layers is None or layer.index in self.layers]

    def hears(self, layer: int) -> bool:
        """Whether this layer's taps are wanted now."""
        return self.heard is not None and bool(self.heard.wanted) and (self.layers is None or layer in self.layers)

    def _input(self, layer: int, tensor: str) -> Callable[..., None]:
        def hook(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs.get("hidden_states")
            self.take(layer, tensor, value)

        return hook

    def _output(self, layer: int | None, tensor: str) -> Callable[..., None]:
        def hook(_module: object, _args: object, _kwargs: object, output: Any) -> None:
            self.take(layer, tensor, output[0] if isinstance(output, tuple) else output)

        return hook

    def _heads(self, layer: int, tensor: str) -> Callable[..., None]:
        def hook(_module: object, _args: object, _kwargs: object, output: Any) -> None:
            self.take(layer, tensor, self._with_heads(output))

        return hook

    def _context_in(self, layer: int) -> Callable[..., None]:
        def hook(_module: object, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
            if args:
                self.take(layer, "attn_ctx", self._with_heads(args[0]))

        return hook

    def _fused(self, layer: Layer) -> Callable[..., None]:
        def hook(_module: object, _args: object, _kwargs: object, output: Any) -> None:
            for tensor, part in zip(("q_proj", "k_proj", "v_proj"), self._split(output, layer), strict=False):
                self.take(layer.index, tensor, part)

        return hook

    def _split(self, fused: Tensor, layer: Layer) -> tuple[Tensor, ...]:
        heads, groups, dim = self.anatomy.heads, self.anatomy.kv_heads, self.anatomy.head_dim
        lead = fused.shape[:-1]
        if layer.fused_per_head and fused.shape[-1] == 3 * heads * dim:
            return fused.view(*lead, heads, 3, dim).unbind(-2)
        if not layer.fused_per_head and fused.shape[-1] == (heads + 2 * groups) * dim:
            parts = torch.split(fused, [heads * dim, groups * dim, groups * dim], dim=-1)
            return tuple(self._with_heads(part) for part in parts)
        return ()

    def _with_heads(self, value: Tensor) -> Tensor:
        """Return `[B, T, C]` as `[B, T, heads, D]` where C is a multiple of the head dimension."""
        dim = self.anatomy.head_dim
        if value.dim() != 3 or not dim or value.shape[-1] % dim:
            return value
        return value.view(*value.shape[:-1], -1, dim)

    def take(self, layer: int | None, tensor: str, value: object) -> None:
        """Copy the wanted rows of a `[B, T, …]` tensor (or `[T, …]`, as routers give it)."""
        heard = self.heard
        if heard is None or not heard.wanted or not isinstance(value, Tensor):
            return
        heard.identity.setdefault((layer, tensor), value.data_ptr())
        if value.dim() == 2 and value.shape[0] == heard.tokens:
            value = value.unsqueeze(0)
        if value.dim() < 3 or value.shape[:2] != (1, heard.tokens):
            return
        heard.taps[(layer, tensor)] = [value[0, row : row + 1].detach().clone() for row in heard.wanted]

    def cache_update(self, layer: int, new_key_BGTD: Tensor, keys_BGSD: Tensor, values_BGSD: Tensor) -> None:
        """Take what the cache was given and what it handed back in one layer."""
        heard = self.heard
        if heard is None:
            return
        rows = Rows(keys_BGSD[0].detach().clone(), values_BGSD[0].detach().clone())
        heard.cache[layer] = rows
        if not self.hears(layer):
            return
        if self.anatomy.rotary:
            self.take(layer, "k_rope", new_key_BGTD.transpose(1, 2))
        window = sliding_window(self.anatomy.layers[layer].attention)
        for tensor, stored in (("k_cache", rows.keys_GSD), ("v_cache", rows.values_GSD)):
            spans = [heard.visible(row, stored.shape[1], window) for row in heard.wanted]
            heard.taps[(layer, tensor)] = [stored[:, low:high].transpose(0, 1) for low, high, _ in spans]
            heard.row_start[(layer, tensor)] = [start for _, _, start in spans]

    def attention(self, layer: int, call: AttentionCall) -> None:
        """Take query, scores and probabilities of one call of the attention function."""
        heard = self.heard
        if heard is None or not self.hears(layer):
            return
        if self.anatomy.rotary:
            self.take(layer, "q_rope", call.query_BHTD.transpose(1, 2))
        scores, probs = [], []
        for row in heard.wanted:
            low, high, _ = heard.visible(row, call.key_BGSD.shape[2], call.window)
            if call.seen is not None:
                score, prob = (t[0, :, row, low:high] for t in call.seen)
            else:
                score, prob = recompute(call, row, low, high)
            scores.append(_masked_to_infinity(score).unsqueeze(0).detach().clone())
            probs.append(prob.unsqueeze(0).detach().clone())
        heard.taps[(layer, "attn_scores")], heard.taps[(layer, "attn_probs")] = scores, probs
        if call.seen is None:
            heard.recomputed |= {(layer, "attn_scores"), (layer, "attn_probs")}


@dataclass(slots=True)
class AttentionCall:
    """The arguments of one call of an attention function, and what it showed of its softmax."""

    query_BHTD: Tensor
    key_BGSD: Tensor
    mask: Tensor | None
    scale: float
    window: int | None
    softcap: float | None
    seen: tuple[Tensor, Tensor] | None
    """Scores and probabilities `[B, H, T, S]` where the kernel let them be seen."""


def recompute(call: AttentionCall, row: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return scores and probabilities `[H, S]` of one query row, in float32 or the model's own wider dtype."""
    wide = torch.promote_types(call.query_BHTD.dtype, torch.float32)
    query_HD = call.query_BHTD[0, :, row].to(wide)
    repeat = query_HD.shape[0] // call.key_BGSD.shape[1]
    key_HSD = call.key_BGSD[0, :, low:high].to(wide).repeat_interleave(repeat, dim=0)
    scores_HS = torch.einsum("hd,hsd->hs", query_HD, key_HSD) * call.scale
    if call.softcap:
        scores_HS = torch.tanh(scores_HS / call.softcap) * call.softcap
    if call.mask is not None:
        mask_HS = call.mask[0, :, min(row, call.mask.shape[2] - 1), low:high]
        if mask_HS.dtype == torch.bool:
            scores_HS = scores_HS.masked_fill(~mask_HS, -torch.inf)
        else:
            scores_HS = scores_HS + mask_HS
    return scores_HS, torch.softmax(_masked_to_infinity(scores_HS), dim=-1)


def sliding_window(attention: object) -> int | None:
    """Return an attention module's window in tokens, or None where it sees everything."""
    window = getattr(attention, "sliding_window", None)
    if getattr(attention, "is_sliding", True) is False:
        return None
    return int(window) if window else None


def _masked_to_infinity(scores: Tensor) -> Tensor:
    """Return scores with the dtype's own 'minus infinity' of masks (finfo.min plus a score) as -inf."""
    return scores.masked_fill(scores <= torch.finfo(scores.dtype).min / 2, -torch.inf)


class _SoftmaxSpy(TorchFunctionMode):
    """Keeps input and output of the last 4-d softmax: the scores and probabilities of an eager attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax" and isinstance(args[0], Tensor) and args[0].dim() == 4:
            self.seen = (args[0], output)
        return output


@contextmanager
def _attention_calls(spy: Spy) -> Iterator[None]:
    """Wrap the attention functions that this model's attention modules call (transformers 4.48 and later)."""
    indices = {id(layer.attention): layer.index for layer in spy.anatomy.layers if layer.attention is not None}
    scopes = {}
    for layer in spy.anatomy.layers:
        if layer.attention is not None:
            space = inspect.unwrap(type(layer.attention).forward).__globals__
            scopes[id(space)] = (space, getattr(layer.attention, "config", None))
    with ExitStack() as stack:
        for space, config in scopes.values():
            name = getattr(config, "_attn_implementation", None) or "eager"
            registry = space.get("ALL_ATTENTION_FUNCTIONS")
            if name != "eager" and registry is not None and name in registry:
                stack.enter_context(_replaced(registry, name, _listening(registry[name], spy, indices)))
            elif registry is not None and "eager_attention_forward" in space:
                wrapper = _listening(space["eager_attention_forward"], spy, indices)
                stack.enter_context(_replaced(space, "eager_attention_forward", wrapper))
        yield


@contextmanager
def _replaced(mapping: Any, name: str, value: object) -> Iterator[None]:
    own = getattr(mapping, "_local_mapping", mapping)
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


def _listening(function: Callable[..., Any], spy: Spy, indices: dict[int, int]) -> Callable[..., Any]:
    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kw: Any,
    ) -> Any:
        layer = indices.get(id(module))
        if layer is None or not spy.hears(layer):
            return function(module, query, key, value, attention_mask, *args, **kw)
        with _SoftmaxSpy() as softmax:
            output = function(module, query, key, value, attention_mask, *args, **kw)
        scale = kw.get("scaling")
        spy.attention(
            layer,
            AttentionCall(
                query_BHTD=query,
                key_BGSD=key,
                mask=attention_mask,
                scale=float(scale) if scale is not None else query.shape[-1] ** -0.5,
                window=kw.get("sliding_window") or sliding_window(module),
                softcap=kw.get("softcap"),
                seen=_fitting(softmax.seen, query, key, output[1] if isinstance(output, tuple) else None),
            ),
        )
        return output

    return attention


def _fitting(
    seen: tuple[Tensor, Tensor] | None, query: Tensor, key: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return scores and probabilities where the softmax that was seen is the attention's own, `[B, H, T, S]`."""
    shape = (*query.shape[:3], key.shape[2])
    if seen is None or tuple(seen[0].shape) != shape:
        return None
    probs = weights if weights is not None and tuple(weights.shape) == shape else seen[1]
    return seen[0], probs
