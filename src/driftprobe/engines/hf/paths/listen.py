"""Hooks on every module of a model: a scouting run notes sizes and order, later runs copy the wanted rows.

Every tensor is copied when its module returns it: what a later op does to that buffer in place is not that module's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from driftprobe.engines.hf.paths.axes import Layout, RowOrders, Size, token_rows
from driftprobe.engines.hf.paths.calls import Call, Locate, Placed, Placer, read_call
from driftprobe.engines.hf.paths.names import Naming

Tensor = torch.Tensor
Key = tuple[str, str, int]
"""A module's qualified name, `output` or `input`, and which of its firings in one call."""


@dataclass(slots=True)
class Scouted:
    """What one run of one path let us see, without a number of it kept."""

    sizes: dict[Key, list[Size]] = field(default_factory=dict)
    shapeless: set[Key] = field(default_factory=set)
    """Points that gave no tensor."""
    shuffled: set[Key] = field(default_factory=set)
    """Points whose rows are tokens in another order."""
    fired: dict[Key, set[int]] = field(default_factory=dict)
    """Point -> the calls in which it fired."""
    placed: list[Placed] = field(default_factory=list)
    calls: int = 0
    sequence: list[int | None] = field(default_factory=list)
    """The token at every position of the sequence that the last call ended."""


@dataclass(slots=True)
class Heard:
    """The wanted rows of one run: of every position, what its last call computed."""

    rows: dict[Key, dict[int, Tensor]] = field(default_factory=dict)
    """Point -> absolute position -> a copy of that row, `[1, …]`."""
    placed: list[Placed] = field(default_factory=list)


class Listener:
    """Listens to every forward call of one model while `installed`.

    Without `layouts` it scouts. `sequence` and `row` are the `Placer`'s.
    """

    def __init__(
        self,
        model: nn.Module,
        naming: Naming,
        *,
        sequence: Sequence[int | None] | None = None,
        row: int | None = None,
        locate: Locate | None = None,
        layouts: dict[Key, Layout] | None = None,
        wanted: frozenset[int] = frozenset(),
    ) -> None:
        self.model, self.naming, self.locate = model, naming, locate
        self.layouts, self.wanted = layouts, wanted
        self.placer = Placer(sequence, row)
        self.scouted, self.heard = Scouted(), Heard()
        self._call: Call | None = None
        self._columns: tuple[tuple[int, int], ...] = ()
        self._row = 0
        self._depth = 0
        self._times: dict[tuple[str, str], int] = {}
        self._orders = RowOrders()
        self._inside: list[str] = []
        self._tainted: list[str] = []
        self._ours: dict[str, list[int]] = {}

    @contextmanager
    def installed(self) -> Iterator[Listener]:
        """Keep the hooks in while the context lasts."""
        with ExitStack() as stack:
            before = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(before.remove)
            for name, module in self.model.named_modules():
                if name:
                    stack.callback(module.register_forward_pre_hook(self._enter(name), with_kwargs=True).remove)
                after = module.register_forward_hook(self._leave(name))
                stack.callback(after.remove)
                self._ours[name] = [after.id]
            end = self.model.register_forward_hook(self._end)
            stack.callback(end.remove)
            self._ours[""].append(end.id)
            yield self

    def _speak_last(self, name: str, module: nn.Module) -> None:
        """Put our hooks behind those that the path itself has put in: the model goes on with what they change."""
        for hook in self._ours.get(name, ()):
            known = module._forward_hooks.pop(hook, None)
            if known is not None:
                module._forward_hooks[hook] = known

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._speak_last("", module)
        self._depth += 1
        if self._depth > 1:
            return
        self._times, self._orders, self._inside, self._tainted = {}, RowOrders(), [], []
        self._call = read_call(self.model, args, kwargs, self.locate)
        if self._call is None:
            return
        placed = self.placer.place(self._call)
        self._row = placed.row
        self._columns = tuple(pair for pair in placed.positions if pair[1] in self.wanted)
        (self.heard.placed if self.layouts is not None else self.scouted.placed).append(placed)

    def _end(self, _module: nn.Module, _args: object, output: Any) -> None:
        self._depth -= 1
        if self._depth or self._call is None:
            return
        self.placer.called(output)
        self.scouted.calls += 1
        self.scouted.sequence = list(self.placer.sequence_of_last_call)
        self._call, self._columns = None, ()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._speak_last(name, module)
            if self._call is None:
                return
            value = args[0] if args else kwargs.get("hidden_states")
            if self.layouts is None:
                self._watch_order(name, value)
            if name in self.naming.inputs:
                self._take(name, "input", value)
            self._inside.append(name)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            if self._call is None:
                return
            if name:
                self._inside.pop()
            self._take(name, "output", first_tensor(output))

        return hook

    def _watch_order(self, name: str, value: Any) -> None:
        """Taint what runs from here on inside the same caller, if this module is given tokens in another order."""
        self._tainted = [caller for caller in self._tainted if not caller or caller in self._inside]
        if self._orders.reordered(value):
            self._tainted.append(self._inside[-1] if self._inside else "")
        elif not self._tainted:
            self._orders.add(value)

    def _take(self, name: str, side: str, value: Any) -> None:
        time = self._times.get((name, side), 0)
        self._times[(name, side)] = time + 1
        key = (name, side, time)
        assert self._call is not None
        if self.layouts is None:
            self._scout(key, value, self._call)
        elif self._columns and isinstance(value, Tensor) and key in self.layouts:
            self._copy(key, value, self._call, self.layouts[key])

    def _scout(self, key: Key, value: Any, call: Call) -> None:
        self.scouted.fired.setdefault(key, set()).add(self.scouted.calls)
        if not isinstance(value, Tensor):
            self.scouted.shapeless.add(key)
            return
        size = Size(tuple(value.shape), call.rows, call.count, call.kept)
        self.scouted.sizes.setdefault(key, []).append(size)
        if any(caller != key[0] and (not caller or caller in self._inside) for caller in self._tainted):
            self.scouted.shuffled.add(key)
        else:
            self._orders.add(value)

    def _copy(self, key: Key, value: Tensor, call: Call, layout: Layout) -> None:
        found = token_rows(value, layout, self._row, call.rows, call.count)
        if found is None:
            return
        rows, first = found
        kept = self.heard.rows.setdefault(key, {})
        for column, position in self._columns:
            if column >= first:
                kept[position] = rows[column - first : column - first + 1].detach().clone()


def first_tensor(output: Any) -> Tensor | None:
    """Return the logits of an output that has them, else its first tensor; None without one."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)
