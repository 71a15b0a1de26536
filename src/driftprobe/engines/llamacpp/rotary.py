"""One order of a head's dimensions for every engine: rotated pairs stand half a head apart, as in transformers.

llama.cpp's Llama rotates neighbouring dimensions (rope type NORM), and its GGUF files have the rows of the query and
key matrices in that order. What is recorded is put back, so that the same numbers hash alike in both engines.
"""

from __future__ import annotations

import numpy as np

from driftprobe.fingerprint import Array

TAPS = frozenset({"q_proj", "k_proj", "q_norm", "k_norm", "q_rope", "k_rope", "k_cache"})
"""Taps whose last axis is in the order of the rotation."""


def order_of(size: int, rotated: int, neighbours: bool) -> Array | None:
    """Return which of a head's `size` dimensions goes where, or None where they stand as they should.

    `rotated`: how many of them are rotated, the first ones. `neighbours`: whether dimension 2i is rotated with 2i + 1.
    """
    if not neighbours or rotated < 4:
        return None
    return np.concatenate([np.arange(0, rotated, 2), np.arange(1, rotated, 2), np.arange(rotated, size)])


def put_back(tap: str, array: Array, order: Array | None) -> Array:
    """Return a tap's tensor `[…, dim]` with its dimensions in the order of `order_of`."""
    return array if order is None or tap not in TAPS else np.ascontiguousarray(array[..., order])


def rows_put_back(name: str, matrix: Array, order: Array | None) -> Array:
    """Return a constant whose rows (of a matrix or bias, head after head) are a tap's dimensions, in that order."""
    tap = name.split(".", maxsplit=1)[0]
    if order is None or tap not in {"q_proj", "k_proj"}:
        return matrix
    heads = matrix.reshape(-1, len(order), *matrix.shape[1:])
    return np.ascontiguousarray(heads[:, order].reshape(matrix.shape))
