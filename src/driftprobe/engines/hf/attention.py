"""Listens to attention: the function that a module calls, and the ops inside a module that calls none.

From transformers 4.48 on, attention modules call a function by name, with all it needs; older ones, and a few of today
(BLOOM, Falcon), compute inside the module, where its softmax or its fused kernel call is seen instead. The kernel that
the user asked for still computes. Where it hides the scores they are recomputed from its query and key, and marked so.

Axes: B batch (1), T tokens of this call, H query heads, G key/value heads, S key rows, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from driftprobe.engines.hf.anatomy import Layer
from driftprobe.engines.hf.heard import Reach

Tensor = torch.Tensor
_SCORES = ("softmax",)
_PRODUCTS = {"matmul": 0, "__matmul__": 0, "baddbmm": 1}
"""Products that scores are made with, and which operand the query is."""
_FUSED = "scaled_dot_product_attention"


@dataclass(slots=True)
class AttentionCall:
    """What one computation of attention was given, and what it showed of its softmax."""

    query_BHTD: Tensor | None
    key_BGSD: Tensor | None
    value_BGSD: Tensor | None = None
    mask: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    sinks_H: Tensor | None = None
    """A learned score for each head that takes part in the softmax and in nothing else (gpt-oss)."""
    seen: tuple[Tensor, Tensor] | None = None
    """Scores and probabilities `[B, H, T, S]` where the kernel let them be seen."""
    output_BTHD: Tensor | None = None
    """The weighted values, before the output projection."""
    named: bool = True
    """Whether the query was handed over as such; one found as an operand has to be checked (`trial.py`)."""


class Listener(Protocol):
    """Who is told of attention calls."""

    ops: AttentionOps

    def hears(self, layer: int) -> bool:
        """Whether this layer is listened to now."""
        ...

    def reach(self, layer: int) -> Reach:
        """Return the window and the chunk that a layer declares."""
        ...

    def watching(self) -> AbstractContextManager[object]:
        """Return what keeps the operands of an attention function's own softmax, where they are wanted."""
        ...

    def attention(self, layer: int, call: AttentionCall, window: int | None) -> None:
        """Take one call's tensors."""
        ...


class AttentionOps(TorchFunctionMode):
    """Keeps the operands of the last attention softmax, or fused kernel call, since `clear`."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.seen: tuple[Tensor, Tensor] | None = None
        self.query: Tensor | None = None
        self.fused: AttentionCall | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _SCORES and isinstance(args[0], Tensor):
            scores = _with_batch(args[0])
            if scores is not None:
                self.seen = (scores, output.view(scores.shape))
        elif name in _PRODUCTS and self.seen is None and len(args) > _PRODUCTS[name]:
            query = _with_batch(args[_PRODUCTS[name]])
            self.query = query if query is not None else self.query
        elif name == _FUSED:
            self.fused = _fused_call(args, kwargs or {}, output)
        return output

    def call(self) -> AttentionCall | None:
        """Return what was seen as one call, or None where there was no attention in it."""
        if self.fused is not None:
            return self.fused
        if self.seen is None:
            return None
        query = self.query
        if query is not None and query.shape[:3] != self.seen[0].shape[:3]:
            query = None
        return AttentionCall(query, None, seen=self.seen, named=False)


def _with_batch(scores: Tensor) -> Tensor | None:
    """Return scores, or a query, as `[1, H, T, …]`; some models fold the batch into the heads."""
    if scores.dim() == 3:
        return scores.unsqueeze(0)
    return scores if scores.dim() == 4 else None


def _fused_call(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> AttentionCall:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, scale = given["query"], given.get("scale")
    return AttentionCall(
        query,
        given["key"],
        given["value"],
        given.get("attn_mask"),
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        output_BTHD=output.transpose(1, 2),
        named=False,
    )


def columns(call: AttentionCall) -> int:
    """Return how many key rows a call was over, or 0 where that was not seen."""
    if call.seen is not None:
        return call.seen[0].shape[3]
    return 0 if call.key_BGSD is None else call.key_BGSD.shape[2]


def scores_of(call: AttentionCall, row: int, low: int, high: int) -> tuple[Tensor, Tensor] | None:
    """Return scores and probabilities `[H, S]` of one query row over key columns [low, high), or None."""
    if call.seen is not None:
        score, prob = (t[0, :, row, low:high] for t in call.seen)
        if shifted(call):
            score = _recompute(call, call.query_BHTD, call.key_BGSD, row, low, high)[0]  # type: ignore[arg-type]
        return masked_to_infinity(score), prob
    if call.query_BHTD is None or call.key_BGSD is None:
        return None
    return _recompute(call, call.query_BHTD, call.key_BGSD, row, low, high)


def shifted(call: AttentionCall) -> bool:
    """Whether what goes into the softmax is no score: with sinks, kernels take the row's maximum off it first."""
    return call.sinks_H is not None and call.query_BHTD is not None and call.key_BGSD is not None


def _recompute(
    call: AttentionCall, query_BHTD: Tensor, key_BGSD: Tensor, row: int, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Recompute in float32, or in the model's own wider dtype; R query heads share a key head."""
    wide = torch.promote_types(query_BHTD.dtype, torch.float32)
    key_GSD = key_BGSD[0, :, low:high].to(wide)
    query_GRD = query_BHTD[0, :, row].to(wide).reshape(len(key_GSD), -1, key_GSD.shape[-1])
    scores_HS = torch.bmm(query_GRD, key_GSD.transpose(1, 2)).view(-1, key_GSD.shape[1]) * call.scale
    if call.softcap:
        scores_HS = torch.tanh(scores_HS / call.softcap) * call.softcap
    if call.mask is not None:
        mask_HS = call.mask[0, :, min(row, call.mask.shape[2] - 1), low:high]
        if mask_HS.dtype == torch.bool:
            scores_HS = scores_HS.masked_fill(~mask_HS, -torch.inf)
        else:
            scores_HS = scores_HS + mask_HS
        scores_HS = masked_to_infinity(scores_HS)
    elif query_BHTD.shape[2] > 1:  # a kernel that is given no mask hides later keys itself, counted from the first one
        scores_HS[:, max(row + 1 - low, 0) :] = -torch.inf
    if call.sinks_H is None:
        return scores_HS, torch.softmax(scores_HS, dim=-1)
    with_sinks = torch.cat([scores_HS, call.sinks_H.to(wide).reshape(-1, 1)], dim=-1)
    return scores_HS, torch.softmax(with_sinks, dim=-1)[:, :-1]


def masked_to_infinity(scores: Tensor) -> Tensor:
    """Return scores with the dtype's own 'minus infinity' of masks (finfo.min plus a score) as -inf."""
    return scores.masked_fill(scores <= torch.finfo(scores.dtype).min / 2, -torch.inf)


def sliding_window(attention: object, index: int) -> int | None:
    """Return the window in tokens that a layer's attention module or its configuration declares, or None."""
    if getattr(attention, "is_sliding", True) is False:
        return None
    if hasattr(attention, "sliding_window"):
        return _tokens(attention.sliding_window)
    config = getattr(attention, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and "sliding" not in kinds[index]:
        return None
    if not kinds and getattr(config, "use_sliding_window", True) is False:
        return None
    return _tokens(getattr(config, "sliding_window", None))


def attention_chunk(attention: object, index: int) -> int | None:
    """Return the chunk in tokens outside which a layer attends to nothing (Llama 4), or None."""
    config = getattr(attention, "config", None)
    kinds = getattr(config, "layer_types", None) or ()
    chunked = index < len(kinds) and "chunked" in kinds[index]
    return _tokens(getattr(config, "attention_chunk_size", None)) if chunked else None


def _tokens(window: object) -> int | None:
    return window if isinstance(window, int) and window > 0 else None


def attention_functions(modules: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """Yield where the attention functions that modules call are looked up: a mapping and a name in it, each once.

    A module that computes attention inside itself has none.
    """
    seen = set()
    for module in modules:
        space = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
        registry = space.get("ALL_ATTENTION_FUNCTIONS")
        name = getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
        if registry is None:
            continue
        mapping = registry if name != "eager" and name in registry else space
        name = name if mapping is registry else "eager_attention_forward"
        if name in mapping and (id(mapping), name) not in seen:  # model files share one registry
            seen.add((id(mapping), name))
            yield mapping, name


@contextmanager
def attention_calls(layers: tuple[Layer, ...], listener: Listener) -> Iterator[None]:
    """Wrap the attention functions that these layers' modules call, while the context lasts."""
    indices = {id(layer.attention): layer.index for layer in layers if layer.attention is not None}
    with ExitStack() as stack:
        for mapping, name in attention_functions(layer.attention for layer in layers if layer.attention is not None):
            stack.enter_context(replaced(mapping, name, _listening(mapping[name], listener, indices)))
        yield


@contextmanager
def replaced(mapping: Any, name: str, value: object) -> Iterator[None]:
    """Put another function in the place where one is looked up, while the context lasts."""
    own = getattr(mapping, "_local_mapping", mapping)
    missing = object()
    before = own.get(name, missing)
    own[name] = value
    try:
        yield
    finally:
        if before is missing:
            del own[name]
        else:
            own[name] = before


def _listening(function: Callable[..., Any], listener: Listener, indices: dict[int, int]) -> Callable[..., Any]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        *args: Any, **kw: Any,
    ) -> Any:  # fmt: skip
        layer = indices.get(id(module))
        if layer is None or not listener.hears(layer):
            return function(module, query, key, value, attention_mask, *args, **kw)
        listener.ops.clear()
        with listener.watching():
            output = function(module, query, key, value, attention_mask, *args, **kw)
        result = output[0] if isinstance(output, tuple) else output
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        scale = kw.get("scaling")
        window = _tokens(kw["sliding_window"]) if "sliding_window" in kw else listener.reach(layer)[0]
        call = AttentionCall(
            query, key, value, attention_mask, float(scale) if scale is not None else query.shape[-1] ** -0.5,
            softcap=kw.get("softcap"), sinks_H=kw.get("s_aux"),
            seen=_fitting(listener.ops.seen, query, key, weights), output_BTHD=result,
        )  # fmt: skip
        listener.attention(layer, call, window)
        return output

    return attention


def _fitting(
    seen: tuple[Tensor, Tensor] | None, query: Tensor, key: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return scores and probabilities where the softmax that was seen is the attention's own, `[B, H, T, S]`."""
    rows = key.shape[2]
    if seen is None or seen[0].shape[:3] != query.shape[:3] or seen[0].shape[3] not in (rows, rows + 1):
        return None
    shape = (*query.shape[:3], rows)
    probs = weights if weights is not None and tuple(weights.shape) == shape else seen[1]
    return seen[0][..., :rows], probs[..., :rows]  # a column more is a sink
