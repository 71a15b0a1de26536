"""Boundaries: the lengths at which something in a model switches, each to be probed at −1, 0 and +1.

An engine states its model's switches as numbers (`EngineFacts.switches`). What counts is the total length: all tokens
up to the step's own, those of the prompt and this one. At a total of L a sliding window of L is full, at L + 1 the
oldest row must go; a cache of L rows, which is what decode finds then, is the same boundary seen by the prefill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LONGEST = 8200
"""The longest total that is probed unless the caller says otherwise: past windows and contexts of 8192."""
OFFSETS = (-1, 0, 1)
SHORTEST = 2
"""A prompt of one token and the step's own."""

WHY = {
    "window": "the sliding window is full",
    "chunk": "the attention chunk is full",
    "conv": "the convolution has seen as many tokens as its kernel is wide",
    "scan": "the state scan's chunk is full",
    "context": "the context that RoPE was trained on is full: scaling may switch",
    "positions": "the model's last position",
    "block": "the cache block is full",
    "tile": "the kernel's tile is full",
}
"""Switch -> what happens at its length. An engine may state others."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """One length to probe."""

    name: str
    """`window_4096-1`, `window_4096`, `window_4096+1`: the prompt's name."""
    length: int
    """Total length in tokens: the prompt's and the first step's own."""
    why: str

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return self.length - 1


@dataclass(frozen=True, slots=True)
class Boundaries:
    """What is probed, shortest first, and what is not, with the reason in place of the why."""

    probed: tuple[Boundary, ...] = ()
    left_out: tuple[Boundary, ...] = ()


def boundaries(
    switches: Mapping[str, int], *, max_positions: int, steps: int = 1, longest: int = LONGEST
) -> Boundaries:
    """Return the lengths around each switch; `steps` steps must fit behind a prompt that is probed.

    `switches` maps a kind, of `WHY` or the engine's own, to a total length in tokens; a kind may be numbered
    (`window.2`). Of two boundaries with one length the first named stands for both.
    """
    probed: dict[int, Boundary] = {}
    left_out = []
    for kind, at in switches.items():
        for offset in OFFSETS:
            length = at + offset
            name = f"{kind.partition('.')[0]}_{at}" + (f"{offset:+d}" if offset else "")
            found = Boundary(name, length, WHY.get(kind.partition(".")[0], "a switch that the engine states"))
            reason = _left_out(length, max_positions - steps + 1, longest)
            if reason:
                left_out.append(Boundary(name, length, reason))
            else:
                probed.setdefault(length, found)
    return Boundaries(tuple(probed[length] for length in sorted(probed)), tuple(left_out))


def _left_out(length: int, room: int, longest: int) -> str:
    if length < SHORTEST:
        return f"shorter than a prompt of one token and a step ({SHORTEST})"
    if length > room:
        return f"beyond the model's positions ({room} for a first step)"
    return f"longer than the longest that is probed ({longest})" if length > longest else ""
