"""Plants faults of modules: norms, projections, MLP and experts, the residual stream, logits, state-space layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from driftprobe.engines.hf.planting.base import (
    Call,
    Planter,
    Site,
    Undo,
    cannot_act,
    during,
    is_decode,
    set_attribute,
)
from driftprobe.faults import Expected

_EPSILON = ("variance_epsilon", "eps", "epsilon")


@contextmanager
def _norm_epsilon(site: Site, strength: float) -> Iterator[Expected]:
    def change(_call: Call) -> list[Undo]:
        norms = [module for module in site.model.modules() if "norm" in type(module).__name__.lower()]
        undo = [
            set_attribute(module, name, getattr(module, name) + strength)
            for module in norms
            for name in _EPSILON
            if isinstance(getattr(module, name, None), float)
        ]
        if not undo:
            raise cannot_act("norm_epsilon", f"no module has {' or '.join(_EPSILON)}",
                             "a model that keeps it as an attribute")  # fmt: skip
        return undo

    with during(site, is_decode, change):
        yield Expected(*site.first(0, "attn_norm", "q_proj"), "computation", "norm_epsilon", {"delta": strength})


PLANTERS: dict[str, Planter] = {"norm_epsilon": _norm_epsilon}
