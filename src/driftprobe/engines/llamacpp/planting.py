"""Plants faults in llama.cpp: rows changed in its cache, and inputs of its graph changed just before they are read.

What a graph is told (positions, slots to write to, the mask) are tensors of its own, so a wrong one is a fault of the
engine as it would really be: nothing of ours computes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from driftprobe.causes import Parameter
from driftprobe.engines.llamacpp.cache import Cache, Layer
from driftprobe.engines.llamacpp.context import Before, Call
from driftprobe.engines.llamacpp.ggml import Tensor
from driftprobe.errors import UsageError
from driftprobe.faults import Expected, find_fault

Found = dict[str, Parameter]
BLOCK = 16
SINKS = 4
STRANGER = 64
"""Tokens of another request."""
Strangers = tuple[Cache, ...]


@dataclass
class Planted:
    """Faults in place: what is told of each node, and what changes the rows that a prefill has left."""

    before: list[Before] = field(default_factory=list)
    write: Callable[[Cache, int], None] | None = None
    """Changes a whole cache, of which so many rows are filled."""


Planter = Callable[[str, float, Planted, Strangers], Expected]
Rewrite = Callable[[Cache, int, Strangers], Found]


def cannot_act(name: str, measured: str, allowed: str) -> UsageError:
    """Return the error that says why a fault changes nothing here."""
    return UsageError(
        "the fault cannot act here", where=f"--fault {name}", measured=measured, allowed=allowed,
        next_step="choose another fault (`driftprobe faults`), prompt, model or engine",
    )  # fmt: skip


@contextmanager
def plant(name: str, strength: float | None, planted: Planted, strangers: Callable[[], Strangers],
          layers: int) -> Iterator[Expected]:  # fmt: skip
    """Keep a fault planted while the context lasts. Raises UsageError for one that cannot act in llama.cpp."""
    fault = find_fault(name)
    if name not in PLANTERS:
        raise cannot_act(name, "llama.cpp offers no place to plant it", ", ".join(sorted(PLANTERS)))
    if layers < fault.min_layers:
        raise cannot_act(name, f"{layers} layers", f"a model of {fault.min_layers} or more")
    others = strangers() if name in _OF_STRANGERS else ()
    try:
        yield PLANTERS[name](name, fault.strengths[0] if strength is None else strength, planted, others)
    finally:
        planted.before.clear()
        planted.write = None


def _expected(name: str, parameters: Found) -> Expected:
    fault = find_fault(name)
    return Expected(fault.layer, fault.tensor, fault.reading, fault.cause, parameters)


def _written(change: Rewrite) -> Planter:
    """Return the planter of a wrong write into the cache."""

    def planter(name: str, _strength: float, planted: Planted, strangers: Strangers) -> Expected:
        parameters: Found = {}

        def write(cache: Cache, count: int) -> None:
            needed = find_fault(name).min_prompt
            if count < needed:
                raise cannot_act(name, f"a prompt of {count}", f"a prompt of {needed} tokens or more")
            parameters.clear()
            parameters.update(change(cache, count, strangers))

        planted.write = write
        return _expected(name, parameters)

    return planter


def _shift(by: int) -> Rewrite:
    def change(cache: Cache, count: int, _: Strangers) -> Found:
        for layer in cache.values():
            for rows in layer.both:
                rows[:count] = np.roll(rows[:count], by, axis=0)
                rows[0 if by > 0 else count - 1] = 0
        return {"offset": by}

    return change


def _swap(which: int) -> Rewrite:
    def change(cache: Cache, count: int, _: Strangers) -> Found:
        rows = cache[1].both[which]
        rows[[0, count - 1]] = rows[[count - 1, 0]]
        return {"rows": (0, count - 1)}

    return change


def _zero(which: int) -> Rewrite:
    def change(cache: Cache, _count: int, _: Strangers) -> Found:
        cache[1].both[which][0] = 0
        return {"rows": (0,)}

    return change


def _last_twice(cache: Cache, count: int, _: Strangers) -> Found:
    for layer in cache.values():
        for rows in layer.both:
            rows[count - 2] = rows[count - 1]
    return {"row": count - 2, "source": count - 1}


def _stale(cache: Cache, _count: int, strangers: Strangers) -> Found:
    other = next((s for s in strangers if (s[1].values[0] != cache[1].values[0]).any()), strangers[0])
    for mine, theirs in zip(cache[1].both, other[1].both, strict=True):
        mine[0] = theirs[0]
    return {"rows": (0,)}


def _other_sequence(cache: Cache, count: int, strangers: Strangers) -> Found:
    other = next((s for s in strangers if (s[0].values[0] != cache[0].values[0]).any()), strangers[0])
    for layer, rows in cache.items():
        for mine, theirs in zip(rows.both, other[layer].both, strict=True):
            mine[:count] = theirs[np.arange(count) % len(theirs)]
    return {}


def _layer_before(cache: Cache, count: int, _: Strangers) -> Found:
    for layer in sorted(cache)[:-1]:
        for mine, following in zip(cache[layer].both, cache[layer + 1].both, strict=True):
            mine[:count] = following[:count]
    return {"source": 1}


def _exchange(cache: Cache, count: int, _: Strangers) -> Found:
    for layer, rows in list(cache.items()):
        if rows.keys.shape != rows.values.shape:
            raise cannot_act("kv_exchanged", "K and V of two shapes", "K and V of one shape")
        cache[layer] = Layer(rows.values, rows.keys)
    return {}


def _exchange_blocks(cache: Cache, _count: int, _: Strangers) -> Found:
    order = [*range(BLOCK, 2 * BLOCK), *range(BLOCK)]
    for layer in cache.values():
        for rows in layer.both:
            rows[: 2 * BLOCK] = rows[order]
    return {"block": BLOCK}


def _once(tensor: Tensor | None, call: Call) -> Tensor | None:
    """Return a tensor that is not changed yet in this call, and note that it is now."""
    if tensor is None or tensor.address in call.changed:
        return None
    call.changed.add(tensor.address)
    return tensor


def _positions(change: Callable[[int], int]) -> Planter:
    """Return the planter of a decode that rotates for another position."""

    def planter(name: str, _strength: float, planted: Planted, _: Strangers) -> Expected:
        parameters: Found = {}

        def before(node: Tensor, call: Call) -> None:
            told = _once(node.source(1), call) if call.is_decode and node.op == "ROPE" else None
            if told is not None:
                told.write(np.array([change(call.start)] * told.shape[-1], dtype=np.int32).tobytes())
                parameters.setdefault("used", change(call.start))
                parameters.setdefault("expected", call.start)

        planted.before.append(before)
        return _expected(name, parameters)

    return planter


def _hidden(keys: Callable[[int], tuple[int, ...]]) -> Planter:
    """Return the planter of a decode whose mask hides keys."""

    def planter(name: str, _strength: float, planted: Planted, _: Strangers) -> Expected:
        parameters: Found = {}

        def before(node: Tensor, call: Call) -> None:
            mask = _once(_mask(node), call) if call.is_decode else None
            if mask is not None:
                if call.start < find_fault(name).min_prompt:
                    raise cannot_act(name, f"a prompt of {call.start}", "a longer prompt")
                held = mask.array()
                held[0, 0, 0, list(keys(call.start))] = -np.inf
                mask.write(held.tobytes())
                parameters.setdefault("keys", keys(call.start))

        planted.before.append(before)
        return _expected(name, parameters)

    return planter


def _mask(node: Tensor) -> Tensor | None:
    if node.op == "SOFT_MAX":
        return node.source(1)
    return node.source(3) if node.op == "FLASH_ATTN_EXT" else None


def _overwrite(name: str, _strength: float, planted: Planted, _: Strangers) -> Expected:
    """Decode is told the slot before its own."""
    parameters: Found = {}

    def before(node: Tensor, call: Call) -> None:
        slots = _once(node.source(1), call) if call.is_decode and node.op == "SET_ROWS" else None
        if slots is not None:
            slots.write((slots.array() - 1).astype(np.int64).tobytes())
            parameters.setdefault("row", call.start - 1)
            parameters.setdefault("source", call.start)

    planted.before.append(before)
    return _expected(name, parameters)


PLANTERS: dict[str, Planter] = {
    "cache_shift": _written(_shift(1)),
    "cache_shift_back": _written(_shift(-1)),
    "k_rows_swapped": _written(_swap(0)),
    "v_rows_swapped": _written(_swap(1)),
    "k_row_zero": _written(_zero(0)),
    "v_row_zero": _written(_zero(1)),
    "last_row_twice": _written(_last_twice),
    "stale_row": _written(_stale),
    "other_batch_row": _written(_other_sequence),
    "layer_offset": _written(_layer_before),
    "kv_exchanged": _written(_exchange),
    "blocks_exchanged": _written(_exchange_blocks),
    "overwrite_previous": _overwrite,
    "rope_plus_one": _positions(lambda position: position + 1),
    "rope_minus_one": _positions(lambda position: position - 1),
    "rope_reset": _positions(lambda _position: 0),
    "oldest_key_masked": _hidden(lambda _newest: (0,)),
    "sink_tokens_lost": _hidden(lambda _newest: tuple(range(SINKS))),
    "newest_key_masked": _hidden(lambda newest: (newest,)),
}
_OF_STRANGERS = frozenset({"stale_row", "other_batch_row"})
