"""The end of a run: its result is what a judgement of the written folder says, and no trace is judged for nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import models
from driftprobe import api, verdict
from driftprobe.api import run
from driftprobe.engines.hf import HFEngine
from driftprobe.options import RunOptions
from driftprobe.plan import Prompt
from driftprobe.result import analyze

PROMPTS = [Prompt("p", tuple(models.tokens(7)))]


@pytest.fixture(scope="module")
def subject() -> HFEngine:
    return HFEngine(models.build("llama"))


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a folder is read, a grown trace, and how often a trace is judged."""
    seen: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        do = getattr(module, name)

        def noted(*given: Any, **more: Any) -> Any:
            seen[name] += 1
            return do(*given, **more)

        monkeypatch.setattr(module, name, noted)

    for name in ("load_traces", "read_trace", "judge_trace"):
        counted(api, name)
    counted(verdict, "judge_trace")
    return seen


@pytest.mark.parametrize("payload", ["none", "failing", "all"])
@pytest.mark.parametrize("fault", [None, "k_rows_swapped", "weights_quantised"])
def test_a_run_says_what_a_judgement_of_its_folder_says(
    subject: HFEngine, fault: str | None, payload: str, tmp_path: Path
) -> None:
    done = run(subject, PROMPTS, RunOptions(fault=fault, payload=payload), tmp_path / "run")
    again = analyze(tmp_path / "run")
    assert done.traces == again.traces
    assert done.judgement == again.judgement
    assert done.reports() == again.reports()
    assert {name: (tmp_path / "run" / name).read_text(encoding="utf-8") for name in again.reports()} == again.reports()


@pytest.mark.parametrize(("payload", "times"), [("none", 1), ("all", 1), ("failing", 2)])
def test_traces_are_read_once_and_judged_again_only_where_they_lost_payloads(
    subject: HFEngine, payload: str, times: int, counts: Counter[str], tmp_path: Path
) -> None:
    done = run(subject, PROMPTS, RunOptions(payload=payload), tmp_path / "run")
    assert counts == {"load_traces": 1, "judge_trace": times * len(done.traces)}


def test_only_the_traces_that_gained_a_matrix_are_read_and_judged_again(
    subject: HFEngine, counts: Counter[str], tmp_path: Path
) -> None:
    done = run(subject, PROMPTS, RunOptions(payload="all", fault="weights_quantised"), tmp_path / "run")
    grown = counts["read_trace"]
    assert grown > 0 and counts["load_traces"] == 1
    assert counts["judge_trace"] == len(done.traces) + grown


def test_a_pruned_trace_that_has_nothing_to_lose_is_not_written_again(subject: HFEngine, tmp_path: Path) -> None:
    done = run(subject, PROMPTS, RunOptions(fault="k_rows_swapped"), tmp_path / "run")
    (judged,) = done.judgement.modes["kv_aligned"].prompts
    trace = next(trace for trace in done.traces if trace.path == judged.file)
    written = (tmp_path / "run/traces" / trace.path).stat()
    assert api.prune_payloads(trace, judged, tmp_path / "run/traces") is trace
    assert (tmp_path / "run/traces" / trace.path).stat().st_mtime_ns == written.st_mtime_ns
