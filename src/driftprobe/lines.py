"""Tapped tensors -> the lines of their records, by one call of the compiled core for many of them.

The core measures and writes without the interpreter's lock. What of a line says where a tensor stands, and not what is
in it, is text that is made once for each place, read and shape. Line for line it is what `trace.encode_line` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from driftprobe.engines.base import Tapped
from driftprobe.fingerprint import dtype_name, for_core
from driftprobe.plan import Read
from driftprobe.taps import CACHE_TAPS
from driftprobe.trace import Record, Top
from driftprobe.trace_checks import CONSTANT_ARM, Fault, record_faults
from driftprobe.trace_file import Line

try:
    from driftprobe import _core as core
except ImportError:  # not built here
    core = None  # type: ignore[assignment]

BUILT = hasattr(core, "lines")
"""Whether the core can write lines here: it needs integers of 128 bits."""

_Place = tuple[int | None, str]


@dataclass(frozen=True, slots=True)
class Extra:
    """What a line says beyond its tensor."""

    top: Top | None = None
    payload: str | None = None


NOTHING = Extra()


class _Text:
    """What lines of one read have in common."""

    def __init__(self, read: Read) -> None:
        self.read = read
        self.phase = read.phase_name
        self.key = (read.arm, self.phase, read.step)
        self.middles: dict[object, bytes] = {}


class LineMaker:
    """Makes the lines of one trace; several threads may ask."""

    def __init__(self, prompt: str, tokens: Sequence[int], sketch_size: int) -> None:
        self.prompt, self.tokens, self.sketch_size = prompt, tokens, sketch_size
        self._heads: dict[str, dict[_Place, bytes]] = {}
        self._ends: dict[tuple[int, str], bytes] = {}
        self._text: _Text | None = None
        """Of the read that was asked for last."""

    def takes(self, item: Tapped) -> bool:
        """Whether this item's line can be made here: the core is built, and nothing is wrong with where it stands.

        What is measured there, the core warrants.
        """
        if self._text is None or item.read is not self._text.read:
            if not BUILT or item.read.arm == CONSTANT_ARM or record_faults(self._sample(item)):
                return False
            self._text_of(item.read)
        return item.row_start >= 0 and _sound(item.layer, item.tensor)

    def _text_of(self, read: Read) -> _Text:
        text = self._text
        if text is None or text.read is not read:
            text = self._text = _Text(read)
        return text

    def _sample(self, item: Tapped) -> Record:
        read = item.read
        return Record(
            prompt=self.prompt, phase=read.phase_name, layer=item.layer, tensor=item.tensor, hash="0x", arm=read.arm,
            step=read.step, logical_tok_idx=read.position, row_start=item.row_start,
        )  # fmt: skip

    def lines(self, items: Sequence[Tapped], extras: Sequence[Extra]) -> Callable[[], list[Line]]:
        """Prepare the lines of items that this maker takes, and return what measures and makes them.

        Raises KeyError where the format has no such dtype.
        """
        jobs, keys = [], []
        for item, extra in zip(items, extras, strict=True):
            text, place = self._text_of(item.read), (item.layer, item.tensor)
            array, code = for_core(item.array)
            middle = text.middles.get((item.pos_id, code, item.array.shape)) or self._middle(text, item, code)
            head = self._heads.get(text.phase, _NONE).get(place)
            jobs.append((head or self._head(text.phase, place), middle, self._end(item, extra), array, code,
                         item.tensor in CACHE_TAPS))  # fmt: skip
            keys.append((*text.key, *place, item.read.position))
        given = tuple(jobs)

        def made() -> list[Line]:
            raws: list[bytes] = core.lines(given, self.sketch_size)
            return [Line(raw, self.prompt, key, _SOUND) for raw, key in zip(raws, keys, strict=True)]

        return made

    def _head(self, phase: str, place: _Place) -> bytes:
        body = {"type": "record", "prompt": self.prompt, "phase": phase, "layer": place[0], "tensor": place[1]}
        if len(self._heads) > 64:  # each step of a long run has its own
            self._heads.clear()
        found = self._heads.setdefault(phase, {})[place] = msgspec.json.encode(body)[:-1]
        return found

    def _middle(self, text: _Text, item: Tapped, code: int) -> bytes:
        read, array = item.read, item.array
        body = {"arm": read.arm, "step": read.step, "token_id": self.tokens[read.position],
                "logical_tok_idx": read.position, "pos_id": item.pos_id, "dtype": dtype_name(array),
                "shape": array.shape}  # fmt: skip
        found = text.middles[(item.pos_id, code, array.shape)] = b"," + msgspec.json.encode(body)[1:-1]
        return found

    def _end(self, item: Tapped, extra: Extra) -> bytes:
        if extra is not NOTHING:
            return _end_of(item, extra)
        key = (item.row_start, item.source)
        found = self._ends.get(key)
        if found is None:
            found = self._ends[key] = _end_of(item, extra)
        return found


@lru_cache(maxsize=1 << 14)
def _sound(layer: int | None, tensor: str) -> bool:
    """Whether nothing is wrong with a place, whatever the read."""
    return not record_faults(Record(prompt="p", phase="p", layer=layer, tensor=tensor, hash="0x", arm="a"))


_SOUND: list[Fault] = []
_NONE: dict[_Place, bytes] = {}


def _end_of(item: Tapped, extra: Extra) -> bytes:
    body = {"row_start": item.row_start, "source": item.source, "top": extra.top, "payload": extra.payload}
    return b"," + msgspec.json.encode({n: v for n, v in body.items() if v is not None})[1:] + b"\n"
