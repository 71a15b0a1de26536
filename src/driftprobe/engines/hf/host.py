"""Tensors on the host: from torch to NumPy, bit for bit."""

from __future__ import annotations

import torch

from driftprobe.fingerprint import DTYPES, Array


def to_array(tensor: torch.Tensor) -> Array:
    """Return a tensor as a NumPy array on the host, in its own dtype (bfloat16 and float8 through ml_dtypes)."""
    host = tensor.detach().cpu().contiguous()
    name = str(host.dtype).removeprefix("torch.")
    if name.startswith(("bfloat16", "float8")):
        width = torch.int16 if name == "bfloat16" else torch.uint8
        return host.view(width).numpy().view(DTYPES[name])
    array: Array = host.numpy()
    return array
