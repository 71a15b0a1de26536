"""Plants faults of the MLP: another activation, and a result that depends on how long the prefill is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from driftprobe.engines.hf.activations import FUNCTIONS, activations, name_of
from driftprobe.engines.hf.anatomy import Layer
from driftprobe.engines.hf.planting.base import Call, Planter, Site, Undo, cannot_act, during, is_prefill, set_attribute
from driftprobe.engines.hf.planting.swap import on_result, planters, swap_forward
from driftprobe.faults import Expected

_OTHER = {"silu": "gelu", "gelu": "silu", "gelu_tanh": "silu", "relu": "gelu"}
_NEAR = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}
LONG = 24
"""Rows beyond which the MLP of `length_dependent` gives something else."""


class _Module(nn.Module):
    """A function as a module, to stand where a model keeps its activation as one."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, states: torch.Tensor, *_: object) -> torch.Tensor:
        """Apply the function."""
        return self.function(states)


def _named(layer: Layer) -> list[tuple[Any, str, str]]:
    """Return (owner, attribute, name) of the activations that are known by what they compute."""
    named = ((owner, name, name_of(getattr(owner, name))) for owner, name in activations(layer))
    return [(owner, name, kind) for owner, name, kind in named if kind]


def _planters(fault: str, others: dict[str, str]) -> dict[str, Planter]:
    def expect(site: Site, _strength: float) -> Expected:
        known = [kind for _, _, kind in _named(site.anatomy.layers[0])]
        if not known or known[0] not in others:
            raise cannot_act(fault, f"activation {known[0] if known else 'unknown'}", " or ".join(others))
        return Expected(*site.first(0, "mlp_out", "x_out"), "computation", "activation", {"name": others[known[0]]})

    def change(site: Site, _strength: float) -> list[Undo]:
        undo = []
        for layer in site.anatomy.layers:
            for owner, name, kind in _named(layer):
                other = FUNCTIONS[others[kind]]
                is_module = isinstance(getattr(owner, name), nn.Module)
                undo.append(set_attribute(owner, name, _Module(other) if is_module else other))
        return undo

    return planters(fault, expect, change)


@contextmanager
def _length_dependent(site: Site, strength: float) -> Iterator[Expected]:
    modules = [layer.mlp_out for layer in site.anatomy.layers if layer.mlp_out is not None]
    if not modules:
        raise cannot_act("length_dependent", "no MLP found", "a model with one")

    def is_long(call: Call) -> bool:
        return is_prefill(call) and int(call["input_ids"].shape[1]) > LONG

    def change(_call: Call) -> list[Undo]:
        return [swap_forward(module, on_result(lambda result: result * (1.0 + strength))) for module in modules]

    with during(site, is_long, change):
        yield Expected(*site.first(0, "mlp_out", "x_out"), "H0", "prefill_length")


PLANTERS: dict[str, Planter] = {
    **_planters("activation_other", _OTHER),
    **_planters("activation_tanh", _NEAR),
    "length_dependent": _length_dependent,
}
