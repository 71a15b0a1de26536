"""Listens to one forward call: forward hooks, the cache's `update`, and attention (`attention.py`).

The model's code is not touched. What a module's name promises is checked in a trial first (`trial.py`).

Axes: B batch (1), T tokens of this call, G key/value heads, S visible rows, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
    shifted,
    sliding_window,
)
from driftprobe.engines.hf.cutting import cut
from driftprobe.engines.hf.fused import same_bits, split
from driftprobe.engines.hf.heard import Heard, Learned, Place, Reach, Rows
from driftprobe.engines.hf.states import stored_states

Tensor = torch.Tensor


class Spy:
    """Hooks for one model, put in once and listening only while a `Heard` is set."""

    def __init__(
        self,
        anatomy: Anatomy,
        learned: Learned,
        layers: frozenset[int] | None = None,
        *,
        trial: bool = False,
        scores: bool = True,
    ) -> None:
        self.anatomy, self.learned, self.layers, self.trial, self.scores = anatomy, learned, layers, trial, scores
        self.heard: Heard | None = None
        self.ops = AttentionOps()
        inside = {layer.index for layer in anatomy.layers if layer.attention is not None} - learned.called
        self._watches_all = trial or bool(inside if layers is None else inside & layers)
        """Whether every op of a call is watched: some layer computes attention inside its module."""
        self._inside: int | None = None
        self._reach: dict[int, Reach] = {}
        """Layer -> the window and chunk that its configuration declares, which is slow to ask."""
        self._handed_out: dict[int, Rows] = {}
        """Trial: what the cache handed out, not copied."""
        self._fired: dict[Place, tuple[Tensor, Tensor, int]] = {}
        """Trial: what fired, itself and as a copy, and how often it had been written to."""

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
            with self.ops if heard.wanted and self._watches_all else nullcontext():
                yield
        finally:
            self.heard, self._inside = None, None
            self.ops.clear()

    def watching(self) -> AbstractContextManager[object]:
        """See Listener: nothing where scores are not wanted, or every op is watched anyway."""
        return self.ops if self.scores and not self._watches_all else nullcontext()

    def _hooks(self) -> Iterator[tuple[Any, Callable[..., None], bool]]:
        yield self.anatomy.embed, self._output(None, "embed"), False
        if self.trial:
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
        if self._watches_all:
            yield layer.attention, self._input(i, "_attention_in"), True
        for tensor, module, count in (("q_proj", layer.q_proj, heads), ("k_proj", layer.k_proj, groups),
                                      ("v_proj", layer.v_proj, groups)):  # fmt: skip
            yield module, self._output(i, tensor, count), False
        yield layer.fused, self._fused(i), False
        for tensor, module, count in (("q_norm", layer.q_norm, heads), ("k_norm", layer.k_norm, groups)):
            if self.trial:
                yield module, self._input(i, f"_{tensor}_in", count), True
            yield module, self._output(i, tensor, count), False
        yield layer.out_proj, self._input(i, "attn_ctx", heads), True
        yield layer.out_proj, self._output(i, "attn_out"), False
        if self._watches_all:
            yield layer.attention, self._attention_done(i), False
        yield layer.mixer, self._mixer_done(i), False
        if i not in self.learned.mid_from_mlp:
            yield layer.ffn_norm, self._input(i, "x_mid"), True
        yield layer.ffn_norm, self._output(i, "ffn_norm"), False
        if i in self.learned.mid_from_mlp:
            yield layer.mlp_in, self._input(i, "x_mid"), True
        yield layer.router, self._router(i), False
        yield layer.mlp_out, self._output(i, "mlp_out"), False
        if self.trial:
            yield from self._trial_hooks(layer)
        yield layer.module, self._output(i, "x_out"), False
        yield layer.module, self._layer_done(i), False

    def _trial_hooks(self, layer: Layer) -> Iterator[tuple[Any, Callable[..., None], bool]]:
        """Return the hooks for what is heard to be compared with a tap, and never handed out."""
        yield layer.mixer, self._input(layer.index, "_mixer_in"), True
        yield layer.mlp_in, self._input(layer.index, "_mlp_in"), True
        for name, child in layer.module.named_children():
            yield child, self._output(layer.index, f"_child_{name}"), False

    def reach(self, layer: int) -> Reach:
        """Return the window and the chunk that a layer declares."""
        found = self._reach.get(layer)
        if found is None:
            attention = self.anatomy.layers[layer].attention
            found = self._reach[layer] = sliding_window(attention, layer), attention_chunk(attention, layer)
        return found

    def hears(self, layer: int) -> bool:
        """Whether this layer's taps are wanted now."""
        return self.heard is not None and bool(self.heard.wanted) and (self.layers is None or layer in self.layers)

    def _enter(self, layer: int) -> Callable[..., None]:
        def hook(_module: object, _args: object, _kwargs: object) -> None:
            self._inside = layer

        return hook

    def _input(self, layer: int | None, tensor: str, count: int = 0) -> Callable[..., None]:
        place = (layer, tensor)

        def hook(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs.get("hidden_states")
            if tensor == "_attention_in" and self.hears(layer or 0):
                self.ops.clear()
            self.take(place, value, count)

        return hook

    def _output(self, layer: int | None, tensor: str, count: int = 0) -> Callable[..., None]:
        place = (layer, tensor)

        def hook(_module: object, _args: object, _kwargs: object, output: Any) -> None:
            self.take(place, output[0] if isinstance(output, tuple) else output, count)

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
                self.take((layer, tensor), part)

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
                self.take((layer, tensor), value.sort(dim=-1).values if tensor == "expert_ids" else value)

        return hook

    def _attention_done(self, layer: int) -> Callable[..., None]:
        def hook(_module: object, _args: object, _kwargs: object, _output: object) -> None:
            heard = self.heard
            if heard is None or not self.hears(layer) or layer in heard.windows:
                return
            call = self.ops.call()
            if call is not None:
                self.attention(layer, call, self.reach(layer)[0])

        return hook

    def _mixer_done(self, layer: int) -> Callable[..., None]:
        def hook(_module: object, _args: object, _kwargs: object, output: Any) -> None:
            heard = self.heard
            if heard is None:
                return
            self.take((layer, "mixer_out"), output[0] if isinstance(output, tuple) else output)
            heard.states[layer] = states = stored_states(heard.past, layer).copy()
            if self.hears(layer) and heard.wanted == (heard.tokens - 1,):
                for tensor, several in (("conv_state", states.conv), ("ssm_state", states.recurrent)):
                    if several:
                        heard.taps[(layer, tensor)] = [_joined(several)]

        return hook

    def take(self, place: Place, value: object, count: int = 0) -> None:
        """Copy the wanted rows of a `[B, T, …]`, `[B, H, T, D]` or `[T, …]` tensor; `count` heads have their own axis.

        A module shared by several layers tells of the layer that is running.
        """
        heard = self.heard
        if heard is None or not heard.wanted or not isinstance(value, Tensor):
            return
        if place[0] is not None and place[0] != self._inside:
            return
        if heard.batch > 1:
            value = heard.own(value)
        if not (heard.lends and self._lend(heard, place, value, count)):
            self._copy(heard, place, value, count)

    def _lend(self, heard: Heard, place: Place, value: Tensor, count: int) -> bool:
        """Keep a tensor `[1, 1, …]` of a one-token call as it is, with no op at all, where that is allowed."""
        shape, learned = value.shape, self.learned
        if len(shape) < 3 or shape[0] != 1 or shape[1] != 1:
            return False
        if place in learned.spent or place in learned.head_first or value.is_inference():
            return False
        heard.lent[place] = value._version, count if len(shape) == 3 and count and shape[2] % count == 0 else 0
        heard.taps[place] = [value]
        return True

    def _copy(self, heard: Heard, place: Place, value: Tensor, count: int) -> None:
        if self.trial:
            version = 0 if value.is_inference() else value._version
            self._fired[place] = value, value.detach().clone(), version
        heard.lent.pop(place, None)
        plain = value.dim() == 3 and not self.trial and place not in self.learned.head_first
        if plain and value.shape[0] == 1 and value.shape[1] == heard.tokens:  # nearly all, and with fewer ops
            shape = (1, count, -1) if count and value.shape[2] % count == 0 else (1, -1)
            heard.taps[place] = [value.narrow_copy(1, row, 1).view(shape) for row in heard.wanted]
            return
        rows = self._token_rows(place, value, heard.tokens)
        if rows is None:
            return
        if count and rows.dim() == 2 and rows.shape[1] % count == 0:
            rows = rows.view(rows.shape[0], count, -1) if rows.is_contiguous() else rows.reshape(len(rows), count, -1)
        rows = rows.detach() if rows.requires_grad else rows
        heard.taps[place] = [rows.narrow_copy(0, row, 1) for row in heard.wanted]

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
        if heard is None or not heard.wanted:
            return
        shared = not self.trial and layer not in self.learned.rewritten and heard.shares(layer)
        heard.cache[layer] = Rows.of(keys_BGSD, values_BGSD, shared=shared)
        heard.cut.discard(layer)
        if self.trial:
            self._handed_out[layer] = Rows.of(keys_BGSD, values_BGSD, shared=True)
        if self.hears(layer):
            self.take((layer, "_value"), new_value_BGTD.transpose(1, 2))
            self.take((layer, "_key"), new_key_BGTD.transpose(1, 2))

    def finish(self, heard: Heard) -> None:
        """Cut what is not cut yet to what each wanted row can see, once the call is over."""
        self.learned.rewritten |= {layer for layer, rows in self._handed_out.items() if not rows.as_heard()}
        self.learned.spent |= {place for place, fired in self._fired.items() if _spent(*fired)}
        self._fired.clear()
        cut(
            heard,
            sorted({*heard.cache, *heard.scored} - heard.cut),
            self.reach,
            self.learned,
            rotary=self.anatomy.rotary,
        )

    def _layer_done(self, layer: int) -> Callable[..., None]:
        def hook(_module: object, _args: object, _kwargs: object, _output: object) -> None:
            heard = self.heard
            if heard is not None and heard.layer_done is not None and self.hears(layer) and self._inside == layer:
                cut(heard, [layer], self.reach, self.learned, rotary=self.anatomy.rotary)
                heard.layer_done(layer)

        return hook

    def attention(self, layer: int, call: AttentionCall, window: int | None) -> None:
        """Take query, scores, probabilities and result of one computation of attention."""
        heard = self.heard
        if heard is None or not self.hears(layer):
            return
        heard.windows[layer] = window
        if self.trial and call.named:
            self.learned.called.add(layer)
        if self.trial and call.key_BGSD is not None:
            self.learned.scales[layer] = call.scale
            if call.softcap:
                self.learned.softcaps[layer] = float(call.softcap)
        if self.anatomy.rotary and call.query_BHTD is not None:
            self.take((layer, "q_rope"), call.query_BHTD.transpose(1, 2))
            heard.unnamed |= set() if call.named else {(layer, "q_rope")}
        if self.trial and call.output_BTHD is not None:
            self.take((layer, "_attention_out"), call.output_BTHD, self.anatomy.heads)
        expanded = self.trial or layer in self.learned.expanded
        if expanded and call.key_BGSD is not None and call.value_BGSD is not None:
            heard.given[layer] = Rows(call.key_BGSD[0].detach().clone(), call.value_BGSD[0].detach().clone())
        if not self.scores:
            return
        found = [pair for row in heard.wanted if (pair := scores_of(call, row, 0, columns(call))) is not None]
        if len(found) < len(heard.wanted):
            return
        if call.seen is not None:  # the kernel's own, which it may go on to change
            found = [(scores, probs.clone()) for scores, probs in found]
        heard.scored[layer] = found
        heard.cut.discard(layer)
        if call.seen is None:
            heard.recomputed |= {(layer, "attn_scores"), (layer, "attn_probs")}
        elif shifted(call):
            heard.recomputed.add((layer, "attn_scores"))


def _spent(value: Tensor, copy: Tensor, version: int) -> bool:
    """Whether a tensor was written to since; a kernel of one's own may do so without torch knowing."""
    return not same_bits(value, copy) or (not value.is_inference() and value._version != version)


def _joined(states: tuple[Tensor, ...]) -> Tensor:
    """Return a layer's states of one kind as one tensor without the batch axis, one behind the other by channels."""
    alike = len({state.shape[2:] for state in states}) == 1
    return torch.cat([state[0] for state in states]) if alike else torch.cat([state.reshape(-1) for state in states])
