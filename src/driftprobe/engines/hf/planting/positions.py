"""Plants faults of positions: rotations for another position, base, pairing or scale; ALiBi distances."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from driftprobe.causes import Parameters
from driftprobe.engines.hf.planting.base import (
    Call,
    Planter,
    Site,
    Undo,
    cannot_act,
    during,
    is_decode,
    is_prefill,
    set_attribute,
)
from driftprobe.engines.hf.planting.hooks import (
    Rotate,
    argument_changed,
    positions_changed,
    rotary_modules,
    rotation_changed,
    switched,
    told_positions,
)
from driftprobe.faults import Expected

Tensor = torch.Tensor
_ALIBI = ("alibi", "position_bias")


def _found(site: Site, cause: str, parameters: Parameters, *taps: str) -> Expected:
    """Return what must be found of a wrong rotation: in the first layer that rotates."""
    rotating = [layer for tap in taps for layer in site.taps.get(tap, ())]
    return Expected(*site.first(min(rotating, default=0), *taps, "attn_scores"), "computation", cause, parameters)


def _positions(name: str, cause: str, told: Callable[[float], Parameters],
               change: Callable[[float, Tensor], Tensor]) -> Planter:  # fmt: skip
    """Return the planter of a fault that tells rotary modules other positions in decode."""

    @contextmanager
    def planted(site: Site, strength: float) -> Iterator[Expected]:
        expected = _found(site, cause, told(strength), "q_rope", "k_rope")
        if rotary_modules(site):
            with switched(site, is_decode) as switch, positions_changed(site, switch, partial(change, strength)):
                yield expected
            return
        with during(site, is_decode, lambda call: _told(name, site, call, partial(change, strength))):
            yield expected

    return planted


def _told(name: str, site: Site, call: Call, change: Callable[[Tensor], Tensor]) -> list[Undo]:
    """Change the call's own positions, in a model that rotates without a module of its own."""
    if not site.anatomy.rotary or "position_ids" not in call:
        raise cannot_act(name, "no rotary embedding that is told positions", "a model with RoPE")
    call["position_ids"] = change(call["position_ids"])
    return []


@contextmanager
def _rope_base(site: Site, strength: float) -> Iterator[Expected]:
    modules = _rotating("rope_base", site)

    def change(_call: Call) -> list[Undo]:
        return [
            set_attribute(module, name, _of_other_base(getattr(module, name), strength))
            for module in modules
            for name in (*module._buffers, *vars(module))
            if name.endswith("inv_freq") and "original" not in name
            if isinstance(getattr(module, name), Tensor)
        ]

    with during(site, is_decode, change):
        yield _found(site, "rope_base", {"factor": strength}, "q_rope", "k_rope")


def _of_other_base(frequencies: Tensor, factor: float) -> Tensor:
    """Return frequencies b^(-2i/d) with b times a factor, in float64: the module rounds them as it does its own."""
    exponent = torch.arange(len(frequencies), dtype=torch.float64, device=frequencies.device) / len(frequencies)
    return frequencies.double() * factor**-exponent


@contextmanager
def _rope_partial(site: Site, _strength: float) -> Iterator[Expected]:
    """Leave the slower half of the frequencies unrotated."""
    modules = _rotating("rope_partial", site)
    count = max((len(v) for m in modules for n, v in m._buffers.items() if n.endswith("inv_freq") and v is not None),
                default=0)  # fmt: skip
    if count < 2:
        raise cannot_act("rope_partial", f"{count} rotary frequencies", "2 or more")

    def change(_call: Call) -> list[Undo]:
        return [
            set_attribute(module, name, torch.where(torch.arange(len(value)) < len(value) // 2, value, 0.0 * value))
            for module in modules
            for name, value in module._buffers.items()
            if value is not None and name.endswith("inv_freq") and "original" not in name
        ]

    with during(site, is_decode, change):
        yield _found(site, "rope_dims", {"dims": 2 * (count // 2)}, "q_rope", "k_rope")


def _rotating(name: str, site: Site) -> list[Any]:
    modules = rotary_modules(site)
    if not modules:
        raise cannot_act(name, "no rotary module", "a model with RoPE in a module of its own")
    return modules


@contextmanager
def _rope_interleaved(site: Site, _strength: float) -> Iterator[Expected]:
    """Pair neighbouring dimensions where the model pairs halves, and the reverse."""
    name = "rope_interleaved"
    pairing = "interleaved" if _pairs_halves(name, site) else "half-split"
    with switched(site, is_decode) as switch:

        def other(function: Rotate) -> Rotate:
            def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
                if not switch.on:
                    return function(q, k, cos, sin, *args, **kwargs)
                dims, halves, out_halves = _layout(function, q, cos, sin, args, kwargs)
                into = _order(dims, q.shape[-1], halves)
                back = torch.argsort(into) if halves == out_halves else torch.arange(len(into))
                turned = function(q[..., into], k[..., into], cos, sin, *args, **kwargs)
                return tuple(rows[..., back] for rows in turned)

            return rotate

        with rotation_changed(site, name, other):
            yield _found(site, "rope_pairing", {"pairing": pairing}, "q_rope", "k_rope")


def _order(dims: int, width: int, halves: bool) -> Tensor:
    """Return the order that brings pairs of the other kind to where the model's own function expects its pairs."""
    alternate = torch.cat([torch.arange(0, dims, 2), torch.arange(1, dims, 2)])
    order = alternate if halves else torch.argsort(alternate)
    return torch.cat([order, torch.arange(dims, width)])


def _layout(function: Rotate, q: Tensor, cos: Tensor, sin: Tensor, args: Any, kwargs: Any) -> tuple[int, bool, bool]:
    """Return how many dimensions a function rotates, and whether pairs are halves in its input and in its result."""
    shape = (1, 1, cos.shape[-2], q.shape[-1])
    axis = kwargs.get("unsqueeze_dim", 1)
    first = torch.zeros(shape if axis == 1 else (1, shape[2], 1, shape[3]), dtype=q.dtype, device=q.device)
    first[..., 0] = 1.0
    second = torch.zeros_like(first)
    second[..., 1] = 1.0
    touched, partner = (
        # the last token's: the first may stand at position 0, where nothing turns
        [int(i) for i in function(x, x, cos, sin, *args, **kwargs)[0].flatten(0, 2)[-1].nonzero().flatten()]
        for x in (first, second)
    )
    width = cos.shape[-1]
    doubled = bool((cos[..., : width // 2] == cos[..., width // 2 :]).all() or (cos[..., ::2] == cos[..., 1::2]).all())
    return (width if doubled else 2 * width), touched != partner, touched != [0, 1]


def _pairs_halves(name: str, site: Site) -> bool:
    """Run a rotation once to see which dimensions it pairs."""
    seen: list[bool] = []

    def look(function: Rotate) -> Rotate:
        def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(_layout(function, q, cos, sin, args, kwargs)[1])
            return function(q, k, cos, sin, *args, **kwargs)

        return rotate

    with rotation_changed(site, name, look), torch.no_grad():
        site.model(input_ids=torch.tensor([[1, 2]], device=site.model.device))
    if not seen:
        raise cannot_act(name, "no rotation in a run", "a model with RoPE")
    return seen[0]


def _of_new_key(
    name: str, cause: str, change: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
) -> Planter:
    """Return the planter of a wrong rotation of the new key alone."""

    @contextmanager
    def planted(site: Site, _strength: float) -> Iterator[Expected]:
        if site.latent:
            raise cannot_act(name, "a cache of latents, from which keys are made anew", "a cache of K and V")
        with switched(site, is_decode) as switch:

            def other(function: Rotate) -> Rotate:
                def rotate(q: Tensor, k: Tensor, *rest: Any, **kwargs: Any) -> Any:
                    turned, key = function(q, k, *rest, **kwargs)
                    if switch.on:
                        key = change(lambda x: function(q, x, *rest, **kwargs)[1], k, key)
                    return turned, key

                return rotate

            with rotation_changed(site, name, other):
                yield _found(site, cause, {"of": "k"}, "k_rope")

    return planted


@contextmanager
def _prefill_rope(site: Site, strength: float) -> Iterator[Expected]:
    """Rotate queries, and queries alone, for positions that are off, in prefill."""
    later: dict[int, tuple[Any, Any]] = {}
    with switched(site, is_prefill) as switch, ExitStack() as stack:

        def shifted(module: Any, args: tuple[Any, ...], kwargs: Call, output: Any) -> None:
            if switch.on:
                args, kwargs = told_positions(args, kwargs, lambda positions: positions + int(strength))
                later[id(output[0])] = (output, module.forward(*args, **kwargs))

        def other(function: Rotate) -> Rotate:
            def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
                turned = function(q, k, cos, sin, *args, **kwargs)
                if not switch.on:
                    return turned
                return function(q, k, *later[id(cos)][1], *args, **kwargs)[0], turned[1]

            return rotate

        for module in _rotating("prefill_rope", site):
            stack.callback(module.register_forward_hook(shifted, with_kwargs=True).remove)
        stack.enter_context(rotation_changed(site, "prefill_rope", other))
        yield _found(site, "rope_position", {"offset": -int(strength)}, "q_rope")


@contextmanager
def _alibi_offset(site: Site, strength: float) -> Iterator[Expected]:
    """Make every cached key farther from the newest one than it is; a row constant would be nothing to softmax."""
    word = _alibi_argument(site)

    def change(_layer: int, bias: Tensor, _states: Tensor) -> Tensor:
        farther = bias.clone()
        farther[..., :-1] -= strength * (bias[..., -1:] - bias[..., -2:-1])
        return farther

    with switched(site, is_decode) as switch, argument_changed(site, switch, word, change):
        yield Expected(*site.first(0, "attn_scores", "attn_probs"), "computation", "alibi", {"offset": strength})


def _alibi_argument(site: Site) -> str:
    module = next((layer.attention for layer in site.anatomy.layers if layer.attention is not None), None)
    names = () if module is None else inspect.signature(module.forward).parameters
    for word in _ALIBI:
        if word in names:
            return word
    raise cannot_act("alibi_offset", "attention that is given no linear biases", "a model with ALiBi")


def _offset(by: int) -> Callable[[float], Parameters]:
    return lambda _strength: {"offset": by}


PLANTERS: dict[str, Planter] = {
    "rope_plus_one": _positions("rope_plus_one", "rope_position", _offset(1), lambda _s, p: p + 1),
    "rope_minus_one": _positions("rope_minus_one", "rope_position", _offset(-1), lambda _s, p: p - 1),
    "rope_reset": _positions("rope_reset", "rope_position", lambda _s: {"used": 0}, lambda _s, p: p * 0),
    "rope_scaling": _positions("rope_scaling", "rope_scaling", lambda s: {"factor": s}, lambda s, p: p.double() * s),
    "rope_base": _rope_base,
    "rope_partial": _rope_partial,
    "rope_interleaved": _rope_interleaved,
    "k_unrotated": _of_new_key("k_unrotated", "rope_missing", lambda _rotate, plain, _key: plain),
    "rope_twice": _of_new_key("rope_twice", "rope_twice", lambda rotate, _plain, key: rotate(key)),
    "prefill_rope": _prefill_rope,
    "alibi_offset": _alibi_offset,
}
