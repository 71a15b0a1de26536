"""Plants faults of norms: their epsilon, their weight, the norm itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from driftprobe.engines.hf.norms import EPSILON, recognise
from driftprobe.engines.hf.planting.base import Planter, Site, Undo, cannot_act, set_attribute
from driftprobe.engines.hf.planting.swap import planters, swap_forward, swap_weight
from driftprobe.faults import Expected


def _epsilon(site: Site, strength: float) -> Expected:
    if not _with_epsilon(site):
        raise cannot_act("norm_epsilon", f"no module has {' or '.join(EPSILON)}",
                         "a model that keeps it as an attribute")  # fmt: skip
    return Expected(*_first_norm(site), "computation", "norm_epsilon", {"delta": strength})


def _with_epsilon(site: Site) -> list[tuple[Any, str]]:
    owners = [*(layer.module for layer in site.anatomy.layers), site.anatomy.final_norm]
    modules = [module for owner in owners if owner is not None for module in owner.modules()]
    norms = [module for module in modules if "norm" in type(module).__name__.lower()]
    return [(module, name) for module in norms for name in EPSILON if isinstance(getattr(module, name, None), float)]


def _change_epsilon(site: Site, strength: float) -> list[Undo]:
    return [set_attribute(module, name, getattr(module, name) + strength) for module, name in _with_epsilon(site)]


def _first_norm(site: Site) -> tuple[int | None, str]:
    """Return the first tap that a fault of every norm shows in."""
    if site.anatomy.layers[0].attn_norm is not None:
        return site.first(0, "attn_norm", "q_proj")
    return site.first(0, "q_norm", "k_norm", "ffn_norm", "x_mid", "x_out")


def _weighted(site: Site) -> list[Any]:
    """Return the norms before attention and MLP, and the final one, whose formula is known and has a weight."""
    layers = site.anatomy.layers
    modules = [norm for layer in layers for norm in (layer.attn_norm, layer.ffn_norm)] + [site.anatomy.final_norm]
    known = ((module, recognise(module)) for module in modules if module is not None)
    return [module for module, norm in known if norm is not None and norm.weight is not None]


def _step(site: Site, strength: float) -> float:
    """Return what is added to the weights: the 1 of (1 + weight) is lost, or one is added where there is none."""
    first = recognise(_weighted(site)[0])
    return -strength if first is not None and first.offset else strength


def _offset(site: Site, strength: float) -> Expected:
    if not _weighted(site) or site.anatomy.layers[0].attn_norm is None:
        raise cannot_act("norm_offset", "no norm with a weight before attention", "a norm that multiplies by a weight")
    return Expected(*_first_norm(site), "computation", "norm_offset", {"offset": float(_step(site, strength))})


def _change_offset(site: Site, strength: float) -> list[Undo]:
    step = _step(site, strength)
    return [swap_weight(module, "weight", lambda weight: weight + step) for module in _weighted(site)]


def _qk(site: Site, _strength: float) -> Expected:
    if "q_norm" not in site.taps:
        raise cannot_act("qk_norm_missing", "no norm of query and key heads", "a model that norms them")
    return Expected(*site.first(site.taps["q_norm"][0], "q_norm"), "computation", "norm_missing")


def _change_qk(site: Site, _strength: float) -> list[Undo]:
    norms = [norm for layer in site.anatomy.layers for norm in (layer.q_norm, layer.k_norm) if norm is not None]
    return [swap_forward(norm, _identity) for norm in norms]


def _identity(_forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda states, *_args, **_kwargs: states


def _final(site: Site, _strength: float) -> Expected:
    if "final_norm" not in site.taps:
        raise cannot_act("final_norm_missing", "no final norm", "a model with a norm before its output head")
    return Expected(None, "final_norm", "computation", "norm_missing")


def _change_final(site: Site, _strength: float) -> list[Undo]:
    return [swap_forward(site.anatomy.final_norm, _identity)]


PLANTERS: dict[str, Planter] = {
    **planters("norm_epsilon", _epsilon, _change_epsilon, prefill=True),
    **planters("norm_offset", _offset, _change_offset),
    **planters("qk_norm_missing", _qk, _change_qk),
    **planters("final_norm_missing", _final, _change_final),
}
