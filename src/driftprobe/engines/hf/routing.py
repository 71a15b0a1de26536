"""Routing aligned: experts chosen by prefill's own routers, in another arm (T, and the noise arms N).

A router's output is kept whole in prefill, and put in the place of the router's own for the same positions. It is put
in behind the spy's ears: what is recorded is what the arm's own router said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from driftprobe.engines.hf.anatomy import Layer

Kept = dict[int, Any]
"""Layer -> the output of its router over all tokens of a prefill."""


class Routing:
    """Hooks on every router, which keep or replace its output while they are told to."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.routers = {layer.index: layer.router for layer in layers if layer.router is not None}
        self.keeps: Kept | None = None
        self.forces: tuple[Kept, int, int] | None = None
        """What was kept, and the positions [start, stop) of the call to come."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the hooks in while the context lasts."""
        with ExitStack() as stack:
            for layer, router in self.routers.items():
                stack.callback(router.register_forward_hook(self._hook(layer)).remove)
            yield

    def _hook(self, layer: int) -> Callable[..., Any]:
        def hook(_module: object, _args: object, output: Any) -> Any:
            if self.keeps is not None:
                self.keeps[layer] = output
            if self.forces is None or layer not in self.forces[0]:
                return None
            kept, start, stop = self.forces
            if isinstance(output, tuple):
                return tuple(_aligned(own, put, start, stop) for own, put in zip(output, kept[layer], strict=True))
            return _aligned(output, kept[layer], start, stop)

        return hook


def _aligned(own: Any, kept: Any, start: int, stop: int) -> Any:
    """Return the kept rows of positions [start, stop) in a tensor's own shape, `[T, …]` or `[1, T, …]`."""
    if not isinstance(own, torch.Tensor):
        return own
    axis = 0 if own.dim() == 2 else 1
    rows = kept.narrow(axis, start, stop - start)
    return rows.to(own.dtype) if rows.shape == own.shape else own
