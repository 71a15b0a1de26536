"""Plants faults of the output head: its soft-cap, its scale, rows of it that are old."""

from __future__ import annotations

import torch

from driftprobe.engines.hf.anatomy import text_config
from driftprobe.engines.hf.planting.base import Planter, Site, Undo, cannot_act, set_attribute
from driftprobe.engines.hf.planting.swap import on_result, planters, swap_forward, swap_weight
from driftprobe.engines.hf.weights import output_head
from driftprobe.faults import Expected

Tensor = torch.Tensor
STALE = (3, 4, 5, 6)
"""Tokens whose output embedding is old."""


def _softcap(site: Site, _strength: float) -> Expected:
    if not getattr(text_config(site.model), "final_logit_softcapping", None):
        raise cannot_act("logit_softcap_missing", "logits are not soft-capped", "a model that caps them (Gemma 2)")
    return Expected(None, "logits", "computation", "logit_softcap")


def _change_softcap(site: Site, _strength: float) -> list[Undo]:
    return [set_attribute(text_config(site.model), "final_logit_softcapping", None)]


def _scale(site: Site, strength: float) -> Expected:
    if output_head(site.model) is None or getattr(text_config(site.model), "final_logit_softcapping", None):
        raise cannot_act("logit_scale", "no output head found, or its logits are capped", "a plain output head")
    return Expected(None, "logits", "computation", "logit_scale", {"factor": strength})


def _change_scale(site: Site, strength: float) -> list[Undo]:
    if isinstance(getattr(site.model, "logit_scale", None), float):
        return [set_attribute(site.model, "logit_scale", site.model.logit_scale * strength)]
    return [swap_forward(output_head(site.model), on_result(lambda result: result * strength))]


def _stale(site: Site, _strength: float) -> Expected:
    head = output_head(site.model)
    if head is None or head.weight.shape[0] < 8 * len(STALE):
        raise cannot_act("stale_output_embedding", "no output head, or a tiny one", f"{8 * len(STALE)} tokens or more")
    return Expected(None, "logits", "computation", "output_embedding", {"tokens": STALE})


def _change_stale(site: Site, strength: float) -> list[Undo]:
    def old(weight: Tensor) -> Tensor:
        rows, draw = list(STALE), torch.Generator().manual_seed(weight.shape[0])
        noise = torch.randn(len(rows), weight.shape[1], generator=draw, dtype=torch.float64).to(weight.device)
        changed = weight.double().clone()
        size = changed[rows].norm(dim=-1, keepdim=True) / weight.shape[1] ** 0.5
        changed[rows] += strength * size * noise
        return changed

    return [swap_weight(output_head(site.model), "weight", old)]


PLANTERS: dict[str, Planter] = {
    **planters("logit_softcap_missing", _softcap, _change_softcap),
    **planters("logit_scale", _scale, _change_scale),
    **planters("stale_output_embedding", _stale, _change_stale),
}
