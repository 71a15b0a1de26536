"""driftprobe on another machine: ssh says where, an engine says what.

The user's own OpenSSH client and configuration do the talking, over one shared connection. On the node the same command
runs detached from it, in a folder of its own, so that a dropped connection costs nothing: its output is followed again
from where it was heard, and the archive of its traces is fetched again from where it broke off. Reports are made here,
from the traces alone. docs/engines.md, "A machine across the network".
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from driftprobe.artifacts import check_place, staged, written
from driftprobe.errors import EngineError, OutputError, UsageError
from driftprobe.remote_archive import unpack

_HOST = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.:%@\[\]-]{0,254}")
TRIES, PAUSES = 5, (0.5, 1.0, 2.0, 4.0)
"""How often a dropped connection is tried again, and the seconds between."""
LOST = 255
"""What OpenSSH's client ends with where it is the connection that failed."""
_NO_FOLDER, _LOCKED, _GONE = 73, 75, 71
_LAST_LINES = 6

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


@dataclass(frozen=True, slots=True)
class Task:
    """A run that goes on elsewhere, as it is kept in a file here until it has come home."""

    id: str
    host: str
    command: str
    folder: str
    """The run's own folder on the node; empty until it is made."""


def check_host(host: str) -> None:
    """Raise UsageError for what cannot be a host: ssh would take a leading dash for an option."""
    if not _HOST.fullmatch(host):
        raise UsageError("not a host", where="--host", measured=repr(host)[:80],
                         allowed="[user@]name, or an alias of your ssh configuration",
                         next_step="give the name that `ssh NAME` takes")  # fmt: skip


def remote_command(node: Node, arguments: Sequence[str], date: str, name: str) -> str:
    """Return the shell command that runs on the node, in the run's own folder."""
    words = ["run", *arguments, "--out", "out", "--date", date, "--name", name, "--progress", "lines"]
    return f"{node.command} {shlex.join(words)}"


def plan_of(node: Node, arguments: Sequence[str], date: str, name: str) -> list[str]:
    """Return what would be done, a line each, for --dry-run."""
    base = node.folder or "~/.driftprobe"
    return [
        f"{shlex.join(ssh_command(node.host, '<a folder of this run>'))}    # each step, over one connection",
        f"on {node.host}: take {base}/lock (or say who holds it) and make {base}/runs/<id>",
        f"on {node.host}: cd {base}/runs/<id> && {remote_command(node, arguments, date, name)}",
        f"on {node.host}: tar of out/{date}/{name}/traces and run, with its SHA-256",
        "here: fetch the archive, check its digest, unpack it, judge the traces and write the reports",
        f"on {node.host}: remove {base}/runs/<id> and the lock, both made by this run",
    ]


def ssh_command(host: str, sockets: str) -> list[str]:
    """Return the ssh call: the user's own client (or DRIFTPROBE_SSH), host keys checked, one shared connection."""
    interactive = os.isatty(0)
    options = {
        "StrictHostKeyChecking": "yes",
        "BatchMode": "no" if interactive else "yes",
        "ControlMaster": "auto",
        "ControlPath": f"{sockets}/%C",
        "ControlPersist": "30",
        "ServerAliveInterval": "15",
    }
    given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return [*shlex.split(os.environ.get("DRIFTPROBE_SSH", "ssh")), *given, "--", host, "sh -s"]


class Connection:
    """Scripts for the node's `sh`, and the words for what goes wrong between here and there."""

    def __init__(self, node: Node, sockets: str) -> None:
        self.node, self._command = node, ssh_command(node.host, sockets)

    def run(self, script: str) -> str:
        """Run a script and return what it prints. A dropped connection is tried again; any other failure raises."""
        for pause in (*PAUSES, None):
            done = self._once(script)
            if done.returncode == 0:
                return done.stdout.decode("utf-8", errors="replace")
            if not self._again(done.returncode, done.stderr, pause):
                break
        raise self.error(done.returncode, done.stdout, done.stderr)

    def stream(self, script: Callable[[], str], sink: Callable[[bytes], None]) -> int:
        """Run a script and hand on what it prints as it comes; after a drop `script()` is asked for the rest.

        Returns the script's exit code.
        """
        for pause in (*PAUSES, None):
            with tempfile.TemporaryFile() as errors:
                process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
                assert process.stdin is not None and process.stdout is not None
                try:
                    with process.stdin as text:
                        text.write(script().encode())
                    while part := os.read(process.stdout.fileno(), 1 << 20):
                        sink(part)
                except BrokenPipeError:
                    pass  # the connection is gone; the exit code says so
                finally:
                    process.stdout.close()
                    process.wait()
                errors.seek(0)
                said = errors.read()
            if process.returncode != LOST or not self._again(LOST, said, pause):
                break
        if process.returncode == LOST:
            raise self.error(LOST, b"", said)
        return process.returncode

    def _once(self, script: str) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(self._command, input=script.encode(), capture_output=True, check=False)
        except OSError as error:
            raise UsageError("no ssh client", where=self._command[0], measured=error.strerror or str(error),
                             allowed="OpenSSH's client on the PATH",
                             next_step="install it, or name it in DRIFTPROBE_SSH") from error  # fmt: skip

    def _again(self, code: int, said: bytes, pause: float | None) -> bool:
        """Wait and say yes where the connection was lost; what asking again cannot mend is not asked again."""
        if code != LOST or pause is None or any(words in said for words in _LASTING):
            return False
        time.sleep(pause)
        return True

    def error(self, code: int, out: bytes, said: bytes) -> EngineError:
        """Return the five-part message for a script's exit code and what ssh said."""
        text = said.decode("utf-8", errors="replace").strip()
        last = " | ".join(text.splitlines()[-_LAST_LINES:]) or "nothing"
        if code == _LOCKED:
            holder = out.decode("utf-8", errors="replace").strip() or "a run that has not said its name"
            where = f"{self.node.folder or '~/.driftprobe'}/lock"
            return EngineError(
                "another run holds this node", where=f"{self.node.host}: {where}", measured=f"held by {holder}",
                allowed="one run at a time on a node",
                next_step=f"wait for it; if it is no more, `ssh {self.node.host} rm -r {where}`, then run again",
            )  # fmt: skip
        if code != LOST:
            return EngineError(
                "a step on the node failed", where=self.node.host, measured=f"exit code {code}; it said: {last}",
                allowed="a POSIX shell, tar, sha256sum or shasum, and a folder that can be written",
                next_step="log in with ssh and look; --remote-folder chooses another folder",
            )  # fmt: skip
        what, step = next(((w, s) for words, (w, s) in _LASTING.items() if words in said), _DROPPED)
        return EngineError(what, where=self.node.host, measured=last, allowed="a connection as `ssh HOST` makes it",
                           next_step=step.replace("HOST", self.node.host))  # fmt: skip


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


def _script(body: str, **values: str | int) -> str:
    """Return a script with its values as shell variables; nothing of them is read by a shell as words."""
    return "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in values.items()) + body


_PREPARE = """
base=${base:-$HOME/.driftprobe}
mkdir -p "$base/runs" && base=$(cd "$base" && pwd) || exit 73
if mkdir "$base/lock" 2>/dev/null; then
  printf '%s\\n' "$id" > "$base/lock/id"; printf '%s\\n' "$holder" > "$base/lock/holder"
elif [ "$(cat "$base/lock/id" 2>/dev/null)" != "$id" ]; then
  cat "$base/lock/holder" 2>/dev/null; exit 75
fi
mkdir "$base/runs/$id" 2>/dev/null && printf '%s\\n' "$id" > "$base/runs/$id/made-by-driftprobe"
printf '%s\\n' "$base/runs/$id"
"""
_START = """
cd "$dir" || exit 73
[ -f started ] && exit 0
: > started; : > log
[ -z "$prompts" ] || printf '%s' "$prompts" > prompts.json
run="trap '' HUP; ($command) ; echo \\$? > exit.part; mv exit.part exit"
own=; command -v setsid >/dev/null && own=setsid
$own sh -c "$run" >> log 2>&1 < /dev/null &
echo $! > pid
"""
_FOLLOW = """
cd "$dir" || exit 73
n=$heard
while :; do
  over=; [ -f exit ] && over=yes
  if [ -z "$over" ] && ! kill -0 "$(cat pid)" 2>/dev/null; then sleep 1; over=gone; [ -f exit ] && over=yes; fi
  size=$(wc -c < log); size=$((size))
  if [ "$size" -gt "$n" ]; then tail -c +$((n + 1)) log | head -c $((size - n)) || exit 0; n=$size; fi
  case $over in yes) exit 0;; gone) exit 71;; esac
  sleep 0.2
done
"""
_PACK = """
cd "$dir" || exit 73
code=$(cat exit 2>/dev/null || echo 71)
from=out/$date/$name; [ -d "$from/traces" ] || from=out/$date/.$name.partial
if [ ! -f artifacts.tar ] && [ -d "$from" ]; then
  set --; for part in traces run; do [ -d "$from/$part" ] && set -- "$@" "$part"; done
  if [ $# -gt 0 ]; then tar -C "$from" -cf artifacts.part "$@" && mv artifacts.part artifacts.tar || exit 74; fi
fi
if [ -f artifacts.tar ]; then
  size=$(wc -c < artifacts.tar)
  digest=$( (sha256sum artifacts.tar 2>/dev/null || shasum -a 256 artifacts.tar) | cut -c 1-64)
  printf '%s %s %s\\n' "$code" "$((size))" "$digest"
else printf '%s 0 none\\n' "$code"; fi
"""
_FETCH = """
cd "$dir" || exit 73
tail -c +$((have + 1)) artifacts.tar
"""
_END = """
cd "$dir" 2>/dev/null && [ "$(cat made-by-driftprobe)" = "$id" ] && [ -f pid ] && [ ! -f exit ] || exit 0
p=$(cat pid); kill -TERM -- "-$p" 2>/dev/null || kill -TERM "$p" 2>/dev/null || true
"""
_CLEAN = """
base=$(dirname "$(dirname "$dir")")
[ "$(cat "$dir/made-by-driftprobe" 2>/dev/null)" = "$id" ] && rm -rf "$dir"
[ "$(cat "$base/lock/id" 2>/dev/null)" = "$id" ] && rm -rf "$base/lock"
exit 0
"""


def run_there(node: Node, arguments: Sequence[str], root: Path, told: Told, *, prompts: str = "", out: str = "") -> int:
    """Run on a node and bring its traces and logs home into `root`; returns the node's exit code (0, 1 or 3).

    `arguments` are those of `driftprobe run`, without place, date and name, which are `root`'s own. `prompts` is the
    text of a prompt file, written as prompts.json there. A run that was started earlier for this place, by the same
    arguments, goes on. Raises EngineError where the node, the connection or the engine fails: what was traced until
    then has come home, or will when the command is given again.
    """
    check_host(node.host)
    check_place(root)
    date, name = root.parent.name, root.name
    command = remote_command(node, arguments, date, name)
    home = Home(root, command, node)
    with _sockets() as sockets:
        connection = Connection(node, sockets)
        task = home.task()
        task = replace(
            task, folder=connection.run(_script(_PREPARE, base=node.folder, id=task.id, holder=_holder())).strip()
        )
        home.keep(task)
        connection.run(_script(_START, dir=task.folder, command=command, prompts=prompts))
        try:
            _follow(connection, home, task, told)
        except KeyboardInterrupt:
            connection.run(_script(_END, dir=task.folder, id=task.id))
            connection.run(_script(_CLEAN, dir=task.folder, id=task.id))
            home.forget()
            raise
        code, size, digest = connection.run(_script(_PACK, dir=task.folder, date=date, name=name)).split()
        _fetch(connection, home, task, int(size), digest)
        _unpack(home, root, complete=int(code) in (0, 1, 3))
        connection.run(_script(_CLEAN, dir=task.folder, id=task.id))
    last = home.last_lines()
    home.forget()
    if int(code) not in (0, 1, 3) or int(size) == 0:
        raise _failed(node, int(code), last, out or root.as_posix())
    return int(code)


class Home:
    """The hidden folder beside the run's place in which all that has come from the node waits until it is whole."""

    def __init__(self, root: Path, command: str, node: Node) -> None:
        self.folder = root.with_name(f".{root.name}.remote")
        self._command, self._node = command, node
        self.archive, self.log = self.folder / "artifacts.tar.part", self.folder / "remote.log"

    def task(self) -> Task:
        """Return the run that waits here, or a new one. Raises UsageError where another one waits."""
        kept = self.folder / "task.json"
        with written(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log.touch()
        new = Task(secrets.token_hex(8), self._node.host, self._command, "")
        if not kept.is_file():
            return new
        found = Task(**json.loads(kept.read_text(encoding="utf-8")))
        if (found.host, found.command) != (new.host, new.command):
            raise UsageError(
                "another remote run of this place has not come home", where=str(self.folder),
                measured=f"on {found.host}: {found.command}"[:400], allowed="the same command, which goes on with it",
                next_step=f"give that command again, choose another --name, or remove {self.folder} to let it go",
            )  # fmt: skip
        return found

    def keep(self, task: Task) -> None:
        """Write down where a run is."""
        with written(self.folder):
            partial = self.folder / "task.json.part"
            partial.write_text(json.dumps(asdict(task)), encoding="utf-8")
            partial.replace(self.folder / "task.json")

    def last_lines(self) -> str:
        """Return the last lines that the node printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("progress: ")]
        return " | ".join(lines[-_LAST_LINES:])

    def forget(self) -> None:
        """Remove the folder: everything in it has its place."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _follow(connection: Connection, home: Home, task: Task, told: Told) -> None:
    """Hand on the node's output line by line until its command ends."""
    waiting = b""
    heard = home.log.stat().st_size

    def sink(part: bytes) -> None:
        nonlocal waiting, heard
        with written(home.log), home.log.open("ab") as file:
            file.write(part)
        heard += len(part)
        *lines, waiting = (waiting + part).split(b"\n")
        for line in lines:
            told(line.decode("utf-8", errors="replace"))

    code = connection.stream(lambda: _script(_FOLLOW, dir=task.folder, heard=heard), sink)
    if code not in (0, _GONE):
        raise connection.error(code, b"", b"its output could not be followed")


def _fetch(connection: Connection, home: Home, task: Task, size: int, digest: str) -> None:
    """Bring the archive home, from where it broke off, and check its digest."""
    if size == 0:
        return

    def have() -> int:
        return home.archive.stat().st_size if home.archive.is_file() else 0

    def sink(part: bytes) -> None:
        with written(home.archive), home.archive.open("ab") as file:
            file.write(part)

    if have() > size:
        home.archive.unlink()
    for _ in range(TRIES):
        if have() < size:
            connection.stream(lambda: _script(_FETCH, dir=task.folder, have=have()), sink)
    measured = _digest(home.archive)
    if have() != size or measured != digest:
        home.archive.unlink(missing_ok=True)
        raise EngineError(
            "the archive did not come home whole", where=f"{task.host}: {task.folder}/artifacts.tar",
            measured=f"SHA-256 {measured}", allowed=f"{size} bytes, SHA-256 {digest}",
            next_step="run the same command again: the node has all of it",
        )  # fmt: skip


def _digest(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            state.update(part)
    return state.hexdigest()


def _unpack(home: Home, root: Path, *, complete: bool) -> None:
    """Put what came home into place: a whole run under its name, the traces of a broken one beside it."""
    if not home.archive.is_file():
        return
    try:
        if complete:
            with staged(root) as stage:
                unpack(home.archive, stage.root)
                stage.logs.mkdir(exist_ok=True)
                shutil.copy2(home.log, stage.logs / "remote.log")
        else:
            unpack(home.archive, home.folder / "run")
            place = root.with_name(f".{root.name}.partial")
            with written(place):
                shutil.rmtree(place, ignore_errors=True)
                (home.folder / "run").rename(place)
    except OutputError:
        raise
    except UsageError:
        home.archive.unlink(missing_ok=True)
        raise


def _failed(node: Node, code: int, last: str, place: str) -> EngineError:
    if code == 127:
        return EngineError(
            "driftprobe is not there", where=f"{node.host}: {node.command}", measured=last or f"exit code {code}",
            allowed="driftprobe on the node's PATH",
            next_step="install it there (pip install driftprobe), or say where it is: "
            "--remote-command /path/to/venv/bin/driftprobe",
        )  # fmt: skip
    return EngineError(
        "the run on the node failed", where=f"{node.host}: {node.command}",
        measured=f"exit code {code}; its last lines: {last or 'none'}", allowed="exit code 0, 1 or 3",
        next_step=f"mend what it says; traces that were written until then are in {Path(place).parent.as_posix()}/"
        f".{Path(place).name}.partial",
    )  # fmt: skip


def _holder() -> str:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return f"{getpass.getuser()} on {socket.gethostname()} (process {os.getpid()}) since {since}"


@contextmanager
def _sockets() -> Iterator[str]:
    """Give a folder for the shared connection; it is closed with it. Short, because a socket's path may not be long."""
    folder = tempfile.mkdtemp(prefix="dp-", dir="/tmp" if Path("/tmp").is_dir() else None)
    try:
        yield folder
    finally:
        for path in Path(folder).iterdir():
            command = [
                *shlex.split(os.environ.get("DRIFTPROBE_SSH", "ssh")),
                "-o",
                f"ControlPath={path}",
                "-O",
                "exit",
                "x",
            ]
            subprocess.run(command, capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)
