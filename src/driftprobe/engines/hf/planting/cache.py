"""Plants faults of what the cache holds: as a wrong write does, in the rows that a prefill has just left.

Axes: B batch (1), G key/value heads, S stored rows, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from driftprobe.causes import Parameter
from driftprobe.engines.hf.attention import sliding_window
from driftprobe.engines.hf.cache import TupleCache, layer_count, new_cache, opened, past_of, row_layers, stored_rows
from driftprobe.engines.hf.planting.base import (
    Call,
    Planter,
    Site,
    Undo,
    after_prefill,
    cannot_act,
    during,
    is_decode,
)
from driftprobe.engines.hf.planting.rotation import unrotated
from driftprobe.errors import UsageError
from driftprobe.faults import Expected, find_fault

Tensor = torch.Tensor
Found = dict[str, Parameter]
_BLOCK = 16
_STRANGER = 64
"""Tokens of the other request; a longer prompt is given its rows again from the first on."""
_INT8_MAX = 127
_FOR_LATENTS = frozenset({"cache_shift", "cache_shift_back", "stale_row", "last_row_twice", "other_batch_row",
                          "blocks_exchanged"})  # fmt: skip
"""Faults of whole rows: they mean the same where a row is a latent, from which K and V are made anew."""
_OF_THE_OLDEST_ROW = frozenset({"v_row_zero", "k_row_zero", "stale_row", "k_rows_swapped", "v_rows_swapped"})


@dataclass(frozen=True)
class Written:
    """The cache as a prefill has just left it, to be changed in place."""

    name: str
    site: Site
    cache: Any
    strength: float
    strangers: tuple[tuple[tuple[Tensor, Tensor], ...], ...] = ()
    """Rows of other requests, by layer, `[B, G, S, D]` of K and V."""

    @property
    def layers(self) -> list[int]:
        """The layers that hold rows."""
        return row_layers(self.cache)

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's stored K and V, `[B, G, S, D]`."""
        rows = stored_rows(self.cache, layer)
        if not all(isinstance(t, Tensor) and t.dim() == 4 for t in rows):
            raise cannot_act(self.name, f"layer {layer} holds no K and V rows", "layers with a cache of K and V")
        return rows

    def count(self, layer: int) -> int:
        """Return how many rows a layer holds. Raises where they are too few for the fault."""
        count, needed = int(self.rows(layer)[0].shape[2]), find_fault(self.name).min_prompt
        if count < needed:
            held = f"a prefill of {count} token{'s' if count > 1 else ''}"
            raise cannot_act(self.name, held, f"a prompt of {needed} tokens or more")
        return count

    def position(self, layer: int, index: int) -> int:
        """Return the absolute position of a stored row; a sliding window holds the newest only."""
        return int(self.cache.get_seq_length()) - self.count(layer) + index


Change = Callable[[Written], Found]
"""Changes the rows, and returns the parameters of what must be found."""


def _written(name: str, change: Change, layer: int, strangers: bool = False) -> Planter:
    """Return the planter of a wrong write."""

    @contextmanager
    def planted(site: Site, strength: float) -> Iterator[Expected]:
        fault, parameters, pending = find_fault(name), dict[str, Parameter](), [dict[str, Parameter]()]
        _check_latent(name, site)
        others = _strangers(site) if strangers else ()
        refused: list[UsageError] = []

        def write(cache: Any) -> None:
            refused.clear()
            try:
                pending[:] = [change(Written(name, site, cache, strength, others))]
            except UsageError as error:  # a chunk of a prefill may be too short where the whole is not: decode tells
                refused.append(error)

        def told(call: Call) -> list[Undo]:
            if refused:
                raise refused.pop()
            if pending:  # the parameters are those of the prompt that a decode step follows on
                _check_window(name, site, past_of(call), layer)
                parameters.clear()
                parameters.update(pending.pop())
            return []

        with during(site, is_decode, told), after_prefill(site, write):
            yield Expected(layer, fault.tensor, fault.reading, fault.cause, parameters)

    return planted


def _check_latent(name: str, site: Site) -> None:
    if "k_cache" not in site.taps:
        raise cannot_act(name, "a cache without K and V rows", "a cache of K and V")
    if site.latent and name not in _FOR_LATENTS:
        raise cannot_act(name, "a cache of latents, from which keys and values are made anew", "a cache of K and V")


def _check_window(name: str, site: Site, cache: Any, layer: int) -> None:
    """Raise where a cache keeps more rows than a sliding window sees, and the fault is in the oldest of them."""
    rows = stored_rows(cache, layer)[0].shape[2]
    window = sliding_window(site.anatomy.layers[layer].attention, layer)
    if name in _OF_THE_OLDEST_ROW and window is not None and rows + 1 > window:
        raise cannot_act(name, f"a sliding window of {window} tokens in layer {layer}, after {rows} cached rows",
                         f"a prompt of fewer than {window} tokens")  # fmt: skip


def _strangers(site: Site) -> tuple[tuple[tuple[Tensor, Tensor], ...], ...]:
    """Return the cache rows of two other requests, so that one of them differs from any prompt."""
    return tuple(_stranger(site, last) for last in (1, 2))


def _stranger(site: Site, last: int) -> tuple[tuple[Tensor, Tensor], ...]:
    vocabulary = int(site.model.get_input_embeddings().weight.shape[0])
    count = min(_STRANGER, int(getattr(site.model.config, "max_position_embeddings", 0) or _STRANGER))
    ids = torch.tensor([[(vocabulary - last - 3 * i) % vocabulary for i in range(count)]], device=site.model.device)
    cache = new_cache(site.model)
    with torch.no_grad():
        output = site.model(input_ids=ids, past_key_values=cache, use_cache=True)
    filled = opened(output.past_key_values)
    return tuple(stored_rows(filled, layer) for layer in range(layer_count(filled)))


def _every_layer(change: Callable[[Tensor], Tensor], which: tuple[int, ...] = (0, 1)) -> Callable[[Written], None]:
    """Return what replaces K (0) and V (1) of every layer by a function of them."""

    def write(written: Written) -> None:
        for layer in written.layers:
            for rows in (written.rows(layer)[i] for i in which):
                rows.copy_(change(rows.clone()))

    return write


def _shifted(rows: Tensor, by: int) -> Tensor:
    moved = rows.roll(by, dims=2)
    moved[:, :, 0 if by > 0 else -1] = 0  # nobody wrote this slot
    return moved


def _shift(by: int) -> Change:
    def change(written: Written) -> Found:
        written.count(0)
        _every_layer(lambda rows: _shifted(rows, by))(written)
        return {"offset": by}

    return change


def _swap(which: int) -> Change:
    def change(written: Written) -> Found:
        rows, count = written.rows(1)[which], written.count(1)
        rows.copy_(rows[:, :, [count - 1, *range(1, count - 1), 0]])
        return {"rows": (written.position(1, 0), written.position(1, count - 1))}

    return change


def _zero(which: int) -> Change:
    def change(written: Written) -> Found:
        written.rows(1)[which][:, :, 0] = 0
        return {"rows": (written.position(1, 0),)}

    return change


def _stale(written: Written) -> Found:
    written.count(1)
    rows = written.rows(1)
    others = [stranger[1] for stranger in written.strangers]
    other = next((o for o in others if not torch.equal(rows[0][:, :, :1], o[0][:, :, :1].to(rows[0]))), others[0])
    for mine, theirs in zip(rows, other, strict=True):
        mine[:, :, :1].copy_(theirs[:, :, :1])
    return {"rows": (written.position(1, 0),)}


def _other_sequence(written: Written) -> Found:
    written.count(0)
    rows = written.rows(0)[1]  # V of the first layer tells tokens apart, whatever their positions
    other = next((s for s in written.strangers if not (rows[:, :, 0] == s[0][1][:, :, 0].to(rows)).all()),
                 written.strangers[0])  # fmt: skip
    for layer in written.layers:
        for mine, theirs in zip(written.rows(layer), other[layer], strict=True):
            count = mine.shape[2]
            mine.copy_(theirs[:, :, torch.arange(count, device=mine.device) % theirs.shape[2]])
    return {}


def _last_twice(written: Written) -> Found:
    count = written.count(0)
    for layer in written.layers:
        for rows in written.rows(layer):
            rows[:, :, -2] = rows[:, :, -1]
    return {"row": written.position(0, count - 2), "source": written.position(0, count - 1)}


def _layer_before(written: Written) -> Found:
    _check_shapes(written.name, [written.rows(layer) for layer in written.layers])
    for layer in written.layers[:-1]:
        for mine, next_one in zip(written.rows(layer), written.rows(layer + 1), strict=True):
            mine.copy_(next_one)
    return {"source": 1}


def _check_shapes(name: str, layers: list[tuple[Tensor, Tensor]]) -> None:
    for index, rows in enumerate(layers):
        if any(mine.shape != first.shape for mine, first in zip(rows, layers[0], strict=True)):
            raise cannot_act(name, f"layer 0 holds {tuple(layers[0][0].shape)}, layer {index} {tuple(rows[0].shape)}",
                             "layers with caches of one shape")  # fmt: skip


def _exchange(written: Written) -> Found:
    for layer in written.layers:
        keys, values = written.rows(layer)
        if keys.shape != values.shape:
            raise cannot_act(written.name, f"K {tuple(keys.shape)} and V {tuple(values.shape)}", "K and V of one shape")
        kept = keys.clone()
        keys.copy_(values)
        values.copy_(kept)
    return {}


def _exchange_blocks(written: Written) -> Found:
    for layer in written.layers:
        written.count(layer)
    order = [*range(_BLOCK, 2 * _BLOCK), *range(_BLOCK)]
    _every_layer(lambda rows: torch.cat([rows[:, :, order], rows[:, :, 2 * _BLOCK :]], dim=2))(written)
    return {"block": _BLOCK}


def _scale(which: int) -> Change:
    def change(written: Written) -> Found:
        _every_layer(lambda rows: rows * written.strength, (which,))(written)
        return {"factor": float(written.strength)}

    return change


def _scale_head(written: Written) -> Found:
    heads = written.rows(0)[0].shape[1]
    for layer in written.layers:
        written.rows(layer)[0][:, -1] *= written.strength
    return {"head": heads - 1, "factor": float(written.strength)}


def _exchange_axes(written: Written) -> Found:
    def stored(rows_BGSD: Tensor) -> Tensor:
        groups, size = rows_BGSD.shape[1], rows_BGSD.shape[3]
        flat_BSF = rows_BGSD.permute(0, 2, 3, 1).reshape(len(rows_BGSD), -1, size * groups)
        return flat_BSF.view(len(rows_BGSD), -1, groups, size).transpose(1, 2)

    _every_layer(stored)(written)
    return {}


def _unrotate(written: Written) -> Found:
    written.count(0)
    for layer in written.layers:
        keys = written.rows(layer)[0]
        start = written.position(layer, 0)
        before = unrotated(written.site, layer, keys, start)
        if before is None:
            raise cannot_act(written.name, f"no rotary embedding of layer {layer} that can be undone from outside",
                             "a model with RoPE, its cos and sin from one module")  # fmt: skip
        keys.copy_(before)
    return {}


def _round_fp8(written: Written) -> Found:
    _every_layer(lambda rows: rows.to(torch.float8_e4m3fn).to(rows.dtype))(written)
    return {"dtype": "float8_e4m3fn"}


def _round_int8(written: Written) -> Found:
    def rounded(rows_BGSD: Tensor) -> Tensor:
        wide = rows_BGSD.double()
        step = wide.abs().amax(dim=3, keepdim=True) / _INT8_MAX
        return ((wide / step).round() * step).nan_to_num(0.0).to(rows_BGSD.dtype)

    _every_layer(rounded)(written)
    return {"dtype": "int8"}


@contextmanager
def _other_layer_cache(site: Site, _strength: float) -> Iterator[Expected]:
    """Decode's layer 1 reads layer 0's rows; its own new row goes where it belongs."""
    fault = find_fault("other_layer_cache")
    _check_latent(fault.name, site)

    def read(call: Call) -> list[Undo]:
        cache = past_of(call)
        pairs = [stored_rows(cache, layer) for layer in (0, 1)]
        _check_shapes(fault.name, pairs)
        for mine, other in zip(pairs[1], pairs[0], strict=True):
            mine.copy_(other)
        return []

    with during(site, is_decode, read):
        yield Expected(1, "k_cache", fault.reading, fault.cause, {"source": 0})


@contextmanager
def _overwrite_previous(site: Site, _strength: float) -> Iterator[Expected]:
    """Every one-token step writes its row over the one before it; the slot that was meant for it stays empty."""
    from transformers import DynamicCache

    fault, parameters, acting = find_fault("overwrite_previous"), dict[str, Parameter](), list[bool]()
    fresh: list[bool] = []
    _check_latent(fault.name, site)
    own, update = DynamicCache.__dict__.get("update"), DynamicCache.update

    def written(cache: Any, *args: Any, **kw: Any) -> Any:
        output = update(cache, *args, **kw)
        for rows in output if acting else ():
            rows[:, :, -2] = rows[:, :, -1]
            rows[:, :, -1] = 0
        return output

    def start(call: Call) -> list[Undo]:
        cache = past_of(call)
        if isinstance(cache, TupleCache):
            raise cannot_act(fault.name, "a model that keeps its cache in tuples", "a model with a Cache object")
        if fresh:
            fresh.clear()
            parameters.update(row=cache.get_seq_length() - 1, source=cache.get_seq_length())
        acting.append(True)
        return [acting.clear]

    DynamicCache.update = written  # inside what listens to the cache, so that the probe sees what attention sees
    try:
        with during(site, is_decode, start), after_prefill(site, lambda _cache: fresh.append(True)):
            yield Expected(0, "k_cache", fault.reading, fault.cause, parameters)
    finally:
        if own is None:
            del DynamicCache.update
        else:
            DynamicCache.update = own


PLANTERS: dict[str, Planter] = {
    "cache_shift": _written("cache_shift", _shift(1), 0),
    "cache_shift_back": _written("cache_shift_back", _shift(-1), 0),
    "overwrite_previous": _overwrite_previous,
    "k_rows_swapped": _written("k_rows_swapped", _swap(0), 1),
    "v_rows_swapped": _written("v_rows_swapped", _swap(1), 1),
    "stale_row": _written("stale_row", _stale, 1, strangers=True),
    "k_row_zero": _written("k_row_zero", _zero(0), 1),
    "v_row_zero": _written("v_row_zero", _zero(1), 1),
    "last_row_twice": _written("last_row_twice", _last_twice, 0),
    "other_layer_cache": _other_layer_cache,
    "layer_offset": _written("layer_offset", _layer_before, 0),
    "kv_exchanged": _written("kv_exchanged", _exchange, 0),
    "other_batch_row": _written("other_batch_row", _other_sequence, 0, strangers=True),
    "blocks_exchanged": _written("blocks_exchanged", _exchange_blocks, 0),
    "k_quant_scale": _written("k_quant_scale", _scale(0), 0),
    "v_quant_scale": _written("v_quant_scale", _scale(1), 0),
    "head_scale": _written("head_scale", _scale_head, 0),
    "axes_exchanged": _written("axes_exchanged", _exchange_axes, 0),
    "k_cached_unrotated": _written("k_cached_unrotated", _unrotate, 0),
    "rows_fp8": _written("rows_fp8", _round_fp8, 0),
    "rows_int8": _written("rows_int8", _round_int8, 0),
}
