"""Which axis of a module's output counts tokens, told by the sizes that it has in calls of different lengths.

A size that equals the number of tokens once may be chance; one that does so in every call is an axis of tokens. Rows
that are tokens in another order (sorted by expert, say) have the right size, and are told by their contents.

Axes: B batch rows, T tokens of a call, N rows of a flattened tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of one output, and the call that it was seen in."""

    shape: tuple[int, ...]
    rows: int
    count: int
    kept: int = 0
    """See `calls.Call.kept`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a tensor has its tokens."""

    axis: int
    """The axis that counts them; 0 is batch rows and tokens in one axis, `[B·T, …]`."""


def find_layout(sizes: Iterable[Size]) -> Layout | None:
    """Return the layout that every size fits, or None: the output has no axis of tokens, or nothing tells which.

    The axis behind the batch is believed from one length on; any other must have followed the tokens through two.
    """
    seen = list(dict.fromkeys(sizes))
    if not seen or len({len(size.shape) for size in seen}) != 1:
        return None
    fitting = [axis for axis in range(len(seen[0].shape)) if all(_fits(axis, size) for size in seen)]
    told = len({size.count for size in seen}) > 1
    if told and 1 in fitting and any(size.kept for size in seen):
        return Layout(1)
    if len(fitting) != 1 and not told:
        return Layout(1) if 1 in fitting and len(seen[0].shape) > 2 else None
    if not fitting or (fitting[0] > 1 and not told):
        return None
    return Layout(1 if 1 in fitting else fitting[0])


def _fits(axis: int, size: Size) -> bool:
    if axis == 0:
        return size.shape[0] == size.rows * size.count
    tail = axis == 1 and size.kept and size.shape[axis] == size.kept
    return size.shape[0] in (1, size.rows) and (size.shape[axis] == size.count or bool(tail))


def follows_keys(layout: Layout, sizes: Iterable[Size]) -> bool:
    """Whether another axis grows with the text too, as that of attention's keys: rows of two calls then differ in size.

    `[B, H, T, K]`: a token's row holds one number for each key that its call can see, masked or not, so that a whole
    text and its chunks have no rows in common.
    """
    seen = list(dict.fromkeys(sizes))
    for axis in range(1, len(seen[0].shape)):
        lengths = {size.shape[axis] for size in seen}
        if axis != layout.axis and len(lengths) > 1 and any(size.shape[axis] == size.count for size in seen):
            return True
    return False


def token_rows(value: Tensor, layout: Layout, row: int, rows: int, count: int) -> tuple[Tensor, int] | None:
    """Return one batch row as `[T, …]` and the column of its first token, or None where the size does not fit."""
    if layout.axis == 0:
        if value.shape[0] != rows * count:
            return None
        return value.reshape(rows, count, *value.shape[1:])[row], 0
    if value.dim() <= layout.axis or value.shape[0] not in (1, rows):
        return None
    one = value[row if value.shape[0] == rows else 0].movedim(layout.axis - 1, 0)
    return (one, count - len(one)) if len(one) <= count else None


class RowOrders:
    """The rows of the tensors that one call has shown so far, to tell rows that come again in another order."""

    def __init__(self) -> None:
        self._ordered: set[bytes] = set()
        self._sorted: set[bytes] = set()

    def add(self, value: object) -> None:
        """Remember a tensor's rows."""
        codes = _row_codes(value)
        if codes is not None:
            self._ordered.add(codes.numpy().tobytes())
            self._sorted.add(codes.sort().values.numpy().tobytes())

    def reordered(self, value: object) -> bool:
        """Whether a tensor's rows are those of a known one in another order, and of none in the same order."""
        codes = _row_codes(value)
        if codes is None or codes.numpy().tobytes() in self._ordered:
            return False
        return codes.sort().values.numpy().tobytes() in self._sorted


def _row_codes(value: object) -> Tensor | None:
    """Return an exact 64-bit code for each row of a `[..., C]` float tensor; None for what has less than two rows."""
    if not isinstance(value, Tensor) or value.dim() < 2 or not value.is_floating_point() or value.numel() == 0:
        return None
    flat = value.detach().reshape(-1, value.shape[-1]).contiguous()
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size())
    if whole is None or len(flat) < 2:
        return None
    weights = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=torch.int64) * 0x1E3779B97F4A7C15
    return (flat.view(whole).to(torch.int64) * weights).sum(-1).cpu()
