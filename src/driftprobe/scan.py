"""A trace file of ours into columns: the records by the compiled scanner, every other line by trace_file.py.

The scanner takes what can be read in one way only, and `read_columns` gives up where anything is not as it should be:
trace_file.py then reads the file line by line, and says what is wrong.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from driftprobe.columns import FLOATS, INTEGERS, NONE, ROW, WORDS, Array, Columns, Done, Rows, breaks_a_must
from driftprobe.fingerprint import SKETCH_BLOCK
from driftprobe.trace import Event, Header, Record
from driftprobe.trace_file import MAX_LINE, Checks, Problem, read_header

try:
    from driftprobe import _scan as scanner
except ImportError:  # not built here, or built for another platform
    scanner = None  # type: ignore[assignment]

BUILT = scanner is not None
"""Whether the compiled scanner is there."""
CHUNK = 1 << 20
"""Bytes that are read at a time: they are in the cache still when they are scanned and digested."""
MAX_ODD = 4096
"""Lines of a file that trace_file.py may have to read; beyond it columns save nothing."""


class GivenUpError(Exception):
    """Something is not as columns need it."""


def read_columns(path: Path) -> Columns | None:
    """Return a complete trace of ours as columns; None where it has to be read line by line.

    That is where the scanner is not built, or the trace is a stranger's, has no end, breaks a MUST, or holds too much
    that a row has no place for. Raises OSError where the file cannot be read.
    """
    if scanner is None:
        return None
    try:
        with path.open("rb") as file:
            columns = _Reading(path).columns(file)
        return None if breaks_a_must(columns) else columns
    except (GivenUpError, OverflowError):  # a number that no column holds
        return None


_SIZES = ((ROW, 256), (np.float64, 18), (np.uint64, 20))
"""What the scanner writes, and how many bytes of a file one takes at least, or nearly so."""


class _Pages:
    """Memory for rows, of which parts can be given back to the system; where that is not possible, they are kept."""

    def __init__(self, count: int) -> None:
        size = count * ROW.itemsize
        self._memory: mmap.mmap | None = None
        if hasattr(mmap, "MADV_DONTNEED") and hasattr(mmap, "MAP_ANONYMOUS"):
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.rows: Array = np.frombuffer(self._memory, ROW, count)
        else:
            self.rows = np.empty(count, ROW)
        self._first, self._size = self.rows.ctypes.data, size

    def give_back(self, part: Array) -> None:
        """Give the whole pages back that lie in a part of the rows; they read as zeros from then on."""
        begin = -(-(part.ctypes.data - self._first) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (part.ctypes.data - self._first + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._memory is not None and 0 <= begin < end <= self._size:
            self._memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


@dataclass
class _Room:
    """Arrays that the scanner writes into, and how much of each is used."""

    arrays: list[Array]
    done: Done
    """Takes rows that were read."""
    used: list[int] = field(default_factory=lambda: [0, 0, 0])

    @classmethod
    def for_file(cls, length: int) -> _Room:
        """Return room for about all of a file; what is never written takes no memory."""
        (_, of_row), *others = _SIZES
        pages = _Pages(length // of_row + 1)
        return cls([pages.rows, *(np.empty(length // size + 1, kind) for kind, size in others)], pages.give_back)

    def grow(self) -> None:
        """Make every array larger by half."""
        for index, array in enumerate(self.arrays):
            grown = np.empty(len(array) * 3 // 2 + (1 << 15), array.dtype)
            grown[: self.used[index]] = array[: self.used[index]]
            self.arrays[index] = grown

    def left(self) -> tuple[int, ...]:
        """Return what is free of each array as the scanner takes it: address, length, and how much stands before."""
        pairs = zip(self.arrays, self.used, strict=True)
        return tuple(n for array, used in pairs for n in (array[used:].ctypes.data, len(array) - used, used))


@dataclass(frozen=True)
class Parts:
    """What was read of a trace's lines; `rows` has one for each, whose `taken` is 0 where it is no plain record."""

    rows: Rows
    sums: npt.NDArray[np.float64]
    hashes: npt.NDArray[np.uint64]
    words: list[str]


class Scanning:
    """A file that is scanned chunk by chunk."""

    def __init__(self, sketch_size: int, length: int) -> None:
        self.size, self.length = sketch_size, length
        self.room, self.table = _Room.for_file(length), scanner.words()

    def chunks(self, file: BinaryIO) -> Iterator[tuple[memoryview, int, int]]:
        """Yield each chunk of whole lines with its place in the file and its first row; what is left ends without one.

        Every line has a row; `taken` is 0 where the scanner leaves it alone. A chunk is written over when the next but
        one is asked for.
        """
        chunk = CHUNK if self.length > 16 * CHUNK else CHUNK // 4  # memory that is new costs more than it holds
        buffers = [bytearray(chunk + chunk // 4) for _ in range(3)]
        turn = kept = place = 0
        while True:
            buffer, after = buffers[turn % 3], (turn + 1) % 3
            if len(buffer) < kept + chunk:
                buffer = buffers[turn % 3] = buffer + bytes(kept + chunk)
            got = file.readinto(memoryview(buffer)[kept : kept + chunk])  # type: ignore[attr-defined]
            if not got:
                break
            filled = kept + got
            end, first = buffer.rfind(b"\n", 0, filled) + 1, self.room.used[0]
            self._scan(buffer, place, end)
            kept = filled - end
            if kept > MAX_LINE:
                raise GivenUpError
            if len(buffers[after]) < kept:
                buffers[after] = bytearray(2 * kept)
            buffers[after][:kept] = memoryview(buffer)[end:filled]
            if end:
                yield memoryview(buffer)[:end], place, first
            turn, place = turn + 1, place + end
        if kept:
            yield memoryview(buffer)[:kept], place, self.room.used[0]

    def _scan(self, data: bytearray, place: int, end: int) -> None:
        at, address = 0, np.frombuffer(data, np.uint8).ctypes.data
        while at < end:
            read, *added = scanner.scan(address, end, at, place, self.room.left(), self.table, self.size)
            self.room.used = [used + more for used, more in zip(self.room.used, added, strict=True)]
            at += read
            if at < end:
                self.room.grow()

    def last_line(self) -> int:
        """Return where the last line that has a row begins in the file."""
        return int(self.room.arrays[0][self.room.used[0] - 1]["at"])

    def parts(self, more_sketches: int = 0) -> Parts:
        """Return what was read, with room for more sketches."""
        while self.room.used[1] + more_sketches * self.size > len(self.room.arrays[1]):
            self.room.grow()
        (rows, sums, hashes), used = self.room.arrays, self.room.used
        sketches = sums[: used[1] + more_sketches * self.size].reshape(-1, self.size)
        return Parts(Rows.of_structured(rows[: used[0]], self.room.done), sketches, hashes[: used[2]], self.words())

    def words(self) -> list[str]:
        """Return the names that were seen, in order of their numbers."""
        return list(scanner.list_words(self.table))


class _Reading:
    """One file, on its way into columns."""

    def __init__(self, path: Path) -> None:
        self.path, self.checks = path, Checks(path.name)
        self.events: list[Event] = []
        self.odd: dict[int, Record] = {}

    def columns(self, file: BinaryIO) -> Columns:
        """Read all of it; raises GivenUpError. While a chunk is scanned, the one before it is digested."""
        header = read_header(self.path)
        if header is None or not 1 <= header.sketch_size <= SKETCH_BLOCK:
            raise GivenUpError
        scanning, before = Scanning(header.sketch_size, self.path.stat().st_size), None
        with ThreadPoolExecutor(1) as beside:
            for data, place, first in scanning.chunks(file):
                rows = scanning.room.arrays[0][first : scanning.room.used[0]]
                alone = np.flatnonzero(rows["taken"] == 0)
                odd = [(first + i, int(rows["at"][i]) - place, int(rows["length"][i])) for i in alone.tolist()]
                if before is not None:
                    before.result()
                if len(self.odd) + len(odd) > MAX_ODD or not len(rows):
                    raise GivenUpError
                before = beside.submit(self._take_in, data, first, len(rows), odd)
            if before is not None:
                before.result()
        if not self.checks.footer_seen:
            raise GivenUpError
        return columns_of(header, scanning.parts(len(self.odd)), self.odd, tuple(self.events), self.path.name)

    def _take_in(self, data: memoryview, first: int, lines: int, odd: list[tuple[int, int, int]]) -> None:
        """Check the lines that were left alone (row, place, length), and digest all of the chunk in its order."""
        at, row = 0, first
        for alone, place, length in odd:
            self._records(data[at:place], alone - row)
            self._line(alone, bytes(data[place : place + length]))
            at, row = place + length, alone + 1
        self._records(data[at:], first + lines - row)

    def _records(self, raw: memoryview, lines: int) -> None:
        if len(raw) and self.checks.footer_seen:
            raise GivenUpError
        self.checks.take_in(raw, lines)

    def _line(self, row: int, raw: bytes) -> None:
        item = self.checks.parse(row + 1, raw)
        if isinstance(item, Problem) or self.checks.item(row + 1, raw, item, self.checks.own_faults(item)):
            raise GivenUpError
        if isinstance(item, Event):
            self.events.append(item)
        elif isinstance(item, Record):
            self.odd[row] = item


def columns_of(header: Header, parts: Parts, odd: dict[int, Record], events: tuple[Event, ...], name: str) -> Columns:
    """Return what was read as columns, with the records that trace_file.py has read in their rows; raises GivenUpError.

    `parts.sums` has room at its end for a sketch of each of them.
    """
    numbers = {word: number for number, word in enumerate(parts.words)}
    rows, count = parts.rows, len(parts.sums) - len(odd)
    for index, record in odd.items():
        if record.sketch is not None:
            parts.sums[count] = record.sketch
            count += 1
        rows.put(index, row_of(record, numbers, count - 1))
    left = np.flatnonzero(rows["taken"] == 0)
    moved = {int(index - np.searchsorted(left, index)): record for index, record in odd.items()}
    if left.tolist() == [0, len(rows) - 1]:  # header and footer: no need to copy what stands between
        kept = rows.part(slice(1, -1))
    elif left.tolist() == list(range(len(left))):  # as a packed trace has them
        kept = rows.part(slice(len(left), None))
    else:
        kept = rows.part(rows["taken"] == 1)
    return Columns(header, kept, parts.sums[:count], parts.hashes, list(numbers), events, name, moved)


MAX_LAYER = 1_000_000
"""The last layer that a row can name, as in _scan.c."""


def row_of(record: Record, numbers: dict[str, int], sums: int) -> Any:
    """Return the row of a record that trace_file.py has read; words that are new get a number. Raises GivenUpError.

    Row hashes, a rank and a payload's name are left to the record itself.
    """
    if (record.layer or 0) > MAX_LAYER:
        raise GivenUpError

    def number(word: str | None) -> int:
        return -1 if word is None else numbers.setdefault(word, len(numbers))

    try:
        row = np.zeros((), ROW)
        for name in INTEGERS:
            value = getattr(record, name)
            row[name] = NONE if value is None else value
        for name in FLOATS:
            value = getattr(record, name)
            row[name] = np.nan if value is None else value
        row["hash"] = int(record.hash, 16)
    except (OverflowError, ValueError) as error:
        raise GivenUpError from error
    shape = None if record.shape is None else "[" + ",".join(map(str, record.shape)) + "]"
    for name in WORDS:
        row[name] = number(shape if name == "shape" else getattr(record, name))
    row["layer"] = -1 if record.layer is None else record.layer
    row["sums"], row["rows"] = (-1 if record.sketch is None else sums), -1
    row["taken"] = 1
    return row
