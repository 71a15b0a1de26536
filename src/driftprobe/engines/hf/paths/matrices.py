"""The matrix of any module by the name of its tap: what a diagnosis needs to say what the module should have given."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from driftprobe.engines.base import Constant
from driftprobe.engines.hf.host import to_array
from driftprobe.engines.hf.paths.names import Naming, has_matrix
from driftprobe.engines.hf.weights import matrix_of


def module_weights(model: nn.Module, naming: Naming, layer: int | None, tensor: str) -> Iterator[Constant]:
    """Yield `<tap>.weight` `[out, in]` and `<tap>.bias` of a module with a matrix, `<tap>.table` of an embedding.

    Nothing for a tap that is no module's output, and for `embed`, which is compared bit for bit.
    """
    wanted = (layer, tensor.partition("#")[0])
    for name, module in model.named_modules():
        if naming.place(name, "output", 0) != wanted or tensor == "embed":
            continue
        if isinstance(module, nn.Embedding):
            yield Constant(layer, f"{tensor}.table", to_array(module.weight))
        elif has_matrix(module):
            matrix, bias = matrix_of(module), getattr(module, "bias", None)
            assert matrix is not None
            yield Constant(layer, f"{tensor}.weight", to_array(matrix))
            if isinstance(bias, torch.Tensor):
                yield Constant(layer, f"{tensor}.bias", to_array(bias))
