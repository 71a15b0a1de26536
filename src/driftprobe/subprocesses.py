"""Runs another program to its end, in a session of its own, and keeps the end of what it prints."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

TAIL = 1 << 20
"""Bytes of a program's output that are kept: its last ones, however many there are."""
_LEFT_OPEN = 2.0
"""Seconds that are waited for the output's end: a process that left the session may hold it open for ever."""


def run_program(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], time_limit: float
) -> tuple[str, list[str]]:
    """Run a command, `time_limit` seconds at most; returns why it failed, or nothing, and the lines that it printed.

    What it started in its session ends with it.
    """
    try:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror or error}", []
    assert process.stdout is not None
    heard = _Heard(process.stdout)
    failure = ""
    try:
        code = process.wait(time_limit)
        failure = "" if code == 0 else f"{command[0]} ended with {_ending(code)}"
    except subprocess.TimeoutExpired:
        failure = f"{command[0]} was still running after {time_limit:g} s (time_limit)"
    finally:
        _end(process)
    return failure, heard.lines()


class _Heard:
    """Reads a program's output as it comes, so that it never waits for a reader nor fills a disk."""

    def __init__(self, source: IO[bytes]) -> None:
        self._last = bytearray()
        self._source = source
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with self._source:
            while part := os.read(self._source.fileno(), 1 << 16):
                self._last += part
                if len(self._last) > 2 * TAIL:
                    del self._last[:-TAIL]

    def lines(self) -> list[str]:
        """Return the last lines, once the output has ended."""
        self._thread.join(_LEFT_OPEN)
        text = bytes(self._last)[-TAIL:].decode("utf-8", errors="replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()]


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program that was started here and still runs, with what it started itself."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
