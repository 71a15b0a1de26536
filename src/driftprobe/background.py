"""One thread that fingerprints and writes what an engine hands out, while the engine goes on.

The compiled fingerprint and the disk need no interpreter's lock, so that the model is not held up. Order is that in
which items are given to `put`, whatever was begun first. What goes wrong in the thread is raised by the next call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

GROUP = 256
"""Items that are written together: one decode step of a small model."""
WAITING_BYTES = 256 << 20
"""Bytes of tensors that may wait to be written before `put` waits too: what bounds a run's memory, however long."""


class Begun(Generic[T, R]):
    """An item whose work was begun before it was put: with others of its group, or, alone, not yet."""

    __slots__ = ("_at", "_group", "item")

    def __init__(self, item: T, group: Future[list[R]] | None = None, at: int = 0) -> None:
        self.item, self._group, self._at = item, group, at

    def result(self, work: Callable[[T], R]) -> R:
        """Return what was made of the item; called in the thread, behind the work that it waits for."""
        return work(self.item) if self._group is None else self._group.result()[self._at]


class Background(Generic[T, R]):
    """Does `work` for each item and `write` for each group of results, in a thread of its own.

    A context manager: its end waits for what was put, and raises what went wrong; where it is left by an error, what
    has not begun is dropped.
    """

    def __init__(self, work: Callable[[T], R], write: Callable[[list[R]], None]) -> None:
        self._work, self._write = work, write
        self._pool = ThreadPoolExecutor(1, "driftprobe-writer")
        self._waiting: list[Begun[T, R]] = []
        self._bytes, self._broken = 0, False
        self._written: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> Background[T, R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, items: Sequence[T]) -> list[Begun[T, R]]:
        """Begin the work of items now; each counts once it is put."""
        group = self._pool.submit(lambda: [self._work(item) for item in items])
        return [Begun(item, group, at) for at, item in enumerate(items)]

    def put(self, item: Begun[T, R], size: int = 0) -> None:
        """Queue an item that holds `size` bytes. Raises what went wrong with those before it."""
        self._waiting.append(item)
        self._bytes += size
        if len(self._waiting) >= GROUP or self._bytes >= WAITING_BYTES // 4:
            self.flush()

    def flush(self) -> None:
        """Let the thread write what was put so far; waits only where WAITING_BYTES wait already."""
        if self._waiting:
            self._written.append((self._pool.submit(self._finish, self._waiting), self._bytes))
            self._waiting, self._bytes = [], 0
        while self._written and (self._written[0][0].done() or sum(n for _, n in self._written) > WAITING_BYTES):
            self._written.popleft()[0].result()

    def drain(self) -> None:
        """Wait until everything is written."""
        self.flush()
        while self._written:
            self._written.popleft()[0].result()

    def _finish(self, group: list[Begun[T, R]]) -> None:
        """Write a group, unless one before it could not be: a gap would look like a whole."""
        if self._broken:
            return
        self._broken = True
        self._write([item.result(self._work) for item in group])
        self._broken = False
