"""Programs that print without end, leave something behind, or do not end."""

from __future__ import annotations

import os
import signal
import time

import pytest

from driftprobe.subprocesses import TAIL, run_program


def run(tmp_path, script, limit=30.0):
    return run_program(["sh", "-c", script], tmp_path, {"WORD": "said"}, limit)


def test_of_endless_output_the_end_is_kept_in_bounded_memory_and_nothing_on_disk(tmp_path):
    failure, lines = run(tmp_path, "yes 0123456789 | head -c 64000000; echo; echo the last words, $WORD")
    assert failure == ""
    assert lines[-1] == "the last words, said"
    assert TAIL - 64 <= sum(len(line) + 1 for line in lines) <= TAIL
    assert not list(tmp_path.iterdir())


def test_a_program_is_never_held_up_by_its_own_output(tmp_path):
    """More than a pipe holds, on both streams."""
    failure, lines = run(tmp_path, "head -c 300000 /dev/zero | tr '\\0' e >&2; echo; echo done")
    assert (failure, lines[-1]) == ("", "done")


@pytest.mark.parametrize(("script", "words"), [("exit 7", "exit code 7"), ("kill -TERM $$", "signal SIGTERM")])
def test_how_it_ended_is_said(tmp_path, script, words):
    assert words in run(tmp_path, f"echo before; {script}")[0]


def test_what_runs_beyond_its_time_ends_with_all_that_it_started(tmp_path):
    failure, lines = run(tmp_path, "sleep 300 & echo $!; wait", limit=1.0)
    assert "time_limit" in failure
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # its parent is gone: it is reaped by whoever comes next
            os.kill(int(lines[0]), 0)
            time.sleep(0.1)


def test_what_left_the_session_and_holds_the_output_open_is_not_waited_for(tmp_path):
    started = time.monotonic()
    failure, lines = run(tmp_path, "setsid sleep 60 & echo $!")
    os.kill(int(lines[0]), signal.SIGKILL)
    assert failure == ""
    assert time.monotonic() - started < 30
