"""What a GGUF file says of its model: types of its matrices, constants, weights; read beside llama.cpp, with gguf."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from driftprobe.engines.base import Constant
from driftprobe.errors import ModelError
from driftprobe.fingerprint import Array

_NORMS = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}
_PROJECTIONS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "attn_out": "attn_output"}
_PLAIN = frozenset({"llama", "qwen2"})
"""Architectures whose norms, rotation and scale are known to be as the constants here say."""


class File:
    """One GGUF file."""

    def __init__(self, path: Path) -> None:
        """Read its header. Raises ModelError for what is no whole GGUF file."""
        try:
            self._reader: Any = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ModelError(
                "not a GGUF file", where=str(path), measured=f"{type(error).__name__}: {error}"[:300],
                allowed="a whole GGUF file", next_step="copy it again; tools/gguf_model.py writes a small one",
            ) from error  # fmt: skip
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def matrix_types(self) -> tuple[str, ...]:
        """The types of its matrices, the most frequent first."""
        kinds = [t.tensor_type.name for t in self._reader.tensors if sum(n > 1 for n in t.shape) > 1]
        return tuple(sorted(set(kinds), key=kinds.count, reverse=True))

    def _field(self, name: str, default: Any = None) -> Any:
        found = self._reader.get_field(name)
        return default if found is None else found.contents()

    def _number(self, name: str) -> float | None:
        found = self._field(f"{self._field('general.architecture')}.{name}")
        return float(found) if isinstance(found, int | float) else None

    def _tensor(self, name: str) -> Array | None:
        """Return a tensor as it stands in the file, a quantised one as float32."""
        found = self._tensors.get(name)
        if found is None:
            return None
        if found.tensor_type.name in {"F32", "F16"}:
            return np.asarray(found.data)
        return np.asarray(gguf.quants.dequantize(found.data, found.tensor_type), dtype=np.float32)

    def constants(self, layers: frozenset[int]) -> Iterator[Constant]:
        """Yield the small constants of an architecture whose formulas are known; nothing of any other."""
        if self._field("general.architecture") not in _PLAIN:
            return
        yield from self._norm(None, "final_norm", "output_norm")
        for layer in sorted(layers):
            for tap, part in _NORMS.items():
                yield from self._norm(layer, tap, f"blk.{layer}.{part}")
            yield from self._attention(layer)

    def _norm(self, layer: int | None, tap: str, name: str) -> Iterator[Constant]:
        weight, epsilon = self._tensor(f"{name}.weight"), self._number("attention.layer_norm_rms_epsilon")
        if weight is not None and epsilon is not None:
            yield Constant(layer, f"{tap}.weight", weight)
            yield _plain(layer, f"{tap}.eps", epsilon)
            yield _plain(layer, f"{tap}.centred", 0.0)
            yield _plain(layer, f"{tap}.offset", 0.0)

    @property
    def head_size(self) -> int:
        """Dimensions of a head; 0 where the file does not say."""
        width, heads = self._number("embedding_length"), self._number("attention.head_count")
        return int(self._number("attention.key_length") or (width / heads if width and heads else 0))

    @property
    def rotated(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self._number("rope.dimension_count") or self.head_size)

    def _attention(self, layer: int) -> Iterator[Constant]:
        size = self.head_size
        if not size:
            return
        yield _plain(layer, "attn_scores.scale", size**-0.5)
        scaled = self._number("rope.scaling.factor") is not None or "rope_freqs.weight" in self._tensors
        if not scaled:
            count = self.rotated
            base = self._number("rope.freq_base") or 10000.0
            yield Constant(layer, "rope.inv_freq", base ** (-np.arange(0, count, 2, dtype=np.float64) / count))

    def weights(self, layer: int | None, tap: str) -> Iterator[Constant]:
        """Yield the matrix and bias of a projection, or of the output head."""
        if tap == "logits":
            head = self._tensor("output.weight")
            names = {"weight": self._tensor("token_embd.weight") if head is None else head}
        elif tap in _PROJECTIONS and layer is not None:
            names = {part: self._tensor(f"blk.{layer}.{_PROJECTIONS[tap]}.{part}") for part in ("weight", "bias")}
        else:
            return
        for part, array in names.items():
            if array is not None:
                yield Constant(layer, f"{tap}.{part}", array)


def _plain(layer: int | None, name: str, value: float) -> Constant:
    return Constant(layer, name, np.array([value], dtype=np.float64))
