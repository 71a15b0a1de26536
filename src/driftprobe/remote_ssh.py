"""Scripts for a node's shell over the user's own OpenSSH client, and the words for what goes wrong on the way."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from driftprobe.errors import EngineError, UsageError
from driftprobe.remote_scripts import ALIVE, LOCKED

_HOST = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.:%@\[\]-]{0,254}")
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0)
"""Seconds between tries after a dropped connection: a minute and a half. What comes in between starts them anew."""
LOST = 255
"""What OpenSSH's client ends with where it is the connection that failed."""
LAST_LINES = 6
_MOST_NOISE = 1 << 20

Told = Callable[[str], None]
"""Is told every line that the node prints."""


@dataclass(frozen=True, slots=True)
class Node:
    """Where a run goes."""

    host: str
    """What `ssh` is called with: a name, an alias of ~/.ssh/config, user@name."""
    command: str = "driftprobe"
    """How driftprobe is called there: shell words, not quoted again."""
    folder: str = ""
    """The folder on the node that holds the lock and each run's own folder; by default ~/.driftprobe."""

    @property
    def lock(self) -> str:
        """The lock, as a word for the node's shell."""
        return shlex.quote(f"{self.folder}/lock") if self.folder else "~/.driftprobe/lock"


class DroppedError(EngineError):
    """The connection was lost: the node has all of it, and the same command goes on."""


class HeldError(EngineError):
    """Another run holds the node."""

    holder = ""
    """Its id, and who started it where and when."""


def check_host(host: str) -> None:
    """Raise UsageError for what cannot be a host: ssh would take a leading dash for an option."""
    if not _HOST.fullmatch(host):
        raise UsageError("not a host", where="--host", measured=repr(host)[:80],
                         allowed="[user@]name, or an alias of your ssh configuration",
                         next_step="give the name that `ssh NAME` takes")  # fmt: skip


def ssh_command(host: str, sockets: str) -> list[str]:
    """Return the ssh call: the user's own client (or DRIFTPROBE_SSH), host keys checked, one shared connection."""
    interactive = os.isatty(0)
    options = {
        "StrictHostKeyChecking": "yes",
        "BatchMode": "no" if interactive else "yes",
        "ConnectTimeout": "15",
        "ControlMaster": "auto",
        "ControlPath": f"{sockets}/%C",
        "ControlPersist": "30",
        "ServerAliveInterval": "15",
    }
    given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return [*_client(), *given, "--", host, "sh -s"]


def _client() -> list[str]:
    return shlex.split(os.environ.get("DRIFTPROBE_SSH", "ssh"))


class Connection:
    """Runs scripts on a node.

    A line with a random mark is printed before each: what the node's shell prints when it starts is not ours.
    """

    def __init__(self, node: Node, sockets: str, told: Told) -> None:
        self.node, self._told, self._command = node, told, ssh_command(node.host, sockets)
        self._mark = f"driftprobe-{secrets.token_hex(8)}\n".encode()
        self.said = b""
        """What the client said on its error stream in the last `stream`."""

    def run(self, script: str) -> str:
        """Run a script and return what it prints. A dropped connection is tried again; any other failure raises."""
        for pause in (*PAUSES, None):
            done = self._once(script)
            _, mark, out = done.stdout.partition(self._mark)
            if done.returncode == 0 and mark:
                return out.decode("utf-8", errors="replace")
            if not self._again(done.returncode, done.stderr, pause):
                break
        raise self.error(done.returncode, out, done.stderr)

    def stream(self, script: Callable[[], str], sink: Callable[[bytes], bool]) -> int:
        """Run a script and hand on what it prints as it comes; after a drop `script()` is asked for the rest.

        Ends where `sink` returns False. Returns the script's exit code; what it said on its error stream is in `said`.
        """
        waits = [*PAUSES]
        while True:
            came, code = self._stream_once(script(), sink)
            if came:
                waits = [*PAUSES]
            if code != LOST:
                return code
            if not self._again(LOST, self.said, waits.pop(0) if waits else None):
                raise self.error(LOST, b"", self.said)

    def _stream_once(self, script: str, sink: Callable[[bytes], bool]) -> tuple[bool, int]:
        """Returns whether anything came, and the exit code; 0 where the sink had enough."""
        came = enough = False
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            assert process.stdin is not None and process.stdout is not None
            try:
                with process.stdin as text:
                    text.write(self._marked(script))
                for part in self._after_mark(process.stdout.fileno()):
                    came = True
                    if not sink(part):
                        enough = True
                        process.terminate()
                        break
            except BrokenPipeError:
                pass  # the connection is gone; the exit code says so
            except BaseException:
                process.terminate()  # it may wait for a node that has nothing to say for hours
                raise
            finally:
                process.stdout.close()
                process.wait()
            errors.seek(0)
            self.said = errors.read(_MOST_NOISE)
        return came, 0 if enough else process.returncode

    def _after_mark(self, source: int) -> Iterator[bytes]:
        before: bytes | None = b""
        while part := os.read(source, 1 << 20):
            if before is None:
                yield part
                continue
            _, mark, rest = (before + part).partition(self._mark)
            before = None if mark else (before + part)[-_MOST_NOISE:]
            if mark and rest:
                yield rest

    def _marked(self, script: str) -> bytes:
        return b"printf '%s\\n' " + self._mark + script.encode()

    def _once(self, script: str) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(self._command, input=self._marked(script), capture_output=True, check=False)
        except OSError as error:
            raise UsageError("no ssh client", where=self._command[0], measured=error.strerror or str(error),
                             allowed="OpenSSH's client on the PATH",
                             next_step="install it, or name it in DRIFTPROBE_SSH") from error  # fmt: skip

    def _again(self, code: int, said: bytes, pause: float | None) -> bool:
        """Wait and say yes where the connection was lost; what asking again cannot mend is not asked again."""
        if code != LOST or pause is None or any(words in said for words in _LASTING):
            return False
        self._told(f"connection lost, trying again in {pause:g} s")
        time.sleep(pause)
        return True

    def error(self, code: int, out: bytes, said: bytes) -> EngineError:
        """Return the five-part message for a script's exit code and what ssh said."""
        text = said.decode("utf-8", errors="replace").strip()
        last = " | ".join(text.splitlines()[-LAST_LINES:]) or "nothing"
        if code == LOCKED:
            return self._held(out.decode("utf-8", errors="replace").strip())
        if code == ALIVE:
            return EngineError(
                "what this run started has not ended", where=self.node.host, measured=last,
                allowed="an end within seconds of SIGTERM, or at once of SIGKILL",
                next_step="log in with ssh and look; the node stays locked until the same command has brought it home",
            )  # fmt: skip
        if code != LOST:
            return EngineError(
                "a step on the node failed", where=self.node.host, measured=f"exit code {code}; it said: {last}",
                allowed="a POSIX shell, tar, sha256sum or shasum, and the run's folder as it was left",
                next_step="log in with ssh and look; --remote-folder chooses another folder",
            )  # fmt: skip
        lasting = next((words for key, words in _LASTING.items() if key in said), None)
        what, step = lasting or _DROPPED
        return (EngineError if lasting else DroppedError)(
            what, where=self.node.host, measured=last, allowed="a connection as `ssh HOST` makes it",
            next_step=step.replace("HOST", self.node.host),
        )  # fmt: skip

    def _held(self, holder: str) -> HeldError:
        remove = f"ssh {self.node.host} {shlex.quote(f'rm -r {self.node.lock}')}"
        held = HeldError(
            "another run holds this node", where=f"{self.node.host}: {self.node.folder or '~/.driftprobe'}/lock",
            measured=f"held by {holder or 'a run that has not said its name'}", allowed="one run at a time on a node",
            next_step=f"wait for it; if it is no more, `{remove}`, then run again",
        )  # fmt: skip
        held.holder = holder
        return held


_LASTING = {
    b"REMOTE HOST IDENTIFICATION HAS CHANGED": (
        "the node's host key is not the one you know",
        "find out why before anything else; if the node was set up anew, `ssh-keygen -R HOST` and look at its new key",
    ),
    b"Host key verification failed": (
        "the node's host key is not known",
        "log in once with `ssh HOST`, compare the key with what the node's owner says, and accept it there",
    ),
    b"Permission denied": ("the node does not let you in", "check user name and key: `ssh HOST` must log in"),
    b"Could not resolve hostname": ("no such host", "check the name, or add it to your ssh configuration"),
    b"Connection refused": ("the node does not answer", "check that it runs, its port, and your ssh configuration"),
}
"""What ssh says where trying again is of no use -> what is wrong, and what to do."""
_DROPPED = ("the connection was lost", "run the same command again: it goes on where it was; the node has all of it")


@contextmanager
def shared_sockets() -> Iterator[str]:
    """Give a folder for the shared connection; it is closed with it. Short, because a socket's path may not be long."""
    folder = tempfile.mkdtemp(prefix="dp-", dir="/tmp" if Path("/tmp").is_dir() else None)
    try:
        yield folder
    finally:
        for path in Path(folder).iterdir():
            command = [*_client(), "-o", f"ControlPath={path}", "-O", "exit", "x"]
            subprocess.run(command, capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)
