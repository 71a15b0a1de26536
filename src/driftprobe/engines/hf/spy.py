"""Listens to one forward call: forward hooks, the cache's `update`, and attention (`attention.py`).

The model's code is not touched. What a module's name promises is checked in a trial first (`trial.py`).

Axes: B batch (1), T tokens of this call, H query heads, G key/value heads, S visible rows, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from driftprobe.engines.hf.anatomy import Anatomy, Layer
from driftprobe.engines.hf.attention import (
    AttentionCall,
    AttentionOps,
    attention_calls,
    attention_chunk,
    columns,
    scores_of,
    sliding_window,
)
from driftprobe.engines.hf.fused import split
from driftprobe.engines.hf.states import States, stored_states

Tensor = torch.Tensor
Place = tuple[int | None, str]


@dataclass(slots=True)
class Rows:
    """Cache rows as attention saw them in one layer: `[G, S, D]` each, in order of position."""

    keys_GSD: Tensor
    values_GSD: Tensor


@dataclass(slots=True)
class Learned:
    """What a trial run found out about this model's tensors."""

    head_first: set[Place] = field(default_factory=set)
    """Taps that come as `[B, H, T, D]`."""
    layouts: dict[int, str] = field(default_factory=dict)
    """Layer -> how its fused projection is laid out (`fused.py`)."""
    expanded: set[int] = field(default_factory=set)
    """Layers whose cache holds something from which keys and values are made anew (a latent)."""
    mid_from_mlp: set[int] = field(default_factory=set)
    """Layers without a norm before the MLP: the MLP's input is the residual stream."""
    router_outputs: dict[int, dict[str, int]] = field(default_factory=dict)
    """Layer -> tap -> which of the router's outputs it is."""
    scales: dict[int, float] = field(default_factory=dict)
    """Layer -> the factor that its attention scales scores by, where it was called with one."""
    softcaps: dict[int, float] = field(default_factory=dict)
    """Layer -> the cap of its scores, where its attention was called with one."""


@dataclass(slots=True)
class Heard:
    """What one forward call let us hear. Tensors are copies of the asked rows only."""

    wanted: tuple[int, ...]
    """Rows of this call that are read, 0-based within the call."""
    first_position: int
    tokens: int
    taps: dict[Place, list[Tensor]] = field(default_factory=dict)
    """Tap -> one tensor `[1, …]` for each wanted row; names that begin with _ are for the trial."""
    row_start: dict[Place, list[int]] = field(default_factory=dict)
    recomputed: set[Place] = field(default_factory=set)
    unnamed: set[Place] = field(default_factory=set)
    """Taps found as an operand of an op."""
    cache: dict[int, Rows] = field(default_factory=dict)
    """Layer -> the rows that the cache handed to attention."""
    given: dict[int, Rows] = field(default_factory=dict)
    """Layer -> keys and values that attention was given, where they are not the cache's rows or not known to be."""
    windows: dict[int, int | None] = field(default_factory=dict)
    """Layer -> the window that attention was called with."""
    projected: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> output of its fused projection."""
    routed: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    """Layer -> input and output of its router."""
    past: Any = None
    """The cache that this call writes into."""
    states: dict[int, States] = field(default_factory=dict)
    """Layer -> the states that its mixer left behind."""

    def visible(self, row: int, stored: int, window: int | None, chunk: int | None) -> tuple[int, int, int]:
        """Return (low, high, start): columns [low, high) of `stored` that a row may see, and the first's position.

        A sliding window ends at the row; a chunk begins at a multiple of its size.
        """
        position = self.first_position + row
        offset = max(self.first_position + self.tokens - stored, 0)
        start = max(offset, position + 1 - window if window else 0, position - position % chunk if chunk else 0)
        return start - offset, position + 1 - offset, start


class Spy:
    """Hooks for one model, put in once and listening only while a `Heard` is set."""

    def __init__(
        self, anatomy: Anatomy, learned: Learned, layers: frozenset[int] | None = None, *, trial: bool = False
    ) -> None:
        self.anatomy, self.learned, self.layers, self.trial = anatomy, learned, layers, trial
        self.heard: Heard | None = None
        self.ops = AttentionOps()
        self._inside: int | None = None

    @contextmanager
    def installed(self) -> Iterator[Spy]:
        """Keep the hooks in while the context lasts; everything is put back at its end."""
        with ExitStack() as stack:
            for module, hook, before in self._hooks():
                if module is None:
                    continue
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                stack.callback(register(hook, with_kwargs=True).remove)
            stack.enter_context(attention_calls(self.anatomy.layers, self))
            yield self

    @contextmanager
    def listening(self, heard: Heard) -> Iterator[None]:
        """Fill `heard` while the context lasts."""
        self.heard = heard
        try:
            with self.ops if heard.wanted else nullcontext():
                yield
        finally:
            self.heard, self._inside = None, None
            self.ops.clear()

    def _hooks(self) -> Iterator[tuple[Any, Callable[..., None], bool]]:
        yield self.anatomy.embed, self._output(None, "embed"), False
        yield self.anatomy.final_norm, self._input(None, "_final_norm_in"), True
        yield self.anatomy.final_norm, self._output(None, "final_norm"), False
        for layer in self.anatomy.layers:
            if self.layers is None or layer.index in self.layers:
                yield from self._layer_hooks(layer)

    def _layer_hooks(self, layer: Layer) -> Iterator[tuple[Any, Callable[..., None], bool]]:
        i, heads, groups = layer.index, self.anatomy.heads, self.anatomy.kv_heads
        yield layer.module, self._enter(i), True
        yield layer.module, self._input(i, "x_in"), True
        yield layer.attn_norm, self._output(i, "attn_norm"), False
        yield layer.attention, self._input(i, "_attention_in"), True
        for tensor, module, count in (("q_proj", layer.q_proj, heads), ("k_proj", layer.k_proj, groups),
                                      ("v_proj", layer.v_proj, groups)):  # fmt: skip
            yield module, self._output(i, tensor, count), False
        yield layer.fused, self._fused(i), False
        for tensor, module, count in (("q_norm", layer.q_norm, heads), ("k_norm", layer.k_norm, groups)):
            yield module, self._input(i, f"_{tensor}_in", count), True
            yield module, self._output(i, tensor, count), False
        yield layer.out_proj, self._input(i, "attn_ctx", heads), True
        yield layer.out_proj, self._output(i, "attn_out"), False
        yield layer.attention, self._attention_done(i), False
        yield layer.mixer, self._input(i, "_mixer_in"), True
        yield layer.mixer, self._mixer_done(i), False
        if i not in self.learned.mid_from_mlp:
            yield layer.ffn_norm, self._input(i, "x_mid"), True
        yield layer.ffn_norm, self._output(i, "ffn_norm"), False
        yield layer.mlp_in, self._input(i, "_mlp_in"), True
        if i in self.learned.mid_from_mlp:
            yield layer.mlp_in, self._input(i, "x_mid"), True
        yield layer.router, self._router(i), False
        yield layer.mlp_out, self._output(i, "mlp_out"), False
        if self.trial:
            for name, child in layer.module.named_children():
                yield child, self._output(i, f"_child_{name}"), False
        yield layer.module, self._output(i, "x_out"), False

    def hears(self, layer: int) -> bool:
        """Whether this layer's taps are wanted now."""
        return self.heard is not None and bool(self.heard.wanted) and (self.layers is None or layer in self.layers)

    def _enter(self, layer: int) -> Callable[..., None]:
        def hook(_module: object, _args: object, _kwargs: object) -> None:
            self._inside = layer

        return hook

    def _input(self, layer: int | None, tensor: str, count: int = 0) -> Callable[..., None]:
        def hook(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs.get("hidden_states")
            if tensor == "_attention_in" and self.hears(layer or 0):
                self.ops.clear()
            self.take(layer, tensor, value, count)

        return hook

    def _output(self, layer: int | None, tensor: str, count: int = 0) -> Callable[..., None]:
        def hook(_module: object, _args: object, _kwargs: object, output: Any) -> None:
            self.take(layer, tensor, output[0] if isinstance(output, tuple) else output, count)

        return hook

    def _fused(self, layer: int) -> Callable[..., None]:
        def hook(_module: object, _args: object, _kwargs: object, output: Any) -> None:
            if not self.hears(layer) or self._inside != layer or not isinstance(output, Tensor):
                return
            assert self.heard is not None
            if self.trial:
                self.heard.projected[layer] = output
            parts = split(self.learned.layouts.get(layer, ""), output, self.anatomy.heads, self.anatomy.kv_heads)
            for tensor, part in parts.items():
                self.take(layer, tensor, part)

        return hook

    def _router(self, layer: int) -> Callable[..., None]:
        def hook(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self.hears(layer):
                return
            assert self.heard is not None
            if self.trial:
                self.heard.routed[layer] = (args[0] if args else kwargs.get("hidden_states"), output)
            for tensor, which in self.learned.router_outputs.get(layer, {}).items():
                value = output[which] if isinstance(output, tuple) else output
                # which experts, not the order in which top-k names them
                self.take(layer, tensor, value.sort(dim=-1).values if tensor == "expert_ids" else value)

        return hook

    def _attention_done(self, layer: int) -> Callable[..., None]:
        def hook(_module: object, _args: object, _kwargs: object, _output: object) -> None:
            heard = self.heard
            if heard is None or not self.hears(layer) or layer in heard.windows:
                return
            call = self.ops.call()
            if call is not None:
                self.attention(layer, call, sliding_window(self.anatomy.layers[layer].attention, layer))

        return hook

    def _mixer_done(self, layer: int) -> Callable[..., None]:
        def hook(_module: object, _args: object, _kwargs: object, output: Any) -> None:
            heard = self.heard
            if heard is None:
                return
            self.take(layer, "mixer_out", output[0] if isinstance(output, tuple) else output)
            heard.states[layer] = states = stored_states(heard.past, layer).copy()
            if self.hears(layer) and heard.wanted == (heard.tokens - 1,):
                for tensor, several in (("conv_state", states.conv), ("ssm_state", states.recurrent)):
                    if several:
                        heard.taps[(layer, tensor)] = [_joined(several)]

        return hook

    def take(self, layer: int | None, tensor: str, value: object, count: int = 0) -> None:
        """Copy the wanted rows of a `[B, T, …]`, `[B, H, T, D]` or `[T, …]` tensor; `count` heads have their own axis.

        A module shared by several layers tells of the layer that is running.
        """
        heard = self.heard
        if heard is None or not heard.wanted or not isinstance(value, Tensor):
            return
        if layer is not None and layer != self._inside:
            return
        rows = self._token_rows((layer, tensor), value, heard.tokens)
        if rows is None:
            return
        if count and rows.dim() == 2 and rows.shape[1] % count == 0:
            rows = rows.view(rows.shape[0], count, -1) if rows.is_contiguous() else rows.reshape(len(rows), count, -1)
        heard.taps[(layer, tensor)] = [rows[row : row + 1].detach().clone() for row in heard.wanted]

    def _token_rows(self, place: Place, value: Tensor, tokens: int) -> Tensor | None:
        """Return a tensor as `[T, …]`, or None where it has no token axis."""
        if value.dim() == 2:
            return value if value.shape[0] == tokens else None
        if value.dim() < 3 or value.shape[0] != 1:
            return None
        if self.trial and value.dim() == 4 and value.shape[2] == tokens != value.shape[1]:
            self.learned.head_first.add(place)
        if place in self.learned.head_first:
            return value[0].transpose(0, 1) if value.shape[2] == tokens else None
        return value[0] if value.shape[1] == tokens else None

    def cache_update(
        self, layer: int, new_key_BGTD: Tensor, new_value_BGTD: Tensor, keys_BGSD: Tensor, values_BGSD: Tensor
    ) -> None:
        """Take what the cache was given and what it handed back in one layer."""
        heard = self.heard
        if heard is None:
            return
        heard.cache[layer] = Rows(keys_BGSD[0].detach().clone(), values_BGSD[0].detach().clone())
        if self.hears(layer):
            self.take(layer, "_value", new_value_BGTD.transpose(1, 2))
            self.take(layer, "_key", new_key_BGTD.transpose(1, 2))

    def finish(self, heard: Heard) -> None:
        """Cut the cache rows of every layer to what each wanted row can see, once the call is over."""
        for layer, cached in heard.cache.items():
            if not heard.wanted or (self.layers is not None and layer not in self.layers):
                continue
            declared = sliding_window(self.anatomy.layers[layer].attention, layer)
            window = heard.windows.get(layer, declared)
            rows = heard.given.get(layer, cached) if layer in self.learned.expanded else cached
            chunk = attention_chunk(self.anatomy.layers[layer].attention, layer)
            spans = [heard.visible(row, rows.keys_GSD.shape[1], window, chunk) for row in heard.wanted]
            if layer in self.learned.expanded or (layer, "_value") not in heard.taps:
                newest = [high - 1 for _, high, _ in spans]  # the cache was not given keys and values, or not heard
                for name, stored in (("_key", rows.keys_GSD), ("_value", rows.values_GSD)):
                    heard.taps[(layer, name)] = [stored[:, at : at + 1].transpose(0, 1) for at in newest]
            if self.anatomy.rotary:
                heard.taps[(layer, "k_rope")] = heard.taps[(layer, "_key")]
            for tensor, stored in (("k_cache", rows.keys_GSD), ("v_cache", rows.values_GSD)):
                heard.taps[(layer, tensor)] = [stored[:, low:high].transpose(0, 1) for low, high, _ in spans]
                heard.row_start[(layer, tensor)] = [start for _, _, start in spans]

    def attention(self, layer: int, call: AttentionCall, window: int | None) -> None:
        """Take query, scores, probabilities and result of one computation of attention."""
        heard = self.heard
        if heard is None or not self.hears(layer):
            return
        heard.windows[layer] = window
        if self.trial and call.key_BGSD is not None:
            self.learned.scales[layer] = call.scale
            if call.softcap:
                self.learned.softcaps[layer] = float(call.softcap)
        if self.anatomy.rotary and call.query_BHTD is not None:
            self.take(layer, "q_rope", call.query_BHTD.transpose(1, 2))
            heard.unnamed |= set() if call.named else {(layer, "q_rope")}
        if call.output_BTHD is not None:
            self.take(layer, "_attention_out", call.output_BTHD, self.anatomy.heads)
        expanded = self.trial or layer in self.learned.expanded
        if expanded and call.key_BGSD is not None and call.value_BGSD is not None:
            heard.given[layer] = Rows(call.key_BGSD[0].detach().clone(), call.value_BGSD[0].detach().clone())
        found = []
        for row in heard.wanted:
            chunk = attention_chunk(self.anatomy.layers[layer].attention, layer)
            low, high, _ = heard.visible(row, columns(call), window, chunk)
            pair = scores_of(call, row, low, high)
            if pair is None:
                return
            found.append(tuple(t.unsqueeze(0).detach().clone() for t in pair))
        scores, probs = zip(*found, strict=True)
        heard.taps[(layer, "attn_scores")], heard.taps[(layer, "attn_probs")] = list(scores), list(probs)
        if call.seen is None:
            heard.recomputed |= {(layer, "attn_scores"), (layer, "attn_probs")}


def _joined(states: tuple[Tensor, ...]) -> Tensor:
    """Return a layer's states of one kind as one tensor without the batch axis, one behind the other by channels."""
    alike = len({state.shape[2:] for state in states}) == 1
    return torch.cat([state[0] for state in states]) if alike else torch.cat([state.reshape(-1) for state in states])
