"""Arm N: the same prefill with every op's result off by a rounding error, to see what rounding alone can do here.

Monte Carlo arithmetic (Parker 1997): each result y becomes y·(1 + a·ξ), ξ uniform in [−1, 1]. The size a is one
rounding to the storage dtype, and the probabilistic bound √K·u of a sum of K products (Higham and Mary 2019) in the
dtype that the sum is accumulated in.

A cast that is declared at a tap acts where it is declared: what goes into that op is off by a rounding to the cast's
dtype. So the floor behind it is what the model makes of that rounding, not a guess at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from driftprobe.engines.hf.attention import attention_functions, replaced
from driftprobe.fingerprint import CAST_ROUNDOFF, GRID_ROUNDOFF, UNIT_ROUNDOFF
from driftprobe.taps import BY_NAME


@contextmanager
def rounding_noise(model: nn.Module, seed: int, casts: dict[str, str]) -> Iterator[None]:
    """Perturb every op of a model while the context lasts; embeddings are looked up, not computed, and stay exact.

    `casts` are all that the engine declares: those named after no tap coarsen every sum, those named after a product of
    attention what that is given (`_CAST_OPERANDS`). Those of a cache are `with_cast_noise`'s.
    """
    generator = torch.Generator().manual_seed(seed)
    own = "float64" if next(model.parameters()).dtype == torch.float64 else "float32"
    sums = [CAST_ROUNDOFF[dtype] for place, dtype in casts.items() if place not in BY_NAME]
    coarsest_sum = max([UNIT_ROUNDOFF[own], *sums])
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding) or next(module.parameters(recurse=False), None) is None:
                continue
            hook = _perturbing(_terms(module), coarsest_sum, generator)
            stack.callback(module.register_forward_hook(hook).remove)
        stack.enter_context(_SoftmaxNoise(coarsest_sum, generator))
        stack.enter_context(_operand_noise(model, casts, generator))
        yield


def perturbed(value: torch.Tensor, terms: int, coarsest_sum: float, generator: torch.Generator) -> torch.Tensor:
    """Return a float tensor with each element off by up to one rounding and √terms accumulation errors."""
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in UNIT_ROUNDOFF:
        return value
    size = UNIT_ROUNDOFF[dtype] + float(terms**0.5) * coarsest_sum
    wide = torch.promote_types(value.dtype, torch.float32)
    noise = torch.rand(value.shape, generator=generator, dtype=wide).to(value.device) * 2 - 1
    return (value.to(wide) * (1 + size * noise)).to(value.dtype)


def with_cast_noise(cache: Any, seed: int, casts: dict[str, str]) -> None:
    """Make a cache hand out K and V as the coarser dtypes would that are declared for `k_cache` and `v_cache`.

    A float dtype rounds each element by its unit roundoff; an integer grid by half its step, of each row and head.
    """
    update = getattr(cache, "update", None)
    dtypes = [casts.get(tap) for tap in ("k_cache", "v_cache")]
    if update is None or not any(dtypes):
        return
    generator = torch.Generator().manual_seed(seed)

    def rounding(*args: Any, **kw: Any) -> Any:
        return tuple(_cast(rows, dtype, generator) for rows, dtype in zip(update(*args, **kw), dtypes, strict=True))

    cache.update = rounding


_CAST_OPERANDS = ("attn_scores", "attn_scores", "attn_ctx")
"""The tap of the product that reads them, for query, key and value."""


@contextmanager
def _operand_noise(model: nn.Module, casts: dict[str, str], generator: torch.Generator) -> Iterator[None]:
    """Hand query, key and value to attention functions as the casts would that are declared for their products.

    Attention that is computed inside its module shows none of them, and is left as it is.
    """
    dtypes = [casts.get(tap) for tap in _CAST_OPERANDS]
    with ExitStack() as stack:
        for mapping, name in attention_functions(model.modules()) if any(dtypes) else ():
            stack.enter_context(replaced(mapping, name, _with_cast_operands(mapping[name], dtypes, generator)))
        yield


def _with_cast_operands(
    function: Callable[..., Any], dtypes: list[str | None], generator: torch.Generator
) -> Callable[..., Any]:
    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        operands = (_cast(rows, dtype, generator) for rows, dtype in zip((query, key, value), dtypes, strict=True))
        return function(module, *operands, *args, **kw)

    return attention


def _cast(rows: torch.Tensor, dtype: str | None, generator: torch.Generator) -> torch.Tensor:
    if dtype is None:
        return rows
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    noise = torch.rand(rows.shape, generator=generator, dtype=wide.dtype).to(rows.device) * 2 - 1
    size = wide.abs().amax(dim=-1, keepdim=True) if dtype in GRID_ROUNDOFF else wide
    return (wide + size * CAST_ROUNDOFF[dtype] * noise).to(rows.dtype)


def _terms(module: nn.Module) -> int:
    """Return how many products one result of a module sums, at most."""
    matrices = [weight for weight in module.parameters(recurse=False) if weight.dim() > 1]
    return max((max(weight.shape[-2:]) for weight in matrices), default=1)


def _perturbing(terms: int, coarsest_sum: float, generator: torch.Generator) -> Callable[..., Any]:
    def hook(_module: object, _args: object, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return perturbed(output, terms, coarsest_sum, generator)
        if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
            return (perturbed(output[0], terms, coarsest_sum, generator), *output[1:])
        return output

    return hook


class _SoftmaxNoise(TorchFunctionMode):
    """Perturbs what goes into an attention's own softmax: scores that an eager kernel rounds to the model's dtype."""

    def __init__(self, coarsest_sum: float, generator: torch.Generator) -> None:
        super().__init__()
        self.coarsest_sum, self.generator = coarsest_sum, generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "softmax" and isinstance(args[0], torch.Tensor) and args[0].dim() == 4:
            args = (perturbed(args[0], 1, self.coarsest_sum, self.generator), *args[1:])
        return func(*args, **(kwargs or {}))
