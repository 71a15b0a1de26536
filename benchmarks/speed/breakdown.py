"""Where a captured decode step's time goes, by processor time: on the model's own thread, and on the writer's.

The writer's work is done here in the model's thread, in its turn, so that each share can be told from the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.speed.capture import Traced
from benchmarks.speed.subject import Bare, llama
from driftprobe import background


class _Done:
    """What a pool hands back, done already."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value

    def done(self) -> bool:
        return True


class _Here:
    """A pool that works in the caller's thread, and counts: `begun` ahead of a layer's end, `written` behind it."""

    spent: dict[str, float]

    def __init__(self, *_: object) -> None:
        _Here.spent = {"begun": 0.0, "written": 0.0}

    def submit(self, work: Callable[..., Any], *args: Any) -> _Done:
        started = time.thread_time()
        found = _Done(work(*args))
        _Here.spent["written" if args else "begun"] += time.thread_time() - started
        return found

    def shutdown(self, **_: object) -> None:
        return None


@contextmanager
def _in_this_thread() -> Iterator[None]:
    names = vars(background)
    before = names["ThreadPoolExecutor"]
    names["ThreadPoolExecutor"] = _Here
    try:
        yield
    finally:
        names["ThreadPoolExecutor"] = before


def measure(repetitions: int = 9) -> dict[str, float]:
    """Return milliseconds, each the median: `model` alone, and what a capture adds, by share."""
    import torch

    torch.set_num_threads(1)
    model = llama()
    bare, traced = Bare(model), Traced(model, scores=False)
    rounds = []
    with _in_this_thread():
        for _ in range(repetitions + 1):
            rounds.append(_round(bare, traced))
    shares = zip(("model", "hooks", "begun", "written"), zip(*rounds[1:], strict=True), strict=True)
    return {name: round(1000 * statistics.median(each), 2) for name, each in shares}


def _round(bare: Bare, traced: Traced) -> tuple[float, float, float, float]:
    import torch

    cache = bare._prefilled()[1]
    with torch.no_grad():
        started = time.thread_time()
        bare.model(bare.next, position_ids=bare.position, past_key_values=cache, use_cache=True)
        alone = time.thread_time() - started
    listen = traced.engine._listen
    found: dict[str, float] = {}

    def watched(*args: Any, **kw: Any) -> Any:
        _Here.spent = {"begun": 0.0, "written": 0.0}
        started = time.thread_time()
        heard = listen(*args, **kw)
        found["listening"] = time.thread_time() - started - _Here.spent["begun"]
        return heard

    traced.engine._listen = watched  # type: ignore[method-assign]
    try:
        traced.decode()
    finally:
        traced.engine._listen = listen  # type: ignore[method-assign]
    return alone, found["listening"] - alone, _Here.spent["begun"], _Here.spent["written"]
