"""Measures many cases over the cores of one machine, in processes of one thread each, and keeps what is done."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from benchmarks.accuracy import store
from benchmarks.accuracy.cases import Case
from benchmarks.accuracy.outcome import Outcome

BATCH = 8
"""Cases that a process takes at a time: enough to share a clean run, few enough to lose little when stopped."""


def run(cases: Sequence[Case], results: Path, jobs: int, told: Callable[[Outcome], None]) -> dict[str, Outcome]:
    """Measure the cases that `results` does not hold yet, and return the outcomes of all of them by id."""
    sources = store.digest()
    done = store.read(results, sources)
    left = [case for case in cases if case.id not in done]
    found = _one_by_one(left) if jobs == 1 else _over_processes(left, jobs)
    for outcome in store.append(results, sources, found):
        done[outcome.case] = outcome
        told(outcome)
    return {case.id: done[case.id] for case in cases if case.id in done}


def _one_by_one(cases: Sequence[Case]) -> Iterator[Outcome]:
    _start()
    from benchmarks.accuracy.measure import measure

    yield from map(measure, cases)


def _over_processes(cases: Sequence[Case], jobs: int) -> Iterator[Outcome]:
    batches = iter([cases[i : i + BATCH] for i in range(0, len(cases), BATCH)])
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start)
    try:
        running: set[Future[list[Outcome]]] = {pool.submit(_batch, b) for b in itertools.islice(batches, 2 * jobs)}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(_batch, batch) for batch in itertools.islice(batches, len(finished))}
            for future in finished:
                yield from future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


def _batch(cases: Sequence[Case]) -> list[Outcome]:
    from benchmarks.accuracy.measure import measure

    return [measure(case) for case in cases]
