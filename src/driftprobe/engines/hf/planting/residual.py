"""Plants faults of the residual stream: taken from the wrong place, a branch left out, embedding and position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from driftprobe.engines.hf.anatomy import Layer
from driftprobe.engines.hf.planting.base import Call, Planter, Site, Undo, cannot_act, during, is_decode, set_attribute
from driftprobe.engines.hf.planting.swap import on_result, planters, swap_forward
from driftprobe.engines.hf.weights import branch_norms, embedding_scale, position_module
from driftprobe.faults import Expected

Tensor = torch.Tensor


def _expect(fault: str, cause: str, **parameters: str) -> Callable[[Site, float], Expected]:
    def expect(site: Site, _strength: float) -> Expected:
        layer = site.anatomy.layers[0]
        if layer.attention is None or (fault == "residual_from_norm" and layer.attn_norm is None):
            raise cannot_act(fault, "no attention behind a norm found", "a layer that norms its input first")
        return Expected(*site.first(0, "x_mid", "x_out"), "computation", cause, parameters)

    return expect


def _from_norm(site: Site, _strength: float) -> list[Undo]:
    """Attention's branch takes along what turns the residual x into the normed x."""
    undo: list[Undo] = []
    for layer in site.anatomy.layers:
        kept: dict[str, Tensor] = {}

        def note(forward: Callable[..., Any], kept: dict[str, Tensor]) -> Callable[..., Any]:
            def noted(states: Tensor, *args: Any, **kwargs: Any) -> Any:
                kept["x"], kept["normed"] = states, forward(states, *args, **kwargs)
                return kept["normed"]

            return noted

        def moved(branch: Tensor, kept: dict[str, Tensor]) -> Tensor:
            return branch + (kept["normed"] - kept["x"])

        undo.append(swap_forward(layer.attn_norm, partial(note, kept=kept)))
        undo.append(swap_forward(_branch(layer), on_result(partial(moved, kept=kept))))
    return undo


def _branch(layer: Layer) -> Any:
    """Return the module whose result is added to the residual behind attention."""
    return branch_norms(layer).get("x_mid.branch", layer.attention)


def _skips(site: Site, _strength: float) -> list[Undo]:
    """Attention's branch is lost: where attention adds the residual itself, all but the residual is."""
    undo: list[Undo] = []
    for layer in site.anatomy.layers:
        kept: dict[str, Tensor] = {}

        def note(result: Tensor, kept: dict[str, Tensor]) -> Tensor:
            kept["out"] = result
            return result

        def lost(branch: Tensor, kept: dict[str, Tensor], layer: Layer) -> Tensor:
            normed = "x_mid.branch" in branch_norms(layer)
            return torch.zeros_like(branch) if normed or "out" not in kept else branch - kept["out"]

        if layer.out_proj is not None:
            undo.append(swap_forward(layer.out_proj, on_result(partial(note, kept=kept))))
        undo.append(swap_forward(_branch(layer), on_result(partial(lost, kept=kept, layer=layer))))
    return undo


@contextmanager
def _scale_missing(site: Site, _strength: float) -> Iterator[Expected]:
    scale = embedding_scale(site.model)
    if scale is None or scale == 1.0:
        raise cannot_act("embedding_scale_missing", "embeddings are not scaled", "a model that scales them")
    on = [False]

    def change(_call: Call) -> list[Undo]:
        on[0] = True
        return [partial(on.__setitem__, 0, False)]

    def hook(_module: object, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[Any, ...], Call]:
        if not on[0]:
            return args, kwargs
        if args:
            return (args[0] / scale, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] / scale}

    handle = site.anatomy.layers[0].module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with during(site, is_decode, change):
            yield Expected(*site.first(0, "x_in", "attn_norm"), "computation", "embedding_scale",
                           {"factor": 1.0 / scale})  # fmt: skip
    finally:
        handle.remove()


def _position(site: Site, _strength: float) -> Expected:
    if position_module(site.model) is None:
        raise cannot_act("learned_position_plus_one", "no learned position embedding", "a model that has one")
    return Expected(*site.first(0, "x_in", "attn_norm"), "computation", "learned_position")


def _change_position(site: Site, _strength: float) -> list[Undo]:
    module = position_module(site.model)
    if isinstance(getattr(module, "offset", None), int):
        return [set_attribute(module, "offset", module.offset + 1)]
    return [swap_forward(module, lambda forward: lambda ids: forward(ids + 1))]


PLANTERS: dict[str, Planter] = {
    **planters("residual_from_norm", _expect("residual_from_norm", "residual_source", source="attn_norm"), _from_norm),
    **planters("residual_skips_attention", _expect("residual_skips_attention", "branch_missing", branch="attn_out"),
               _skips),
    "embedding_scale_missing": _scale_missing,
    **planters("learned_position_plus_one", _position, _change_position),
}  # fmt: skip
