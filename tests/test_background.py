"""The writer's thread: order, errors, bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from driftprobe import background
from driftprobe.background import Background


def test_what_was_begun_first_is_written_in_the_order_in_which_it_was_put() -> None:
    written: list[int] = []
    with Background(squares, written.extend) as work:
        early, whole = work.begin([7, 8, 9], 24), work.begin([5, 6], 16)
        for item in (1, early.one(2), 2, 3, early.one(0), whole):
            work.put(item)
    assert written == [1, 81, 4, 9, 49, 25, 36]  # 8 was begun and never put


def squares(numbers: Sequence[int]) -> Callable[[], list[int]]:
    return lambda: [n * n for n in numbers]


def inverses(numbers: Sequence[int]) -> Callable[[], list[int]]:
    return lambda: [1 // n for n in numbers]


@pytest.mark.parametrize("begun", [False, True])
def test_what_goes_wrong_in_the_thread_is_raised_where_the_run_goes_on(begun: bool) -> None:
    with pytest.raises(ZeroDivisionError), Background(inverses, lambda _: None) as work:
        work.put(work.begin([0], 8) if begun else 0)
        work.drain()
        pytest.fail("drain went on")


def test_a_writer_that_fails_stops_the_run_and_is_not_asked_again() -> None:
    asked: list[list[int]] = []

    def write(group: list[int]) -> None:
        asked.append(group)
        raise OSError("no room")

    def run() -> None:
        with Background(squares, write) as work:
            while True:
                work.put(1)

    with pytest.raises(OSError, match="no room"):
        run()
    assert len(asked) == 1


def test_an_error_of_the_run_itself_is_not_hidden_and_drops_what_waits() -> None:
    with pytest.raises(KeyError), Background(squares, lambda _: None) as work:
        work.put(1)
        raise KeyError("mine")


def test_a_slow_disk_holds_the_run_back_before_memory_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "WAITING_BYTES", 1000)
    may_write, put = threading.Event(), []

    def run() -> None:
        with Background(squares, lambda _: may_write.wait(60)) as work:
            for n in range(100):
                work.put(n, 100)
                put.append(n)

    running = threading.Thread(target=run)
    running.start()
    running.join(0.5)
    waiting = len(put)
    may_write.set()
    running.join(60)
    assert 10 <= waiting < 20
    assert len(put) == 100
