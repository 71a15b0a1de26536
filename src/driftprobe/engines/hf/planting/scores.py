"""Plants faults of scores: their scale, their soft-cap, learned sinks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from driftprobe.engines.hf.anatomy import text_config
from driftprobe.engines.hf.planting.base import (
    Call,
    Planter,
    Site,
    Undo,
    cannot_act,
    during,
    is_decode,
    is_prefill,
    set_attribute,
)
from driftprobe.faults import Expected

_SCALE = ("scaling", "scale", "inv_norm_factor", "softmax_scale")
_SOFTCAP = ("attn_logit_softcapping", "logit_softcapping")


def _scaled(name: str, when: Callable[[Call], bool], factor: Callable[[Site, float, float], float]) -> Planter:
    """Return the planter of a fault that multiplies the scale of the scores."""

    @contextmanager
    def planted(site: Site, strength: float) -> Iterator[Expected]:
        found = [
            (layer.attention, word)
            for layer in site.anatomy.layers
            for word in _SCALE
            if isinstance(getattr(layer.attention, word, None), float)
        ]
        if not found:
            raise cannot_act(name, f"no module has {' or '.join(_SCALE)}", "a model that keeps it as an attribute")

        def change(_call: Call) -> list[Undo]:
            return [
                set_attribute(module, word, getattr(module, word) * factor(site, strength, getattr(module, word)))
                for module, word in found
            ]

        first = factor(site, strength, getattr(*found[0]))
        seen = first if when is is_decode else 1.0 / first
        with during(site, when, change):
            where = site.first(0, "attn_scores", "attn_probs", "attn_ctx")
            yield Expected(*where, "computation", "score_scale", {"factor": seen})

    return planted


def _of_hidden_size(site: Site, _strength: float, scale: float) -> float:
    """Return what makes 1/√(hidden size) out of a scale."""
    return float(text_config(site.model).hidden_size ** -0.5 / scale)


def _without(name: str, words: tuple[str, ...], change: Callable[[Any], Any], expected: tuple[str, str]) -> Planter:
    """Return the planter of a fault that takes an attribute away from every attention module that has it."""

    @contextmanager
    def planted(site: Site, _strength: float) -> Iterator[Expected]:
        found = [
            (layer, word)
            for layer in site.anatomy.layers
            for word in words
            if getattr(layer.attention, word, None) is not None
        ]
        if not found:
            raise cannot_act(name, f"no module has {' or '.join(words)}", "a model that has it")

        def taken(_call: Call) -> list[Undo]:
            return [set_attribute(layer.attention, word, change(getattr(layer.attention, word)))
                    for layer, word in found]  # fmt: skip

        with during(site, is_decode, taken):
            where = site.first(found[0][0].index, expected[0], "attn_probs", "attn_ctx")
            yield Expected(*where, "computation", expected[1])

    return planted


def _sunk(sinks: Any) -> Any:
    return torch.nn.Parameter(torch.full_like(sinks, -torch.inf), requires_grad=False)


PLANTERS: dict[str, Planter] = {
    "attn_scale": _scaled("attn_scale", is_decode, lambda _site, strength, _scale: strength),
    "scale_missing": _scaled("scale_missing", is_decode, lambda _site, _strength, scale: 1.0 / scale),
    "scale_wrong_dim": _scaled("scale_wrong_dim", is_decode, _of_hidden_size),
    "prefill_scale": _scaled("prefill_scale", is_prefill, lambda _site, strength, _scale: strength),
    "softcap_missing": _without("softcap_missing", _SOFTCAP, lambda _cap: None, ("attn_scores", "score_softcap")),
    "sinks_lost": _without("sinks_lost", ("sinks",), _sunk, ("attn_probs", "sinks_lost")),
}
