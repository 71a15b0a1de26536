"""Cuts scores and cache rows to the columns that each wanted row may see, or gave weight to.

Axes: H query heads, G key/value heads, S columns, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from driftprobe.engines.hf.heard import Heard, Learned, Reach

Tensor = torch.Tensor
Span = tuple[int, int, int]
"""Columns [low, high), and the position of the first."""


def cut(
    heard: Heard, layers: Sequence[int], declared: Callable[[int], Reach], learned: Learned, *, rotary: bool
) -> None:
    """Make the taps of scores and cache rows of some layers from what was heard of them.

    `declared` tells a layer's window and chunk, `rotary` whether keys are turned. A device is waited for once, whatever
    the number of layers.
    """
    heard.cut.update(layers)
    ends = _ends_of_weight(probs for layer in layers for _, probs in heard.scored.get(layer, ()))
    for layer in layers:
        window, chunk = declared(layer)
        reach = heard.windows.get(layer, window), chunk
        seen = _cut_scores(heard, layer, reach, ends)
        if layer in heard.cache:
            _cut_rows(heard, layer, learned, reach, seen, rotary)


def _spans(heard: Heard, stored: int, reach: Reach) -> list[Span]:
    return [heard.visible(row, stored, *reach) for row in heard.wanted]


def _cut_scores(heard: Heard, layer: int, reach: Reach, ends: Iterator[tuple[int, int]]) -> tuple[int, list[Span]]:
    """Return how many columns the scores are over, and the span of each wanted row; (0, []) without scores."""
    pairs = heard.scored.get(layer)
    if not pairs:
        return 0, []
    stored = pairs[0][0].shape[1]
    spans = [_widened(span, next(ends)) for span in _spans(heard, stored, reach)]
    for which, tensor in enumerate(("attn_scores", "attn_probs")):
        cuts = zip(pairs, spans, strict=True)
        heard.taps[(layer, tensor)] = [_within(pair[which], low, high).unsqueeze(0) for pair, (low, high, _) in cuts]
        heard.row_start[(layer, tensor)] = [start for _, _, start in spans]
    return stored, spans


def _cut_rows(
    heard: Heard, layer: int, learned: Learned, reach: Reach, seen: tuple[int, list[Span]], rotary: bool
) -> None:
    cached = heard.cache[layer]
    rows = heard.given.get(layer, cached) if layer in learned.expanded else cached
    stored = rows.keys_GSD.shape[1]
    spans = _spans(heard, stored, reach)
    if layer in learned.expanded or (layer, "_value") not in heard.taps:
        newest = [high - 1 for _, high, _ in spans]  # the cache was not given keys and values, or not heard
        for name, kept in (("_key", rows.keys_GSD), ("_value", rows.values_GSD)):
            heard.taps[(layer, name)] = [kept[:, at : at + 1].transpose(0, 1) for at in newest]
            heard.lent.pop((layer, name), None)
    if rotary:
        heard.taps[(layer, "k_rope")] = heard.taps[(layer, "_key")]
        if (layer, "_key") in heard.lent:
            heard.lent[(layer, "k_rope")] = heard.lent[(layer, "_key")]
    spans = seen[1] if seen[0] == stored else spans
    for tensor, kept in (("k_cache", rows.keys_GSD), ("v_cache", rows.values_GSD)):
        heard.taps[(layer, tensor)] = [_within(kept, low, high).transpose(0, 1) for low, high, _ in spans]
        heard.row_start[(layer, tensor)] = [start for _, _, start in spans]


def _within(of_all: Tensor, low: int, high: int) -> Tensor:
    """Return [low, high) of the second axis, with no op where that is all of it."""
    return of_all if low == 0 and high == of_all.shape[1] else of_all[:, low:high]


def _ends_of_weight(probs: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Yield the first column that is given weight and the one behind the last, of each `[H, S]`; (S, 0) without any."""
    given = [probs_HS > 0 for probs_HS in probs]
    return ends_on_host(given) if all(weighty.is_cpu for weighty in given) else ends_on_device(given)


def ends_on_host(given: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Yield the ends of what is true in any row of each bool `[H, S]`, by NumPy, whose calls are shorter."""
    for weighty_HS in given:
        at = np.flatnonzero(weighty_HS.numpy().any(axis=0))
        yield (int(at[0]), int(at[-1]) + 1) if at.size else (weighty_HS.shape[1], 0)


def ends_on_device(given: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Yield the same, and wait for the device once."""
    found = []
    for weighty_HS in given:
        weighty = weighty_HS.any(dim=0)
        column = torch.arange(len(weighty), device=weighty.device)
        found += [column.masked_fill(~weighty, len(weighty)).min(), (column + 1).masked_fill(~weighty, 0).max()]
    ends = iter(torch.stack(found).tolist() if found else ())
    yield from zip(ends, ends, strict=True)


def _widened(span: Span, weighty: tuple[int, int]) -> Span:
    """Return a span with the columns beyond it that are given weight: a leak, or a row too many."""
    low, high, start = span
    first = min(low, weighty[0])
    return first, max(high, weighty[1]), start - (low - first)
