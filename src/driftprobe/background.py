"""One thread that fingerprints and writes what an engine hands out, while the engine goes on.

The compiled core and the disk need no interpreter's lock, so that the model is not held up: what the thread does with
the lock in its hand, the model waits for, and for the lock to change hands too. What is begun ahead is therefore
prepared in the caller's thread. Order is that in which items are given to `put`, whatever was begun first. What goes
wrong in the thread is raised by the next call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

GROUP = 64
"""Items that are written together: a few layers of a decode step, so that the thread begins while others are put."""
WAITING_BYTES = 256 << 20
"""Bytes of tensors that may wait to be written before `put` waits too: what bounds a run's memory, however long."""


class Begun(Generic[R]):
    """Items whose work was begun together before they were put: all of them, or one."""

    __slots__ = ("_group", "_which", "count", "size")

    def __init__(self, group: Future[list[R]], count: int, size: int, which: int | None = None) -> None:
        self._group, self._which = group, which
        self.count, self.size = count, size

    def one(self, which: int) -> Begun[R]:
        """Return one of the items alone."""
        return Begun(self._group, 1, self.size // max(self.count, 1), which)

    def results(self) -> list[R]:
        """Return what was made of the items; called in the thread, behind the work that it waits for."""
        found = self._group.result()
        return found if self._which is None else [found[self._which]]


class Background(Generic[T, R]):
    """Does `work` for items, several at a time, and `write` for each group of results, in a thread of its own.

    `work` prepares items at once and returns what is left to do, which belongs into the thread. A context manager: its
    end waits for what was put, and raises what went wrong; where it is left by an error, what has not begun is dropped.
    """

    def __init__(self, work: Callable[[Sequence[T]], Callable[[], list[R]]], write: Callable[[list[R]], None]) -> None:
        self._work, self._write = work, write
        self._pool = ThreadPoolExecutor(1, "driftprobe-writer")
        self._waiting: list[T | Begun[R]] = []
        self._count, self._bytes, self._broken = 0, 0, False
        self._written: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> Background[T, R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, items: Sequence[T], size: int) -> Begun[R]:
        """Begin the work of items of `size` bytes; put is what counts. Raises what their preparation raises."""
        return Begun(self._pool.submit(self._work(items)), len(items), size)

    def put(self, item: T | Begun[R], size: int = 0) -> None:
        """Queue an item that holds `size` bytes, or begun ones. Raises what went wrong with those before."""
        self._waiting.append(item)
        begun = isinstance(item, Begun)
        self._count += item.count if begun else 1  # type: ignore[union-attr]
        self._bytes += item.size if begun else size  # type: ignore[union-attr]
        if self._count >= GROUP or self._bytes >= WAITING_BYTES // 4:
            self.flush()

    def flush(self) -> None:
        """Let the thread write what was put so far; waits only where WAITING_BYTES wait already."""
        if self._waiting:
            self._written.append((self._pool.submit(self._finish, self._waiting), self._bytes))
            self._waiting, self._count, self._bytes = [], 0, 0
        while self._written and (self._written[0][0].done() or sum(n for _, n in self._written) > WAITING_BYTES):
            self._written.popleft()[0].result()

    def drain(self) -> None:
        """Wait until everything is written."""
        self.flush()
        while self._written:
            self._written.popleft()[0].result()

    def _finish(self, group: list[T | Begun[R]]) -> None:
        """Write a group, unless one before it could not be: a gap would look like a whole."""
        if self._broken:
            return
        self._broken = True
        self._write(self._results(group))
        self._broken = False

    def _results(self, group: list[T | Begun[R]]) -> list[R]:
        """Return the results of a group in its order; neighbours that were not begun are worked on together."""
        found: list[R] = []
        fresh: list[T] = []
        for item in group:
            if not isinstance(item, Begun):
                fresh.append(item)
                continue
            if fresh:
                found += self._work(fresh)()
                fresh = []
            found += item.results()
        return found + self._work(fresh)() if fresh else found
