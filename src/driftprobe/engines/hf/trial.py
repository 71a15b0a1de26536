"""A trial run: which taps this model has, told by the numbers that flow and not by the modules' names.

A tap counts where both a prefill and a decode step made it fire and its neighbours agree: the norm before attention
is what attention is given, a fused projection's v is what the cache is given, a rotation changes what it rotates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from driftprobe.engines.hf.anatomy import Anatomy
from driftprobe.engines.hf.fused import find_layout, same_bits
from driftprobe.engines.hf.heard import Heard, Learned, Place
from driftprobe.taps import BY_NAME, execution_order

Tensor = torch.Tensor
_ROTATION_TOLERANCE = 0.02
"""How much longer or shorter a rotated query may be: rounding in bfloat16, and no scale."""


def trial_length(anatomy: Anatomy) -> int:
    """Return a number of tokens that cannot be taken for a number of heads."""
    return next(n for n in (3, 5, 7) if n not in (anatomy.heads, anatomy.kv_heads))


def learn(heard: Heard, anatomy: Anatomy, learned: Learned) -> None:
    """Note what a trial prefill tells of layouts, routers and residual streams."""
    row = heard.wanted[0]
    learned.expanded |= {layer for layer in heard.given if _remade(heard, layer)}
    for layer, fused in heard.projected.items():
        value = _first(heard, (layer, "_value"))
        layout = None if value is None else find_layout(fused, value, row, anatomy.heads, anatomy.kv_heads)
        if layout is not None:
            learned.layouts[layer] = layout
    for layer, (given, output) in heard.routed.items():
        learned.router_outputs[layer] = _router_outputs(anatomy.layers[layer].router, given, output)
    for layer in range(len(anatomy.layers)):
        if _mid_from_mlp(layer, heard):
            learned.mid_from_mlp.add(layer)


def _remade(heard: Heard, layer: int) -> bool:
    """Whether attention was given other keys or values than the cache handed back (up to repeated heads)."""
    cached, given = heard.cache.get(layer), heard.given[layer]
    if cached is None:
        return False
    pairs = ((cached.keys_GSD, given.keys_GSD), (cached.values_GSD, given.values_GSD))
    return not all(same_bits(_repeated(ours, theirs), theirs) for ours, theirs in pairs)


def _repeated(rows_GSD: Tensor, like_HSD: Tensor) -> Tensor:
    return rows_GSD.repeat_interleave(max(len(like_HSD) // len(rows_GSD), 1), dim=0)


def taps_of(trials: Iterable[Heard]) -> dict[str, tuple[int, ...]]:
    """Return tap -> layers of what fired and fits in every trial call."""
    calls = list(trials)
    places = set.intersection(*(set(heard.taps) for heard in calls))
    found: dict[str, list[int]] = {}
    for layer, tensor in sorted(places, key=lambda place: execution_order(*place)):
        if tensor in BY_NAME and all(fits((layer, tensor), heard) for heard in calls):
            found.setdefault(tensor, []).extend([] if layer is None else [layer])
    return {tensor: tuple(where) for tensor, where in found.items()}


def fits(place: Place, heard: Heard) -> bool:
    """Whether a tap found by its module's name stands where the tap's definition says."""
    layer, tensor = place
    same, differ = _MUST_EQUAL.get(tensor, ()), _MUST_DIFFER.get(tensor)
    if same and not any(_equal(heard, place, (layer, other)) for other in same):
        return False
    if differ is not None and _one_tensor(heard, place, (layer, differ)):
        return False
    if tensor in ("q_norm", "k_norm"):
        return _equal_if_known(heard, (layer, f"_{tensor}_in"), (layer, f"{tensor[0]}_proj"))
    if tensor in ("q_rope", "k_rope"):
        return _rotated(heard, place)
    if tensor == "attn_ctx":
        return _equal_if_known(heard, place, (layer, "_attention_out"))
    if tensor == "x_mid":
        return (layer, "ffn_norm") not in heard.taps or fits((layer, "ffn_norm"), heard) or _mid_from_mlp(layer, heard)
    if tensor == "final_norm":
        last = max((i for i, name in heard.taps if name == "x_out" and i is not None), default=None)
        return _equal(heard, (None, "_final_norm_in"), (last, "x_out"))
    return True


_MUST_EQUAL = {"attn_norm": ("_attention_in", "_mixer_in"), "ffn_norm": ("_mlp_in",)}
"""Tap -> what it must be: the input of any of these."""
_MUST_DIFFER = {
    "x_mid": "x_in",  # a parallel block has no stream between attention and MLP
    "mlp_out": "x_out",  # an MLP that adds the residual itself
}


def _rotated(heard: Heard, place: Place) -> bool:
    """Whether rotation made this tensor: the unrotated one is another (a layer without RoPE hands on the same)."""
    layer, letter = place[0], place[1][0]
    norm: Place = (layer, f"{letter}_norm")
    before = norm if norm in heard.taps and fits(norm, heard) else (layer, f"{letter}_proj")
    plain, turned = _first(heard, before), _first(heard, place)
    if plain is None or turned is None:
        return place not in heard.unnamed
    if _one_tensor(heard, before, place):
        return False
    if place not in heard.unnamed:
        return True
    sizes = [float(t.double().norm()) for t in (plain, turned)]
    return plain.shape == turned.shape and abs(sizes[0] - sizes[1]) <= _ROTATION_TOLERANCE * sizes[0]


def _mid_from_mlp(layer: int | None, heard: Heard) -> bool:
    """Whether the MLP reads the residual stream itself: no module of the layer made what it is given."""
    given = _first(heard, (layer, "_mlp_in"))
    if given is None:
        return False
    made = [rows[0] for (i, name), rows in heard.taps.items() if i == layer and name.startswith("_child_")]
    stream = _first(heard, (layer, "x_in"))
    return not any(same_bits(given, other) for other in [*made, *([] if stream is None else [stream])])


def _router_outputs(router: Any, given: Any, output: Any) -> dict[str, int]:
    """Return which of a router's outputs are its logits, told by computing them, and its choice of experts."""
    outputs = output if isinstance(output, tuple) else (output,)
    weight = getattr(router, "weight", None)
    if not isinstance(given, Tensor) or not isinstance(weight, Tensor) or weight.dim() != 2:
        return {}
    bias = getattr(router, "bias", None)
    rows = given.reshape(-1, given.shape[-1]).double()
    expected = rows @ weight.double().T + (bias.double() if isinstance(bias, Tensor) else 0.0)
    found: dict[str, int] = {}
    for which, value in enumerate(outputs):
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        flat = value.reshape(-1, value.shape[-1])
        if flat.is_floating_point() and flat.shape == expected.shape and _close(flat.double(), expected):
            found.setdefault("router_logits", which)
        elif not flat.is_floating_point() and flat.dtype != torch.bool and len(flat) == len(rows):
            found.setdefault("expert_ids", which)
    return found


def _close(value: Tensor, expected: Tensor) -> bool:
    return bool((value - expected).norm() <= _ROTATION_TOLERANCE * expected.norm())


def _first(heard: Heard, place: Place) -> Tensor | None:
    rows = heard.taps.get(place)
    return None if rows is None else rows[0]


def _equal(heard: Heard, left: Place, right: Place) -> bool:
    a, b = _first(heard, left), _first(heard, right)
    return a is not None and b is not None and same_bits(a, b)


def _one_tensor(heard: Heard, left: Place, right: Place) -> bool:
    """Whether two taps are one tensor; rows with NaN in them may be alike and come from anywhere."""
    a = _first(heard, left)
    return _equal(heard, left, right) and a is not None and bool(torch.isfinite(a).all())


def _equal_if_known(heard: Heard, left: Place, right: Place) -> bool:
    return left not in heard.taps or right not in heard.taps or _equal(heard, left, right)
