"""The lengths at which a transformers model switches, read from its configuration and modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from driftprobe.engines.hf.anatomy import Anatomy, Layer, text_config
from driftprobe.engines.hf.attention import attention_chunk, sliding_window

NO_LIMIT = 1 << 20
"""Positions allowed where a model states no limit of its own (ALiBi, state-space)."""
_ROPE = ("rope_parameters", "rope_scaling")
"""The same dictionary: today's name, and that of transformers before 5."""
_ORIGINAL = "original_max_position_embeddings"


def switches_of(model: Any, anatomy: Anatomy) -> dict[str, int]:
    """Return kind -> total length in tokens; kinds are those of `boundaries.WHY`, numbered where there are several."""
    config = text_config(model)
    found: dict[str, list[int]] = {}
    for layer in anatomy.layers:
        for kind, length in _of_layer(layer).items():
            found.setdefault(kind, []).append(length)
    found["context"] = _contexts(config)
    limit = max_positions(config)
    found["positions"] = [limit] if limit < NO_LIMIT else []
    return {
        kind if which == 0 else f"{kind}.{which + 1}": length
        for kind, lengths in found.items()
        for which, length in enumerate(sorted(set(lengths)))
    }


def max_positions(config: Any) -> int:
    """Return how many positions a model can take. Dynamic RoPE scaling goes past the trained ones, by its factor."""
    stated = int(getattr(config, "max_position_embeddings", 0) or NO_LIMIT)
    factors = [float(rope["factor"]) for rope in _ropes(config) if _kind(rope) == "dynamic" and rope.get("factor")]
    return int(stated * max([1.0, *factors]))


def _of_layer(layer: Layer) -> dict[str, int]:
    kinds = {
        "window": sliding_window(layer.attention, layer.index) if layer.attention is not None else None,
        "chunk": attention_chunk(layer.attention, layer.index),
        "conv": next(
            (m.kernel_size[0] for m in (layer.mixer or nn.Module()).modules() if isinstance(m, nn.Conv1d)), None
        ),
        "scan": getattr(layer.mixer, "chunk_size", None),
    }
    return {kind: length for kind, length in kinds.items() if isinstance(length, int) and length > 1}


def _contexts(config: Any) -> list[int]:
    """Return the context lengths that RoPE was trained on, where a longer one is reached by scaling."""
    stated = [getattr(config, _ORIGINAL, None), *(rope.get(_ORIGINAL) for rope in _ropes(config))]
    if any(_kind(rope) == "dynamic" for rope in _ropes(config)):
        stated.append(getattr(config, "max_position_embeddings", None))
    return [int(length) for length in stated if isinstance(length, int) and length > 0]


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Return every RoPE dictionary of a configuration; some models have one for each kind of layer."""
    found = [value for name in _ROPE if isinstance(value := getattr(config, name, None), dict)]
    return [*found, *(inner for rope in found for inner in rope.values() if isinstance(inner, dict))]


def _kind(rope: dict[str, Any]) -> object:
    return rope.get("rope_type", rope.get("type"))
