"""What the taps of any module are called: canonical names where the anatomy is known, else the module's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from driftprobe.engines.hf.weights import matrix_of
from driftprobe.taps import BY_NAME, input_of

Place = tuple[int | None, str]
Point = tuple[str, str]
"""A module's qualified name, and `output` or `input`."""


@dataclass(frozen=True, slots=True)
class Naming:
    """The name of every point of one model."""

    canonical: dict[Point, Place]
    inputs: frozenset[str]
    """Modules whose input is a tap too."""
    stack: str
    """Qualified name of the ModuleList that holds the layers; empty without one."""
    layers: int
    heads: dict[str, int]
    """Canonical tap -> how many heads its channels hold."""

    def place(self, module: str, side: str, time: int) -> Place:
        """Return the layer and name of a point's `time`-th firing in one call."""
        known = self.canonical.get((module, side))
        layer, tensor = known if known is not None else self._own(module, side)
        return layer, f"{tensor}#{time + 1}" if time else tensor

    def _own(self, module: str, side: str) -> Place:
        layer, name = None, module
        head = f"{self.stack}."
        if self.stack and module.startswith(head):
            index, _, rest = module[len(head) :].partition(".")
            layer, name = int(index), rest
        name = f"{name}.in" if side == "input" else name
        return layer, f"{name}.out" if name in BY_NAME else name


def name_points(model: nn.Module, anatomy: Any, taps: dict[str, tuple[int, ...]]) -> Naming:
    """Return the names for a model; `anatomy` and its checked `taps` are those of a transformers model, else None."""
    names = {id(module): name for name, module in model.named_modules()}
    stack = _layer_stack(model)
    canonical: dict[Point, Place] = {("", "output"): (None, "logits")}
    heads: dict[str, int] = {}
    if anatomy is not None:
        found = {id(layer.module): layer for layer in anatomy.layers}
        owner = next((n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
                      and all(id(child) in found for child in m)), stack)  # fmt: skip
        stack = owner
        for place, module, side in _known_points(anatomy):
            if module is not None and id(module) in names and _promised(place, taps):
                canonical.setdefault((names[id(module)], side), place)
        heads = {"q_proj": anatomy.heads, "q_norm": anatomy.heads, "attn_ctx": anatomy.heads}
        heads |= dict.fromkeys(("k_proj", "v_proj", "k_norm"), anatomy.kv_heads)
    else:
        canonical |= _general_points(model, stack)
    naming = Naming(canonical, frozenset(), stack, 0, {})
    canonical |= dict(_matrix_inputs(model, naming))
    blocks = len(list(model.get_submodule(stack).children())) if stack else 0
    inputs = frozenset(name for name, side in canonical if side == "input")
    return Naming(canonical, inputs, stack, blocks, {k: n for k, n in heads.items() if n})


def _matrix_inputs(model: nn.Module, naming: Naming) -> Iterator[tuple[Point, Place]]:
    """Yield the input of every module with a matrix, unless its name says already which tap that is.

    With it and the matrix a diagnosis can tell what the module should have given.
    """
    for name, module in model.named_modules():
        layer, tensor = naming.place(name, "output", 0)
        known = (name, "input") in naming.canonical or (tensor in BY_NAME and tensor != "mlp_out")
        if name and not known and has_matrix(module):
            yield (name, "input"), (layer, input_of(tensor))


def has_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies its input with a matrix of floats, as its `weight` of two axes suggests."""
    matrix = None if isinstance(module, nn.Embedding) else matrix_of(module)
    return matrix is not None and torch.is_floating_point(matrix)


def _promised(place: Place, taps: dict[str, tuple[int, ...]]) -> bool:
    layer, tensor = place
    return tensor in taps and (layer is None or layer in taps[tensor])


def _known_points(anatomy: Any) -> Iterator[tuple[Place, nn.Module | None, str]]:
    yield (None, "embed"), anatomy.embed, "output"
    yield (None, "final_norm"), anatomy.final_norm, "output"
    for layer in anatomy.layers:
        i = layer.index
        yield (i, "x_in"), layer.module, "input"
        yield (i, "x_out"), layer.module, "output"
        for tensor in ("attn_norm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "ffn_norm", "mlp_out"):
            yield (i, tensor), getattr(layer, tensor), "output"
        yield (i, "attn_out"), layer.out_proj, "output"
        yield (i, "attn_ctx"), layer.out_proj, "input"
        yield (i, "x_mid"), layer.ffn_norm, "input"


def _general_points(model: nn.Module, stack: str) -> dict[Point, Place]:
    """Return what any model has: the first embedding, and the layers' own inputs and outputs."""
    found: dict[Point, Place] = {}
    embedding = next((name for name, module in model.named_modules() if isinstance(module, nn.Embedding)), None)
    if embedding is not None:
        found[(embedding, "output")] = (None, "embed")
    if stack:
        for index, _ in enumerate(model.get_submodule(stack).children()):
            found[(f"{stack}.{index}", "input")] = (index, "x_in")
            found[(f"{stack}.{index}", "output")] = (index, "x_out")
    return found


def _layer_stack(model: nn.Module) -> str:
    """Return the outermost ModuleList with most blocks, the first of equals; empty where there is none."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name]
    outer = [(name, module) for name, module in lists
             if not any(name.startswith(f"{other}.") for other, _ in lists)]  # fmt: skip
    return max(outer, key=lambda pair: len(pair[1]), default=("", None))[0]
