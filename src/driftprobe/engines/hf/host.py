"""Tensors on the host: from torch to NumPy, bit for bit, and from an accelerator without waiting for it."""

from __future__ import annotations

import torch

from driftprobe.fingerprint import DTYPES, Array


def to_array(tensor: torch.Tensor) -> Array:
    """Return a tensor as a NumPy array on the host, in its own dtype (bfloat16 and float8 through ml_dtypes).

    Of one on the host it is a view, with its strides.
    """
    if tensor.requires_grad or not tensor.is_cpu:
        tensor = tensor.detach().cpu()
    name = _SPECIAL.get(tensor.dtype)
    if name is not None:
        return tensor.view(torch.int16 if name == "bfloat16" else torch.uint8).numpy().view(DTYPES[name])
    array: Array = tensor.numpy()
    return array


_SPECIAL = {getattr(torch, name): name for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)}
"""Dtypes that NumPy knows through ml_dtypes alone."""


class Transfer:
    """Brings tensors to the host; on a CPU they are there."""

    def __init__(self, *, immediate: bool = True) -> None:
        self.immediate = immediate
        """Whether a tensor can be read inside a call without waiting for its device."""

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor on the host; what it holds counts after `wait`."""
        return tensor

    def wait(self) -> None:
        """Return when everything sent is there."""


class PinnedTransfer(Transfer):
    """Copies into pinned memory behind the kernels in the device's queue, and waits once for all copies."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(immediate=False)
        self.device = device
        self._sent = False

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """See Transfer."""
        if tensor.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._sent = True
        return host.copy_(tensor.detach(), non_blocking=True)

    def wait(self) -> None:
        """See Transfer."""
        if self._sent:
            torch.cuda.current_stream(self.device).synchronize()
        self._sent = False


def transfer_for(device: torch.device) -> Transfer:
    """Return the way to the host from a device; one without pinned memory is read tensor by tensor, after the call."""
    return PinnedTransfer(device) if device.type == "cuda" else Transfer(immediate=device.type == "cpu")
