"""Shell completion: the script is the shell's own language, and what it asks for is answered."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from driftprobe.cli import COMMANDS
from driftprobe.errors import UsageError
from make_trace import assert_five_parts
from test_output import driftprobe, raised


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH on which `driftprobe` is this checkout's."""
    program = tmp_path / "driftprobe"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from driftprobe.cli import main; main()' \"$@\"\n")
    program.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_of_its_shell(shell, tmp_path):
    script = driftprobe("completion", shell).output
    assert "_DRIFTPROBE_COMPLETE" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr


ASK = """
eval "$(driftprobe completion bash)"
COMP_WORDS=(driftprobe {words}); COMP_CWORD={at}; COMPREPLY=()
_driftprobe_completion driftprobe
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "at", "found"),
    [("''", 1, set(COMMANDS)), ("base", 1, {"baseline"}), ("baseline ''", 2, {"save", "check"}),
     ("analyze --ju", 2, {"--junit"})],
)  # fmt: skip
def test_bash_completes_commands_and_options(words, at, found, path):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    done = subprocess.run(["bash", "-c", ASK.format(words=words, at=at)], capture_output=True, text=True,
                          env={**os.environ, "PATH": path}, check=True)  # fmt: skip
    assert set(done.stdout.split()) == found, done.stderr


@pytest.mark.parametrize(("words", "found"), [("base", "baseline"), ("baseline ch", "check")])
def test_fish_completes_commands(words, found, path):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    ask = f"driftprobe completion fish | source; complete -C 'driftprobe {words}'"
    done = subprocess.run(["fish", "--no-config", "-c", ask], capture_output=True, text=True,
                          env={**os.environ, "PATH": path}, check=True)  # fmt: skip
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [found], done.stderr


def said(terminal: int, words: bytes) -> bytes:
    """What a terminal shows, read until some words are in it."""
    shown, ends = b"", time.monotonic() + 120
    while words not in shown and time.monotonic() < ends:
        if select.select([terminal], [], [], 1.0)[0]:
            shown += os.read(terminal, 4096)
    return shown


def test_zsh_completes_a_command_at_its_prompt(path):
    """A tab in a real terminal; ^A then puts `print` before the line, so that zsh tells what it has become."""
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    terminal, inner = os.openpty()
    with subprocess.Popen(["zsh", "-f", "-i"], stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
                          env={**os.environ, "PATH": path, "TERM": "xterm"}) as shell:  # fmt: skip
        try:
            start = 'PS1=; autoload -Uz compinit; compinit -D -u; eval "$(driftprobe completion zsh)"; print be""gin\n'
            os.write(terminal, start.encode())
            assert b"begin" in said(terminal, b"begin")
            os.write(terminal, b"driftprobe basel\t\x01print -r -- got \n")
            assert b"got driftprobe baseline" in said(terminal, b"got driftprobe baseline")
        finally:
            shell.kill()
            os.close(terminal)
            os.close(inner)


def test_an_unknown_shell_is_refused():
    error = raised("completion", "tcsh")
    assert isinstance(error, UsageError)
    assert_five_parts(error, what="unknown shell", where="completion", measured="tcsh")
