"""Progress: every trace and every arm is a step, the judgement has its own, and a terminal sees the time left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from driftprobe.cli.progress import PROGRESSES, progress
from driftprobe.errors import UsageError
from driftprobe.result import Step, analyze
from make_trace import assert_five_parts
from report_traces import prompt_trace, rounding
from test_pytest_plugin import write

PROMPTS = ("p0_short", "p6_len_16", "p6_len_32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "traces", *(prompt_trace(name, "kv_aligned", rounding) for name in PROMPTS))


def test_each_trace_is_a_step_of_the_judgement(folder):
    told: list[Step] = []
    assert analyze(folder, progress=told.append).reports() == analyze(folder).reports()
    assert [(step.done, step.of) for step in told] == [(0, 3), (1, 3), (2, 3)]
    assert [step.what for step in told] == [f"judging {name}_kv_aligned.jsonl" for name in PROMPTS]


def test_a_run_tells_its_arms_and_its_judgement(tmp_path):
    pytest.importorskip("transformers")
    from driftprobe.api import builtin_prompts, make_engine, run
    from driftprobe.options import RunOptions
    from driftprobe.plan import parse_mode

    engine = make_engine("builtin:tiny", dtype=None, attn=None, tokenizer=None)
    options = RunOptions(modes=parse_mode("as_designed"), ladder="off", date="d")
    told: list[Step] = []
    run(engine, builtin_prompts(engine, ["p0_short"]), options, tmp_path / "run", told.append)
    assert len({step.of for step in told}) == 1 and told[-1] == Step(told[0].of - 1, told[0].of, "judging")
    assert [step.done for step in told] == [*range(1, told[0].of), told[0].of - 1]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_sees_a_bar_with_the_time_left_and_a_pipe_nothing(folder):
    import pty

    words = [sys.executable, "-c", "from driftprobe.cli import main; main()", "analyze", str(folder)]
    for more, shown in (((), True), (("--quiet",), False)):
        ours, theirs = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        done = subprocess.run([*words, *more], stdout=subprocess.PIPE, stderr=theirs, env=env, check=False, timeout=120)
        os.close(theirs)
        seen = b""
        while part := _read(ours):
            seen += part
        os.close(ours)
        assert done.returncode == 0 and (b"judging p6_len_32" in seen) is shown
        assert bool(re.search(rb"\d:\d\d:\d\d|-:--:--", seen)) is shown
    assert not subprocess.run(words, capture_output=True, check=False, timeout=120).stderr


def _read(file: int) -> bytes:
    try:
        return os.read(file, 1 << 16)
    except OSError:  # Linux says so where the other end is closed
        return b""


def test_an_unknown_kind_is_refused():
    with pytest.raises(UsageError) as caught, progress("dots", "x"):
        raise AssertionError("not reached")
    assert_five_parts(caught.value, what="unknown kind of progress", where="--progress", measured="dots")
    assert caught.value.allowed == ", ".join(PROGRESSES)
