"""What one forward call lets us hear, and what a trial found out about a model: plain data.

Axes: G key/value heads, S visible rows, D head dimension, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from driftprobe.engines.hf.states import States

Tensor = torch.Tensor
Place = tuple[int | None, str]
Reach = tuple[int | None, int | None]
"""A layer's window and chunk in tokens; None where it has none."""


@dataclass(slots=True)
class Rows:
    """Cache rows as attention saw them in one layer: `[G, S, D]` each, in order of position."""

    keys_GSD: Tensor
    values_GSD: Tensor
    versions: tuple[int, int] | None = None
    """How often the cache's own tensors had been written to in place when they were heard; None for copies."""

    @classmethod
    def of(cls, keys_BGSD: Tensor, values_BGSD: Tensor, *, shared: bool) -> Rows:
        """Return the rows of one sequence: the tensors themselves where they are `shared`, else copies."""
        keys, values = keys_BGSD[0], values_BGSD[0]
        if not shared or keys.is_inference() or values.is_inference():
            return cls(keys.detach().clone(), values.detach().clone())
        return cls(keys, values, (keys._version, values._version))

    def as_heard(self) -> bool:
        """Whether nothing was written into these tensors since they were heard."""
        return self.versions in (None, (self.keys_GSD._version, self.values_GSD._version))


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
    called: set[int] = field(default_factory=set)
    """Layers whose attention is a function that their module calls; the others are watched op by op."""
    rewritten: set[int] = field(default_factory=set)
    """Layers whose cache rows are written to in place after the cache handed them out."""
    spent: set[Place] = field(default_factory=set)
    """Taps whose tensor the model changes in place after they fired."""


@dataclass(slots=True)
class Heard:
    """What one forward call let us hear. Tensors are copies of the asked rows only."""

    wanted: tuple[int, ...]
    """Rows of this call that are read, 0-based within the call."""
    first_position: int
    tokens: int
    batch: int = 1
    """Rows of the batch; ours is the first."""
    taps: dict[Place, list[Tensor]] = field(default_factory=dict)
    """Tap -> one tensor `[1, …]` for each wanted row; names that begin with _ are for the trial."""
    lends: bool = False
    """Whether the tensor of a one-token call may be kept as it is, not copied: nobody is known to write into it."""
    lent: dict[Place, tuple[int, int]] = field(default_factory=dict)
    """Tap kept so, behind a batch axis -> how often its tensor had been written to, and its heads (0: none)."""
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
    scored: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """Layer -> scores and probabilities `[H, S]` of each wanted row, over all columns of its attention."""
    cut: set[int] = field(default_factory=set)
    """Layers whose scores and cache rows are cut to what each wanted row may see (`cutting.py`)."""
    projected: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> output of its fused projection."""
    routed: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    """Layer -> input and output of its router."""
    past: Any = None
    """The cache that this call writes into."""
    shares: Callable[[int], bool] = lambda _layer: False
    """Whether what the cache hands out in a layer stays as it is, so that no copy is needed."""
    layer_done: Callable[[int], None] | None = None
    """Told when a layer is done and cut; None where nobody may look before the call is over."""
    states: dict[int, States] = field(default_factory=dict)
    """Layer -> the states that its mixer left behind."""

    def own(self, value: Tensor) -> Tensor:
        """Return the part of a `[B, T, …]` or `[B·T, …]` tensor that is our sequence's."""
        if self.batch == 1:
            return value
        if value.dim() == 2:
            return value[: self.tokens] if len(value) == self.batch * self.tokens else value
        return value[:1] if len(value) == self.batch else value

    def visible(self, row: int, stored: int, window: int | None, chunk: int | None) -> tuple[int, int, int]:
        """Return (low, high, start): columns [low, high) of `stored` that a row may see, and the first's position.

        A sliding window ends at the row; a chunk begins at a multiple of its size.
        """
        position = self.first_position + row
        offset = max(self.first_position + self.tokens - stored, 0)
        start = max(offset, position + 1 - window if window else 0, position - position % chunk if chunk else 0)
        return start - offset, position + 1 - offset, start
