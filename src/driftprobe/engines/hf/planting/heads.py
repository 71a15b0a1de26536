"""Plants faults of heads: which KV head a query head reads, heads in another order, a head of zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from driftprobe.engines.hf.planting.base import Call, Planter, Site, Undo, cannot_act, during, is_decode, set_attribute
from driftprobe.engines.hf.planting.hooks import Switch, reads_rows, switched
from driftprobe.faults import Expected

Tensor = torch.Tensor


@contextmanager
def _kv_heads_swapped(site: Site, _strength: float) -> Iterator[Expected]:
    name, heads, groups = "kv_heads_swapped", site.anatomy.heads, site.anatomy.kv_heads
    _needs_heads(name, site)
    order = [1, 0, *range(2, groups)]
    read = tuple(order[head // (heads // groups)] for head in range(heads))
    with during(site, is_decode, lambda call: [reads_rows(name, call, lambda rows: rows[:, order])]):
        yield Expected(*site.first(0, "attn_scores", "attn_ctx"), "computation", "head_map", {"heads": read})


@contextmanager
def _gqa_tile(site: Site, _strength: float) -> Iterator[Expected]:
    """Give query head h the KV head h mod G: keys tiled where they ought to be repeated."""
    name, heads, groups = "gqa_tile", site.anatomy.heads, site.anatomy.kv_heads
    _needs_heads(name, site)
    if heads == groups:
        raise cannot_act(name, f"as many KV heads as query heads, {heads}", "grouped queries")
    read = tuple(head % groups for head in range(heads))
    modules = [layer.attention for layer in site.anatomy.layers if hasattr(layer.attention, "num_key_value_groups")]
    if not modules:
        raise cannot_act(name, "no module has num_key_value_groups", "a model that repeats keys by it")

    def change(call: Call) -> list[Undo]:
        undo = [set_attribute(module, "num_key_value_groups", 1) for module in modules]
        return [*undo, reads_rows(name, call, lambda rows: rows[:, list(read)])]

    with during(site, is_decode, change):
        yield Expected(*site.first(0, "attn_scores", "attn_ctx"), "computation", "head_map", {"heads": read})


def _needs_heads(name: str, site: Site) -> None:
    if site.latent:
        raise cannot_act(name, "a cache of latents, from which keys and values are made anew", "a cache of K and V")


@contextmanager
def _q_heads_permuted(site: Site, _strength: float) -> Iterator[Expected]:
    """Take every query head for its neighbour, right behind the projection."""
    name, count = "q_heads_permuted", site.anatomy.heads
    modules = [layer.q_proj for layer in site.anatomy.layers if layer.q_proj is not None]
    if not modules or count < 2 or "q_proj" not in site.taps:
        raise cannot_act(name, f"{len(modules)} query projections of their own, {count} heads",
                         "query projections that are modules, 2 heads")  # fmt: skip
    order = _rolled(count)
    with switched(site, is_decode) as switch, ExitStack() as stack:

        def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
            return _by_head(output, count, lambda heads: heads[..., order, :]) if switch.on else output

        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        layer = min(site.taps["q_proj"])
        yield Expected(*site.first(layer, "q_proj"), "computation", "head_order", {"heads": tuple(order)})


def _of_context(
    name: str, cause: str, told: Callable[[int], dict[str, Any]], change: Callable[[Tensor], Tensor]
) -> Planter:
    """Return the planter of a fault in the heads that the output projection is given."""

    @contextmanager
    def planted(site: Site, _strength: float) -> Iterator[Expected]:
        count = site.anatomy.heads
        modules = [layer.out_proj for layer in site.anatomy.layers if layer.out_proj is not None]
        if not modules or count < 2:
            raise cannot_act(name, f"{len(modules)} output projections, {count} heads", "output projections, 2 heads")
        with switched(site, is_decode) as switch, ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_pre_hook(_before(switch, count, change)).remove)
            yield Expected(*site.first(0, "attn_ctx", "attn_out", "x_mid"), "computation", cause, told(count))

    return planted


def _before(switch: Switch, count: int, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_by_head(args[0], count, change), *args[1:]) if switch.on else args

    return hook


def _by_head(states: Tensor, count: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(states.reshape(*states.shape[:-1], count, -1)).flatten(-2)


def _rolled(count: int) -> list[int]:
    """Return, for every head, the one that stands in its place."""
    return [*range(1, count), 0]


def _roll(heads: Tensor) -> Tensor:
    order: Sequence[int] = _rolled(heads.shape[-2])
    return heads[..., order, :]


def _second_zero(heads: Tensor) -> Tensor:
    emptied = heads.clone()
    emptied[..., 1, :] = 0.0
    return emptied


PLANTERS: dict[str, Planter] = {
    "kv_heads_swapped": _kv_heads_swapped,
    "gqa_tile": _gqa_tile,
    "q_heads_permuted": _q_heads_permuted,
    "context_heads_rolled": _of_context("context_heads_rolled", "head_order",
                                        lambda count: {"heads": tuple(_rolled(count))}, _roll),
    "head_zero": _of_context("head_zero", "head_zero", lambda _count: {"head": 1}, _second_zero),
}  # fmt: skip
