"""Small modules written by hand, for probe_paths: a cached recurrence, a convolution, experts; each can be broken.

Every model takes token ids `[B, T]` and a state, and returns logits (as a tensor, a tuple or an object) and the state.

Axes: B batch, T tokens, C channels, V vocabulary, K kernel, E experts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

VOCABULARY, CHANNELS, LAYERS, KERNEL = 53, 24, 3, 4
Tensor = torch.Tensor


class Recurrent(nn.Module):
    """h_t = tanh(W x_t + U h_{t-1}), one token after the other; `forgets` drops the state that a call is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.across = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.forgets = self.one_token_bug = False

    def forward(self, x_BTC: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        driven = self.inward(x_BTC)
        weight = self.across.weight
        h = torch.zeros_like(driven[:, 0]) if state is None or self.forgets else state
        found = []
        for t in range(driven.shape[1]):
            h = torch.tanh(driven[:, t] + h @ weight.T)
            found.append(h)
        out = torch.stack(found, dim=1)
        if self.one_token_bug and x_BTC.shape[1] == 1:
            out = out * 1.01
        return out, h


class Gru(nn.Module):
    """A GRU cell, called once a token."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(CHANNELS, CHANNELS)
        self.forgets = False

    def forward(self, x_BTC: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        h = x_BTC.new_zeros(len(x_BTC), CHANNELS) if state is None or self.forgets else state
        found = []
        for t in range(x_BTC.shape[1]):
            h = self.cell(x_BTC[:, t], h)
            found.append(h)
        return torch.stack(found, dim=1), h


class Convolution(nn.Module):
    """A causal depthwise convolution, channels first inside; `late` keeps a window that is one token old."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(CHANNELS, CHANNELS)
        self.conv1d = nn.Conv1d(CHANNELS, CHANNELS, KERNEL, groups=CHANNELS)
        self.late = False

    def forward(self, x_BTC: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        x_BCT = x_BTC.transpose(1, 2)
        past = x_BCT.new_zeros(len(x_BCT), CHANNELS, KERNEL - 1) if state is None else state
        window = torch.cat([past, x_BCT], dim=2)
        mixed = self.conv1d(window)
        kept = window[:, :, -KERNEL:-1] if self.late else window[:, :, 1 - KERNEL :]
        return mixed.transpose(1, 2) * torch.sigmoid(self.gate(x_BTC)), kept


class Experts(nn.Module):
    """Top-1 experts over tokens sorted by expert; `drops` routes nothing in calls that start with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(CHANNELS, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.shared = nn.Linear(CHANNELS, CHANNELS)
        self.sorted_in = nn.Identity()
        self.drops = False

    def forward(self, x_BTC: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        flat = x_BTC.reshape(-1, CHANNELS)
        choice = self.router(flat).argmax(-1)
        if self.drops and state is not None:
            choice = torch.zeros_like(choice)
        order = choice.argsort(stable=True)
        ordered = self.sorted_in(flat[order])
        out = torch.empty_like(ordered)
        for e, expert in enumerate(self.experts):
            here = choice[order] == e
            if bool(here.any()):
                out[here] = expert(ordered[here])
        back = torch.empty_like(out)
        back[order] = out
        return back.reshape(x_BTC.shape) + self.shared(x_BTC), x_BTC[:, -1]


class InPlace(nn.Module):
    """Returns a buffer that the block behind it adds to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x_BTC: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.linear(x_BTC), x_BTC[:, -1]


class Scale(nn.Module):
    """Scales what it is given, in place: the buffer of the module before."""

    def __init__(self) -> None:
        super().__init__()
        self.one_token_factor = 1.0

    def forward(self, h_BTC: Tensor) -> Tensor:
        return h_BTC.mul_(self.one_token_factor if h_BTC.shape[1] == 1 else 1.0)


class Block(nn.Module):
    """Norm, mixer, residual added in place."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer, self.scale = nn.LayerNorm(CHANNELS), mixer, Scale()

    def forward(self, x_BTC: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        h, state = self.mixer(self.norm(x_BTC), state)
        h = self.scale(h)
        h += x_BTC
        return h, state


class Toy(nn.Module):
    """Embedding, blocks, head. `returns` is how logits come back: `tensor`, `tuple` or `object`."""

    def __init__(self, mixer: type[nn.Module], returns: str = "tuple") -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, CHANNELS)
        self.blocks = nn.ModuleList(Block(mixer()) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, VOCABULARY, bias=False)
        self.returns = returns
        self.state: list[Tensor | None] = [None] * LAYERS

    def forward(self, ids: Tensor, state: list[Any] | None = None) -> Any:
        before = [None] * LAYERS if state is None else state
        x, after = self.tokens(ids), []
        for block, past in zip(self.blocks, before, strict=True):
            x, kept = block(x, past)
            after.append(kept)
        logits = self.head(self.norm(x))
        self.state = after
        if self.returns == "tensor":
            return logits
        return (logits, after) if self.returns == "tuple" else SimpleNamespace(logits=logits, state=after)


class Attention(nn.Module):
    """Causal attention with one head and rows `(keys, values)` as its state."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x_BTC: Tensor, state: Any) -> tuple[Tensor, Any]:
        q, k, v = self.qkv(x_BTC).chunk(3, dim=-1)
        if state is not None:
            k, v = torch.cat([state[0], k], dim=1), torch.cat([state[1], v], dim=1)
        new, seen = q.shape[1], k.shape[1]
        mask = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
        mixed = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)
        return self.out(mixed[:, 0]), (k, v)


MIXERS = (Recurrent, Gru, Convolution, Experts, InPlace, Attention)


def toy(mixer: type[nn.Module], *, dtype: str = "float32", returns: str = "tuple", seed: int = 0) -> Toy:
    """Return a toy in evaluation mode, weights drawn from a seed."""
    torch.manual_seed(seed)
    return Toy(mixer, returns).to(getattr(torch, dtype)).eval()
