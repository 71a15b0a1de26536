"""The states that state-space, convolution and linear-attention layers carry from call to call in a Cache object.

A state stands for all tokens up to the last one fed: it has no rows by position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class States:
    """What one layer of a state-space model carries from call to call; empty where it has no such state.

    A layer may keep several of each (one for q, k and v). They are the cache's own tensors, not copies, with a batch
    axis of 1: a convolution state is `[1, C, W]`, a recurrent one `[1, H, D, N]` or `[1, C, N]`.
    """

    conv: tuple[Tensor, ...] = ()
    recurrent: tuple[Tensor, ...] = ()

    @property
    def all(self) -> tuple[Tensor, ...]:
        """Return every state, in one fixed order."""
        return self.conv + self.recurrent

    def copy(self) -> States:
        """Return the same states as copies."""
        return States(*(tuple(state.detach().clone() for state in states) for states in (self.conv, self.recurrent)))


def stored_states(cache: Any, layer: int) -> States:
    """Return a cache layer's own states, not copies; empty where the layer keeps none or none is written yet."""
    held = cache.layers[layer] if hasattr(cache, "layers") and layer < len(cache.layers) else None
    found = (getattr(held, name, None) for name in ("conv_states", "recurrent_states"))
    return States(*(_tensors(states) for states in found))


def _tensors(states: Any) -> tuple[Tensor, ...]:
    """Return the tensors among one or several states (a dictionary of them where a layer can keep several)."""
    several = states.values() if isinstance(states, dict) else states if isinstance(states, (list, tuple)) else [states]
    return tuple(state for state in several if isinstance(state, Tensor))
