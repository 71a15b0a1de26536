"""Tapped tensors -> the lines of their records, by one call of the compiled core for many of them.

The core measures and writes without the interpreter's lock. What of a line says where a tensor stands, and not what is
in it, is text that is made once for each place, read and shape. Line for line it is what `trace.encode_line` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from driftprobe.engines.base import Tapped
from driftprobe.fingerprint import core, dtype_name, where_for_core
from driftprobe.taps import CACHE_TAPS
from driftprobe.trace import Line, Record, Top, faults_of

BUILT = hasattr(core, "lines")
"""Whether the core can write lines here: it needs integers of 128 bits."""

_Place = tuple[int | None, str]


@dataclass(frozen=True, slots=True)
class Extra:
    """What a line says beyond its tensor."""

    top: Top | None = None
    payload: str | None = None


class LineMaker:
    """Makes the lines of one trace; not for two threads at once."""

    def __init__(self, prompt: str, tokens: Sequence[int], sketch_size: int) -> None:
        self.prompt, self.tokens, self.sketch_size = prompt, tokens, sketch_size
        self._heads: dict[tuple[str, _Place], bytes] = {}
        self._middles: dict[object, bytes] = {}
        self._ends: dict[tuple[int, str], bytes] = {}
        self._sound: set[object] = set()
        """Places and reads whose records have nothing wrong with them; what is in them the core warrants."""

    def takes(self, item: Tapped) -> bool:
        """Whether this item's line can be made here: the core is built, and nothing is wrong with its place."""
        read, place = item.read, (item.layer, item.tensor)
        if read in self._sound and place in self._sound and item.row_start >= 0:
            return True
        sound = BUILT and not faults_of(self._sample(item), None)
        if sound:
            self._sound |= {read, place}
        return sound

    def _sample(self, item: Tapped) -> Record:
        read = item.read
        return Record(
            prompt=self.prompt, phase=read.phase_name, layer=item.layer, tensor=item.tensor, hash="0x", arm=read.arm,
            step=read.step, logical_tok_idx=read.position, row_start=item.row_start,
        )  # fmt: skip

    def lines(self, items: Sequence[Tapped], extras: Sequence[Extra]) -> list[Line]:
        """Return the lines of items that this maker takes. Raises KeyError where the format has no such dtype."""
        jobs, alive = [], []
        for item, extra in zip(items, extras, strict=True):
            where, array = where_for_core(item.array)
            alive.append(array)  # the core has only its address
            jobs.append((self._head(item), self._middle(item), self._end(item, extra), *where,
                         item.tensor in CACHE_TAPS))  # fmt: skip
        made: list[bytes] = core.lines(tuple(jobs), self.sketch_size)
        return [Line(raw, self.prompt, self._key(item), []) for raw, item in zip(made, items, strict=True)]

    def _key(self, item: Tapped) -> tuple[Any, ...]:
        read = item.read
        return (read.arm, read.phase_name, read.step, item.layer, item.tensor, read.position)

    def _head(self, item: Tapped) -> bytes:
        phase, place = item.read.phase_name, (item.layer, item.tensor)
        found = self._heads.get((phase, place))
        if found is None:
            body = {"type": "record", "prompt": self.prompt, "phase": phase, "layer": item.layer, "tensor": item.tensor}
            found = self._heads[(phase, place)] = msgspec.json.encode(body)[:-1]
        return found

    def _middle(self, item: Tapped) -> bytes:
        read, array = item.read, item.array
        key = (read, item.pos_id, array.dtype, array.shape)
        found = self._middles.get(key)
        if found is None:
            body = {"arm": read.arm, "step": read.step, "token_id": self.tokens[read.position],
                    "logical_tok_idx": read.position, "pos_id": item.pos_id, "dtype": dtype_name(array),
                    "shape": array.shape}  # fmt: skip
            if len(self._middles) > 4096:  # long runs: each step has its own
                self._middles.clear()
            found = self._middles[key] = b"," + msgspec.json.encode(body)[1:-1]
        return found

    def _end(self, item: Tapped, extra: Extra) -> bytes:
        if extra.top is None and extra.payload is None:
            key = (item.row_start, item.source)
            found = self._ends.get(key)
            if found is None:
                found = self._ends[key] = _end_of(item, extra)
            return found
        return _end_of(item, extra)


def _end_of(item: Tapped, extra: Extra) -> bytes:
    body = {"row_start": item.row_start, "source": item.source, "top": extra.top, "payload": extra.payload}
    return b"," + msgspec.json.encode({n: v for n, v in body.items() if v is not None})[1:] + b"\n"
