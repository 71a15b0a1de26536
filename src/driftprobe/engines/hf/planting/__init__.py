"""Plants the faults of `driftprobe faults` in a transformers model, from outside, with hooks on its forward call.

The engine does not know of them: it feeds tokens and listens as ever. Faults of the cache's contents act after a
prefill, as a wrong write would; faults of the decode computation act in one-token calls on a filled cache. A fault that
cannot act in a model says so; none does nothing in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from driftprobe.engines.hf.planting import attention, modules, statespace
from driftprobe.engines.hf.planting.base import Planter, Site, cannot_act
from driftprobe.faults import Expected, find_fault

PLANTERS: dict[str, Planter] = {**attention.PLANTERS, **modules.PLANTERS, **statespace.PLANTERS}

__all__ = ["PLANTERS", "Site", "cannot_act", "plant"]


@contextmanager
def plant(name: str, site: Site, strength: float | None = None) -> Iterator[Expected]:
    """Keep a fault planted in a model while the context lasts, and say what must be found.

    Raises UsageError where the fault is unknown, or cannot act in this model; while it runs, where it cannot act on a
    prompt.
    """
    fault, anatomy = find_fault(name), site.anatomy
    if len(anatomy.layers) < fault.min_layers or anatomy.kv_heads < fault.min_kv_heads:
        raise cannot_act(name, f"{len(anatomy.layers)} layers, {anatomy.kv_heads} KV heads",
                         f"{fault.min_layers} layers, {fault.min_kv_heads} KV heads or more")  # fmt: skip
    with PLANTERS[name](site, fault.strengths[0] if strength is None else strength) as expected:
        yield expected
