"""When a planted fault acts: before a one-token call on a filled cache, or after a prefill has written its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from driftprobe.engines.hf.anatomy import Anatomy
from driftprobe.engines.hf.cache import filled, past_of
from driftprobe.errors import UsageError
from driftprobe.faults import Expected

Undo = Callable[[], None]
Call = dict[str, Any]
"""The keyword arguments of one forward call, to be changed in place."""


@dataclass(frozen=True)
class Site:
    """Where a fault is planted."""

    model: Any
    anatomy: Anatomy
    taps: dict[str, tuple[int, ...]]
    """Tap -> layers where this model has it."""
    latent: bool = False
    """Whether the cache holds something from which keys and values are made anew."""

    def first(self, layer: int | None, *tensors: str) -> tuple[int | None, str]:
        """Return the first of these taps that this model has in a layer: where the fault shows first."""
        found = (t for t in tensors if t in self.taps and (layer is None or layer in self.taps[t]))
        return layer, next(found, tensors[-1])


Planter = Callable[[Site, float], AbstractContextManager[Expected]]
"""Keeps a fault of a strength planted while the context lasts; says what must be found."""


def is_decode(call: Call) -> bool:
    """Whether a call feeds one token to a filled cache."""
    return bool(call["input_ids"].shape[1] == 1 and filled(past_of(call)))


def is_prefill(call: Call) -> bool:
    """Whether a call feeds an empty cache."""
    return not filled(past_of(call))


@contextmanager
def during(site: Site, when: Callable[[Call], bool], change: Callable[[Call], list[Undo]]) -> Iterator[None]:
    """Change the model or the call's arguments in the calls for which `when` holds; undone after each of them."""
    undo: list[Undo] = []

    def pre_hook(_model: object, args: tuple[Any, ...], call: Call) -> tuple[tuple[Any, ...], Call]:
        if when(call):
            call = dict(call)
            undo.extend(change(call))
        return args, call

    def post_hook(*_: object) -> None:
        while undo:
            undo.pop()()

    with ExitStack() as stack:
        stack.callback(site.model.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
        stack.callback(site.model.register_forward_hook(post_hook, with_kwargs=True).remove)
        try:
            yield
        finally:
            post_hook()  # a call that failed did not come to its post-hook


@contextmanager
def after_prefill(site: Site, change: Callable[[Any], None]) -> Iterator[None]:
    """Change the cache that a prefill has just written."""

    prefills = False

    def pre_hook(_model: object, _args: object, call: Call) -> None:
        nonlocal prefills
        prefills = call["input_ids"].shape[1] > 1 or is_prefill(call)

    def post_hook(_model: object, _args: object, _call: Call, output: Any) -> None:
        if prefills:
            change(past_of(output))

    with ExitStack() as stack:
        stack.callback(site.model.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
        stack.callback(site.model.register_forward_hook(post_hook, with_kwargs=True).remove)
        yield


def set_attribute(module: Any, name: str, value: Any) -> Undo:
    """Set an attribute and return what puts it back."""
    before = getattr(module, name)
    setattr(module, name, value)
    return partial(setattr, module, name, before)


def cannot_act(name: str, measured: str, allowed: str) -> UsageError:
    """Return the error that says why a fault changes nothing here."""
    return UsageError(
        "the fault cannot act here", where=f"--fault {name}", measured=measured, allowed=allowed,
        next_step="choose another fault (`driftprobe faults`), prompt or model",
    )  # fmt: skip
