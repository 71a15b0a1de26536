"""The writer's thread: order, errors, bounded memory."""

from __future__ import annotations

import threading

import pytest

from driftprobe import background
from driftprobe.background import Background, Begun


def test_what_was_begun_first_is_written_in_the_order_in_which_it_was_put() -> None:
    written: list[int] = []
    with Background(lambda n: n * n, written.extend) as work:
        early = work.begin([7, 8, 9])
        for item in (Begun(1), early[2], Begun(2), early[0]):
            work.put(item)
    assert written == [1, 81, 4, 49]  # 8 was begun and never put


@pytest.mark.parametrize("begun", [False, True])
def test_what_goes_wrong_in_the_thread_is_raised_where_the_run_goes_on(begun: bool) -> None:
    with pytest.raises(ZeroDivisionError), Background(lambda n: 1 // n, lambda _: None) as work:
        work.put(work.begin([0])[0] if begun else Begun(0))
        work.drain()
        pytest.fail("drain went on")


def test_a_writer_that_fails_stops_the_run_and_is_not_asked_again() -> None:
    asked: list[list[int]] = []

    def write(group: list[int]) -> None:
        asked.append(group)
        raise OSError("no room")

    def run() -> None:
        with Background(lambda n: n, write) as work:
            while True:
                work.put(Begun(1))

    with pytest.raises(OSError, match="no room"):
        run()
    assert len(asked) == 1


def test_an_error_of_the_run_itself_is_not_hidden_and_drops_what_waits() -> None:
    with pytest.raises(KeyError), Background(lambda n: n, lambda _: None) as work:
        work.put(Begun(1))
        raise KeyError("mine")


def test_a_slow_disk_holds_the_run_back_before_memory_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "WAITING_BYTES", 1000)
    may_write, put = threading.Event(), []

    def run() -> None:
        with Background(lambda n: n, lambda _: may_write.wait(60)) as work:
            for n in range(100):
                work.put(Begun(n), 100)
                put.append(n)

    running = threading.Thread(target=run)
    running.start()
    running.join(0.5)
    waiting = len(put)
    may_write.set()
    running.join(60)
    assert 10 <= waiting < 20
    assert len(put) == 100
