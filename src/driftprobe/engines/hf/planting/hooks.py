"""Where faults of attention take hold: masks, rotary modules and functions, cache rows, heads.

Each helper changes one thing in the calls for which `when` holds, in every layer, and puts it back at the end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from driftprobe.engines.hf.cache import TupleCache, new_cache, past_of, stored_rows
from driftprobe.engines.hf.planting.base import Call, Site, Undo, cannot_act, during

Tensor = torch.Tensor
When = Callable[[Call], bool]
Rotate = Callable[..., tuple[Tensor, Tensor]]
"""A model's own `apply_rotary_pos_emb(q, k, cos, sin, …)`."""


@dataclass(slots=True)
class Switch:
    """Whether a changed call is running, and with what arguments."""

    on: bool = False
    call: Call = field(default_factory=dict)

    def rows(self, layer: int) -> int:
        """Return how many rows a layer's cache holds before this call."""
        try:
            keys = stored_rows(past_of(self.call), layer)[0]
        except (IndexError, AttributeError, TypeError):
            return 0
        return keys.shape[2] if isinstance(keys, Tensor) and keys.dim() == 4 else 0

    @property
    def position(self) -> int:
        """Absolute position of the call's first token."""
        return int(past_of(self.call).get_seq_length())


@contextmanager
def switched(site: Site, when: When) -> Iterator[Switch]:
    """Keep a switch that is on during the calls for which `when` holds."""
    switch = Switch()

    def change(call: Call) -> list[Undo]:
        switch.on, switch.call = True, call
        return [partial(setattr, switch, "on", False)]

    with during(site, when, change):
        yield switch


@contextmanager
def argument_changed(
    site: Site, switch: Switch, name: str, change: Callable[[int, Any, Tensor], Any]
) -> Iterator[None]:
    """Change one argument of every attention module: `change(layer, value, hidden states)` returns the new one."""
    with ExitStack() as stack:
        for layer in site.anatomy.layers:
            if layer.attention is not None:
                hook = partial(_argument_hook, switch, name, partial(change, layer.index))
                stack.callback(layer.attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _argument_hook(
    switch: Switch, name: str, change: Callable[[Any, Tensor], Any], module: Any, args: tuple[Any, ...], kwargs: Call
) -> tuple[tuple[Any, ...], Call]:
    if not switch.on:
        return args, kwargs
    states = args[0] if args else kwargs["hidden_states"]
    names = list(inspect.signature(module.forward).parameters)
    where = names.index(name) if name in names else len(args)
    if name not in kwargs and where < len(args):
        return (*args[:where], change(args[where], states), *args[where + 1 :]), kwargs
    return args, {**kwargs, name: change(kwargs.get(name), states)}


@contextmanager
def mask_changed(site: Site, switch: Switch, change: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Change every layer's mask in place, made additive: `[1, 1, T, S]`, 0 where a key is seen, else the dtype's
    lowest number."""

    def changed(layer: int, mask: Tensor | None, states: Tensor) -> Tensor:
        additive = _additive(mask, states, switch.rows(layer))
        change(layer, additive)
        return additive

    with argument_changed(site, switch, "attention_mask", changed):
        yield


def _additive(mask: Tensor | None, states: Tensor, stored: int) -> Tensor:
    lowest = torch.finfo(states.dtype).min
    if mask is not None and mask.dtype != torch.bool:
        return mask.clone()
    if mask is None:
        tokens = states.shape[1]
        seen = torch.ones(tokens, stored + tokens, dtype=torch.bool, device=states.device)
        mask = seen.tril(stored)[None, None]
    return torch.zeros(mask.shape, dtype=states.dtype, device=states.device).masked_fill(~mask, lowest)


def is_masked(mask: Tensor) -> Tensor:
    """Return where an additive mask hides a key."""
    return mask <= torch.finfo(mask.dtype).min / 2


def rotary_modules(site: Site) -> list[Any]:
    """Return the modules that make cosine and sine of positions."""
    return [module for module in site.model.modules() if "rotary" in type(module).__name__.lower()]


@contextmanager
def positions_changed(site: Site, switch: Switch, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the positions that rotary modules are told."""
    with ExitStack() as stack:
        for module in rotary_modules(site):

            def hook(_module: Any, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[Any, ...], Call]:
                return told_positions(args, kwargs, change) if switch.on else (args, kwargs)

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def told_positions(
    args: tuple[Any, ...], kwargs: Call, change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], Call]:
    """Return a rotary module's arguments with its positions changed."""
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": change(kwargs["position_ids"])}
    return (args[0], change(args[1]), *args[2:]), kwargs


@contextmanager
def rotation_changed(site: Site, name: str, change: Callable[[Rotate], Rotate]) -> Iterator[None]:
    """Put another function in place of each of the model's own that rotate queries and keys."""
    spaces = {
        id(space): space
        for layer in site.anatomy.layers
        if layer.attention is not None
        for space in [inspect.unwrap(type(layer.attention).forward).__globals__]
    }
    found = [(space, word) for space in spaces.values() for word in space if word.startswith("apply_rotary_pos_emb")]
    if not found:
        raise cannot_act(name, "no function that rotates queries and keys", "a model that calls one by name")
    before = [(space, word, space[word]) for space, word in found]
    try:
        for space, word, function in before:
            space[word] = change(function)
        yield
    finally:
        for space, word, function in before:
            space[word] = function


def reads_rows(name: str, call: Call, change: Callable[[Tensor], Tensor]) -> Undo:
    """Change keys and values between the cache and attention for one call: the cache itself is right."""
    return around_update(
        name, call, lambda update, *args, **kwargs: tuple(change(rows) for rows in update(*args, **kwargs))
    )


def around_update(name: str, call: Call, around: Callable[..., Any]) -> Undo:
    """Put `around(update, key, value, layer, …)` in place of the cache's update for one call."""
    cache = past_of(call)
    if isinstance(cache, TupleCache):
        raise cannot_act(name, "a model that keeps its cache in tuples", "a model with a Cache object")
    heard, update = cache.__dict__.get("update"), cache.update
    cache.update = partial(around, update)
    return partial(setattr, cache, "update", heard) if heard is not None else partial(delattr, cache, "update")


@contextmanager
def rows_handed(site: Site, change: Callable[[int, Tensor, Tensor], Any]) -> Iterator[None]:
    """Change what caches hand out, whoever listens: `change(layer, keys, values)` returns the rows handed on."""
    kind = type(new_cache(site.model))
    update = kind.update
    own = "update" in kind.__dict__

    def handed(cache: Any, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        return change(layer, *update(cache, keys, values, layer, *args, **kwargs)[:2])

    kind.update = handed
    try:
        yield
    finally:
        if own:
            kind.update = update
        else:
            del kind.update
