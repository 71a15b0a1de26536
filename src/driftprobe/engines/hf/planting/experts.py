"""Plants faults of experts: their order, the weights of their sum, an expert left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from driftprobe.engines.hf.anatomy import Layer
from driftprobe.engines.hf.planting.base import Planter, Site, Undo, cannot_act, set_attribute
from driftprobe.engines.hf.planting.swap import planters, swap_forward, swap_weight
from driftprobe.engines.hf.weights import Experts, experts_of, renormalises
from driftprobe.faults import Expected

Tensor = torch.Tensor
_MATRICES = ("gate_up_proj", "down_proj")


def _layers(site: Site) -> Iterator[tuple[Layer, Experts]]:
    for layer in site.anatomy.layers:
        experts = experts_of(layer)
        if experts is not None and experts.chosen and isinstance(getattr(layer.router, "weight", None), Tensor):
            yield layer, experts


def _expect(fault: str, cause: str) -> Callable[[Site, float], Expected]:
    def expect(site: Site, _strength: float) -> Expected:
        found = list(_layers(site))
        if not found:
            raise cannot_act(fault, "no experts of a kind that is known", "a mixture of plain gated experts")
        if fault == "topk_not_renormalised" and renormalises(found[0][0]) is None:
            raise cannot_act(fault, "a router of another kind", "softmax, top-k, and weights that may be renormalised")
        return Expected(*site.first(found[0][0].index, "mlp_out", "x_out"), "computation", cause)

    return expect


def _swapped(site: Site, _strength: float) -> list[Undo]:
    """The experts' weights stand in reverse order: every token gets other experts than its router chose."""
    undo: list[Undo] = []
    for layer, _ in _layers(site):
        assert layer.mlp_in is not None
        owner: Any = layer.mlp_in.experts
        if isinstance(owner, nn.ModuleList):
            undo.append(set_attribute(layer.mlp_in, "experts", nn.ModuleList(reversed(list(owner)))))
        else:
            undo += [swap_weight(owner, name, lambda weight: weight.flip(0)) for name in _MATRICES]
    return undo


def _other_sum(site: Site, _strength: float) -> list[Undo]:
    """The weights of the chosen experts do not sum to one, or do where the model leaves them as they are."""

    def make(layer: Layer, experts: Experts) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def changed(states: Tensor, *args: Any, **kwargs: Any) -> Any:
                output = forward(states, *args, **kwargs)
                share = _probabilities(layer, states).topk(experts.chosen, dim=-1).values.sum(-1)
                factor = share if renormalises(layer) else 1.0 / share
                result = output[0] if isinstance(output, tuple) else output
                scaled = result * factor.reshape(*states.shape[:-1], 1).to(result.dtype)
                return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

            return changed

        return wrap

    return [swap_forward(layer.mlp_in, make(layer, experts)) for layer, experts in _layers(site)]


def _dropped(site: Site, _strength: float) -> list[Undo]:
    """The expert of least weight is left out of each token's sum."""

    def make(layer: Layer, experts: Experts) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def changed(states: Tensor, *args: Any, **kwargs: Any) -> Any:
                last = _probabilities(layer, states).topk(experts.chosen, dim=-1).indices.reshape(-1)[-1]
                undo = _without(layer, int(last))
                try:
                    return forward(states, *args, **kwargs)
                finally:
                    undo()

            return changed

        return wrap

    return [swap_forward(layer.mlp_in, make(layer, experts)) for layer, experts in _layers(site)]


def _without(layer: Layer, expert: int) -> Undo:
    assert layer.mlp_in is not None
    owner: Any = layer.mlp_in.experts
    if isinstance(owner, nn.ModuleList):
        down = getattr(owner[expert], "down_proj", None) or owner[expert].w2
        return swap_weight(down, "weight", torch.zeros_like)

    def zeroed(weight: Tensor) -> Tensor:
        changed = weight.clone()
        changed[expert] = 0
        return changed

    return swap_weight(owner, "down_proj", zeroed)


def _probabilities(layer: Layer, states: Tensor) -> Tensor:
    weight: Any = getattr(layer.router, "weight", None)
    return torch.softmax(states.reshape(-1, states.shape[-1]).double() @ weight.double().T, dim=-1)


PLANTERS: dict[str, Planter] = {
    **planters("experts_swapped", _expect("experts_swapped", "expert_order"), _swapped),
    **planters("topk_not_renormalised", _expect("topk_not_renormalised", "expert_weights"), _other_sum),
    **planters("expert_dropped", _expect("expert_dropped", "expert_dropped"), _dropped),
}
