"""Lifts a model to float64, its own casts to float32 and below included, with the model's code untouched.

A model in float64 does not compute in float64: norms, RoPE, softmax and routers cast to float32 by themselves, and
rounding of float32's size stays. While a model is lifted its parameters and buffers hold float64 numbers, and every
call that asks for float32, bfloat16 or float16 (`.float()`, `.to(torch.float32)`, `softmax(dtype=…)`, a factory's
dtype, the default dtype) gets float64. Integers and rounding through float8 are left: content, and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Tensor = torch.Tensor
RUNG = "float64"
_COARSER = (torch.float32, torch.bfloat16, torch.float16)
_LIFTED: dict[Any, Any] = {
    **dict.fromkeys(_COARSER, torch.float64),
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
    **dict.fromkeys(("torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor"), "torch.DoubleTensor"),
}
_METHODS = {
    Tensor.float: Tensor.double,
    Tensor.half: Tensor.double,
    Tensor.bfloat16: Tensor.double,
}
_AS_THEY_ARE = frozenset(("view", "__get__", "__set__", "copy_", "set_", "can_cast", "promote_types", "result_type"))
"""Functions whose dtype is no cast (`view` reads bits anew), and those that change or name a tensor they are given."""


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """Make a model compute in float64 while the context lasts, and put everything back bit for bit at its end.

    Hooks and wrapped modules stay. Tied weights stay tied. Experts compute one by one: grouped matrix products refuse
    float64.
    """
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, default)
        stack.enter_context(_wide_numbers(model))
        stack.enter_context(_experts_one_by_one(model))
        torch.set_default_dtype(torch.float64)
        stack.enter_context(_WideCasts())
        yield


@contextmanager
def _wide_numbers(model: nn.Module) -> Iterator[None]:
    """Give float64 numbers to every parameter, buffer and tensor attribute; the tensors stay the same objects."""
    modules = list(model.modules())
    buffers = [(module, dict(module._buffers)) for module in modules]
    held = {id(tensor): tensor for module in modules for tensor in _tensors(module) if tensor.dtype in _LIFTED}
    before = [(tensor, tensor.data) for tensor in held.values()]
    try:
        for tensor in held.values():
            tensor.data = tensor.data.to(_LIFTED[tensor.dtype])
        yield
    finally:
        for module, own in buffers:  # a model may have put other ones in their place while it ran
            module._buffers.clear()
            module._buffers.update(own)
        for tensor, data in before:
            tensor.data = data


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (tensor for tensor in module._parameters.values() if tensor is not None)
    yield from (tensor for tensor in module._buffers.values() if tensor is not None)
    yield from (value for value in vars(module).values() if isinstance(value, Tensor))


@contextmanager
def _experts_one_by_one(model: nn.Module) -> Iterator[None]:
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    known = [c for c in configs.values() if hasattr(c, "_experts_implementation")]
    before = [(config, config._experts_implementation) for config in known]
    try:
        for config in known:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


class _WideCasts(TorchFunctionMode):
    """Gives float64 to whoever asks for float32, bfloat16 or float16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _AS_THEY_ARE:
            return func(*args, **kwargs)
        func = _METHODS.get(func, func)
        args = tuple(_wide(value) for value in args)
        kwargs = {name: _wide(value) for name, value in kwargs.items()}
        if not _in_place(getattr(func, "__name__", "")):
            args, kwargs = _of_one_width(args, kwargs)
        return func(*args, **kwargs)


def _in_place(name: str) -> bool:
    """Whether a function of this name writes into its first operand, which then must stay the tensor that it is."""
    if name.endswith("__"):
        return name == "__setitem__" or name.startswith("__i")
    return name.endswith("_")


def _wide(value: object) -> object:
    return _LIFTED.get(value, value) if isinstance(value, (torch.dtype, str)) else value


def _of_one_width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the operands with a coarser tensor widened beside a float64 one: a constant that a closure has kept."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) < 2 or torch.float64 not in dtypes or dtypes.isdisjoint(_COARSER):
        return args, kwargs
    return tuple(map(_widened, args)), {name: _widened(value) for name, value in kwargs.items()}


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in _COARSER else value


class Narrowings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every op that still makes a coarser float out of float64, whoever called it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[str, str] = {}
        """Op -> the coarsest dtype that it made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        made = [t.dtype for t in _flat(output) if t.dtype in _COARSER]
        if made and any(t.dtype == torch.float64 for t in _flat((*args, *(kwargs or {}).values()))):
            self.seen[str(func)] = str(max(made, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")
        return output

    @property
    def coarsest(self) -> str | None:
        """The coarsest dtype that was made, or None."""
        return max(self.seen.values(), key=lambda name: torch.finfo(getattr(torch, name)).eps, default=None)


def _flat(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
