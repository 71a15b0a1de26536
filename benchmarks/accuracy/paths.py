"""Two ways to run one transformers model that ought to be equal: the paths that probe_paths is measured on.

A path is a function of the model, as a user would write it. The paths without a fault are benign runs; `path_faults`
changes one side of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from driftprobe.errors import UsageError

Path = Callable[[Any], None]
ARCHITECTURES = ("llama", "gpt2", "gemma2", "qwen3_moe", "bloom", "gpt_neox", "mixtral", "phi3", "mamba2")
"""Five that are tuned on, four held out."""
PADS = 2
PADDED_ROW = 1
"""The row of a padded batch that holds the text."""
BEFORE = (5, 6, 7, 8)
"""What the first prompt goes on with, behind the rows that both prompts share."""


@dataclass(frozen=True)
class Text:
    """What a pair of paths runs over."""

    tokens: tuple[int, ...]
    steps: int
    """How many tokens at the end are fed one by one, or generated."""

    @property
    def first(self) -> int:
        """How many tokens stand before those that are fed one by one."""
        return len(self.tokens) - self.steps

    @property
    def shared(self) -> int:
        """How many tokens a second prompt shares with the first."""
        return self.first // 2

    def cuts(self) -> tuple[int, ...]:
        """Return where the chunks of a chunked prefill and the steps behind it begin and end."""
        return (0, self.first // 3, self.first, *range(self.first + 1, len(self.tokens) + 1))


def call(model: Any, tokens: Sequence[int], start: int, cache: Any, **more: Any) -> Any:
    """Call a model on tokens behind a cache (None: an empty one) and return the cache that it hands back."""
    name = "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"
    if name == "cache_params":
        more["cache_position"] = torch.arange(start, start + len(tokens))
    if cache is not None:
        more[name] = cache
    return getattr(model(torch.tensor([list(tokens)]), use_cache=True, **more), name)


def whole(text: Text) -> Path:
    """All tokens in one call."""

    def run(model: Any) -> None:
        model(torch.tensor([text.tokens]), use_cache=False)

    return run


def pieces(
    text: Text, cuts: Sequence[int], *, late: int = 0, between: Callable[[Any, Any], None] | None = None
) -> Path:
    """The tokens in pieces on one cache; from the second piece on positions are `late` too high, where that is not 0.

    `between(model, cache)` is called once, behind the first piece.
    """

    def run(model: Any) -> None:
        cache = None
        for start, stop in pairwise(cuts):
            named = {"position_ids": torch.arange(start, stop)[None] + late} if late and start else {}
            cache = call(model, text.tokens[start:stop], start, cache, **named)
            if between is not None and start == 0:
                between(model, cache)

    return run


def growing(text: Text) -> Path:
    """No cache: each token calls the model on all that stands before it too."""

    def run(model: Any) -> None:
        for stop in range(text.first, len(text.tokens) + 1):
            model(torch.tensor([text.tokens[:stop]]), use_cache=False)

    return run


def generating(text: Text, use_cache: bool) -> Path:
    """Transformers' own greedy `generate`."""

    def run(model: Any) -> None:
        ids = torch.tensor([text.tokens[: text.first]])
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=text.steps + 1, min_new_tokens=text.steps + 1,
            do_sample=False, use_cache=use_cache,
        )  # fmt: skip

    return run


def padded(text: Text, side: str, *, positions: str = "tokens", masked: bool = True) -> Path:
    """The tokens with padding on one side, beside a shorter row.

    `positions`: `tokens` counts the tokens of a row, `slots` its padding too. `masked`: whether padding is hidden.
    """

    def run(model: Any) -> None:
        rows, width = [text.tokens[3:9], text.tokens], len(text.tokens) + PADS
        gaps = [(0,) * (width - len(row)) for row in rows]
        left = side == "left"
        ids = torch.tensor([gap + row if left else row + gap for gap, row in zip(gaps, rows, strict=True)])
        real = torch.tensor(
            [[0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g)
             for g, r in zip(gaps, rows, strict=True)]
        )  # fmt: skip
        more: dict[str, Any] = {}
        if "position_ids" in inspect.signature(model.forward).parameters:
            slots = torch.arange(width).expand(len(rows), -1)
            more["position_ids"] = slots if positions == "slots" else (real.cumsum(-1) - 1).clamp(min=0)
        model(ids, attention_mask=real if masked else torch.ones_like(real), use_cache=False, **more)

    return run


def _crop(cache: Any, kept: int) -> None:
    try:
        try:
            cache.crop(kept)
        except ValueError:  # newer versions are told how many rows go
            cache.crop(kept - cache.get_seq_length())
    except RuntimeError as error:  # sliding-window layers drop rows that a crop would need
        raise cannot(str(error)[:200]) from error


def second_prompt(text: Text, extra: int = 0) -> Path:
    """Another prompt first; of its rows those that both share stay, and `extra` more; then ours on the same cache."""

    def run(model: Any) -> None:
        cache = call(model, (*text.tokens[: text.shared], *BEFORE), 0, None)
        if not hasattr(cache, "crop") or "cache_params" in inspect.signature(model.forward).parameters:
            raise cannot("this model's cache cannot be cropped")
        _crop(cache, text.shared + extra)
        for start, stop in pairwise((text.shared, *text.cuts()[2:])):
            call(model, text.tokens[start:stop], start, cache)

    return run


Pair = tuple[Path, Path]
"""Reference and candidate."""
PAIRS: dict[str, Callable[[Text], Pair]] = {
    "chunked": lambda text: (whole(text), pieces(text, text.cuts())),
    "cache_off": lambda text: (growing(text), pieces(text, (0, *text.cuts()[2:]))),
    "generate": lambda text: (generating(text, False), generating(text, True)),
    "padded_left": lambda text: (whole(text), padded(text, "left")),
    "padded_right": lambda text: (whole(text), padded(text, "right")),
    "second_prompt": lambda text: (whole(text), second_prompt(text)),
}
"""Every pair that is measured. The reference is the side with the larger calls: prefill, in the words of a run."""


def cannot(measured: str) -> UsageError:
    """Return the error that says why a pair, or a fault on it, is nothing for a model."""
    return UsageError(
        "the path cannot run here", where="path", measured=measured, allowed="another architecture",
        next_step="choose another case",
    )  # fmt: skip
