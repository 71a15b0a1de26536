"""Swaps a module's forward, weight or attribute for the time of one call: how faults of modules are planted.

Hooks that listen to a module still hear it, with the fault in it. Changes are made from the weights as they are when
the call begins, so that they follow a model whose parameters are lifted to another dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from driftprobe.engines.hf.planting.base import Call, Planter, Site, Undo, during, is_decode, is_prefill
from driftprobe.faults import Expected

Tensor = torch.Tensor
Change = Callable[[Site, float], list[Undo]]
Expect = Callable[[Site, float], Expected]


def planters(name: str, expect: Expect, change: Change, *, prefill: bool = False) -> dict[str, Planter]:
    """Return the planter of a fault in decode, and with `prefill` that of the same fault in prefills alone."""
    found = {name: _planter(expect, change, is_decode)}
    return {**found, f"{name}_prefill": _planter(expect, change, is_prefill)} if prefill else found


def _planter(expect: Expect, change: Change, when: Callable[[Call], bool]) -> Planter:
    @contextmanager
    def planted(site: Site, strength: float) -> Iterator[Expected]:
        expected = expect(site, strength)  # says first whether the fault can act here
        with during(site, when, lambda _call: change(site, strength)):
            yield expected

    return planted


def swap_forward(module: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Undo:
    """Put `make(forward)` in the place of a module's forward and return what puts it back."""
    before, own = module.forward, "forward" in module.__dict__
    module.forward = make(before)
    return partial(setattr, module, "forward", before) if own else partial(delattr, module, "forward")


def swap_weight(module: Any, name: str, change: Callable[[Tensor], Tensor]) -> Undo:
    """Put a changed copy in the place of a parameter of this module alone and return what puts it back."""
    before = getattr(module, name)
    setattr(module, name, nn.Parameter(change(before.detach()).to(before.dtype), requires_grad=False))
    return partial(setattr, module, name, before)


def on_result(change: Callable[[Tensor], Tensor]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what makes a forward whose result, or its first part, is changed."""

    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        return changed

    return make
