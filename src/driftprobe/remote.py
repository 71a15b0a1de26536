"""driftprobe on another machine: ssh says where, an engine says what.

The user's own OpenSSH client and configuration do the talking, over one shared connection. On the node the same command
runs detached from it, in a folder of its own, so that a dropped connection costs nothing: its output is followed again
from where it was heard, and the archive of its traces is fetched again from where it broke off. Reports are made here,
from the traces alone. docs/engines.md, "A machine across the network".
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import shlex
import shutil
import socket
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from driftprobe import remote_scripts as scripts
from driftprobe.artifacts import Layout, check_place, keep_other_modes, stage_of, staged, written
from driftprobe.errors import DriftprobeError, EngineError, OutputError, TraceError, UsageError
from driftprobe.remote_archive import MAX_BYTES, unpack
from driftprobe.remote_home import Home, Task
from driftprobe.remote_scripts import script
from driftprobe.remote_ssh import (
    Connection,
    DroppedError,
    HeldError,
    Node,
    Told,
    check_host,
    shared_sockets,
    ssh_command,
)
from driftprobe.trace import Header
from driftprobe.trace_file import read_header

MAX_LOG, MAX_LINE = 64 << 20, 1 << 16
"""Bytes of the node's output that are kept here, and the longest line that is shown in one piece."""
_PATIENCE = 50
"""Fifths of a second that an interrupted run has for its end."""
_FETCHES = 5
_PACKED = re.compile(r"\s*(\d{1,3}) (\d{1,18}) (none|[0-9a-f]{64})\s*")


def remote_command(node: Node, arguments: Sequence[str], date: str, name: str) -> str:
    """Return the shell command that runs on the node, in the run's own folder."""
    words = ["run", *arguments, "--out", "out", "--date", date, "--name", name, "--progress", "lines", "--unshown"]
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


def run_there(node: Node, arguments: Sequence[str], root: Path, told: Told, *, prompts: str = "", out: str = "") -> int:
    """Run on a node and bring its traces and logs home into `root`; returns the node's exit code (0, 1 or 3).

    `arguments` are those of `driftprobe run`, without place, date and name, which are `root`'s own. `prompts` is the
    text of a prompt file, written as prompts.json there. A run that was started earlier for this place, by the same
    arguments, goes on. Raises EngineError where the node, the connection or the engine fails: what was traced until
    then has come home, or will when the command is given again.
    """
    check_host(node.host)
    check_place(root)
    command = remote_command(node, arguments, root.parent.name, root.name)
    home = Home(root, command, node, prompts)
    task = home.task()
    with shared_sockets() as sockets:
        connection = Connection(node, sockets, told)
        task = _prepare(connection, home, task)
        _work(connection, home, task, prompts, told)
        code, size = _bring(connection, home, task)
        connection.run(_clean(task))
    last = home.last_lines()
    home.forget()
    if code not in (0, 1, 3) or size == 0:
        raise _failed(node, code, last, out or root.as_posix())
    return code


def _prepare(connection: Connection, home: Home, task: Task) -> Task:
    """Take the node's lock and make the run's folder. The id is kept before: a lock of ours is known again."""
    home.keep(task)
    try:
        said = connection.run(script(scripts.PREPARE, base=task.base, id=task.id, holder=_holder()))
    except HeldError as error:
        home.forget()
        raise _ours_elsewhere(home, task, error) or error from error
    except DroppedError:
        raise
    except DriftprobeError:
        if not task.folder:  # nothing was begun there
            home.forget()
        raise
    task = replace(task, folder=said.strip())
    home.keep(task)
    return task


def _ours_elsewhere(home: Home, task: Task, held: HeldError) -> EngineError | None:
    """Return what to do where the lock is that of a run of this out folder which has not come home, or None."""
    for place, other in home.others():
        if (other.host, other.id) == (task.host, held.holder.partition(" ")[0]):
            return EngineError(
                "an earlier run of yours holds this node", where=held.where, measured=held.measured,
                allowed=held.allowed,
                next_step=f"bring it home first: give its command again, with --date {place.parent.name} "
                f"--name {place.name}",
            )  # fmt: skip
    return None


def _work(connection: Connection, home: Home, task: Task, prompts: str, told: Told) -> None:
    """Start the run, if it is not started yet, and follow it to its end; an interrupt ends it there."""
    try:
        connection.run(script(scripts.START, dir=task.folder, command=task.command, prompts=prompts))
        _follow(connection, home, task, told)
    except KeyboardInterrupt:
        connection.run(script(scripts.END, dir=task.folder, id=task.id, patience=_PATIENCE))
        connection.run(_clean(task))
        home.forget()
        raise


def _bring(connection: Connection, home: Home, task: Task) -> tuple[int, int]:
    """Fetch and unpack what the run left; returns its exit code and the archive's size in bytes.

    Where that fails the node is given free, and the run's folder stays there for the same command given again.
    """
    date, name = home.root.parent.name, home.root.name
    try:
        said = connection.run(script(scripts.PACK, dir=task.folder, date=date, name=name))
        found = _PACKED.fullmatch(said)
        if found is None:
            raise connection.error(scripts.NO_ARCHIVE, b"", said[-400:].encode())
        code, size = int(found[1]), int(found[2])
        _fetch(connection, home, task, size, found[3])
        _unpack(home, complete=code in (0, 1, 3))
    except DroppedError:
        raise
    except DriftprobeError:
        connection.run(script(scripts.RELEASE, dir=task.folder, id=task.id))
        raise
    return code, size


def _clean(task: Task) -> str:
    return script(scripts.CLEAN, dir=task.folder, id=task.id, given=task.base)


def _follow(connection: Connection, home: Home, task: Task, told: Told) -> None:
    """Hand on the node's output line by line until its command ends; MAX_LOG bytes of it are kept."""
    waiting = b""
    heard = home.log.stat().st_size

    def sink(part: bytes) -> bool:
        nonlocal waiting, heard
        with written(home.log), home.log.open("ab") as file:
            file.write(part[: max(0, MAX_LOG - heard)])
        heard += len(part)
        *lines, waiting = (waiting + part).split(b"\n")
        if len(waiting) > MAX_LINE:
            lines, waiting = [*lines, waiting], b""
        for line in lines:
            told(line.decode("utf-8", errors="replace"))
        return True

    code = connection.stream(lambda: script(scripts.FOLLOW, dir=task.folder, heard=heard), sink)
    if code not in (0, scripts.GONE):
        raise connection.error(code, b"", b"its output could not be followed")


def _fetch(connection: Connection, home: Home, task: Task, size: int, digest: str) -> None:
    """Bring the archive home, from where it broke off, and check its digest."""
    if size == 0:
        return
    if size > MAX_BYTES:
        raise UsageError(
            "the node's archive is too large", where=f"{task.host}: {task.folder}/artifacts.tar",
            measured=f"{size} bytes", allowed=f"{MAX_BYTES} bytes",
            next_step="record less: fewer --layers or prompts, or --payload failing",
        )  # fmt: skip

    def have() -> int:
        return home.archive.stat().st_size if home.archive.is_file() else 0

    def sink(part: bytes) -> bool:
        with written(home.archive), home.archive.open("ab") as file:
            file.write(part[: size - have()])
        return have() < size

    if have() > size:
        home.archive.unlink()
    for _ in range(_FETCHES):
        if have() < size:
            code = connection.stream(lambda: script(scripts.FETCH, dir=task.folder, have=have()), sink)
            if code != 0:
                raise connection.error(code, b"", connection.said)
    measured = _digest(home.archive) if have() else "of nothing"
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


def _unpack(home: Home, *, complete: bool) -> None:
    """Put what came home into place: a whole run under its name, the traces of a broken one beside it."""
    if not home.archive.is_file():
        return
    try:
        if complete:
            with staged(home.root) as stage:
                unpack(home.archive, stage.root)
                stage.logs.mkdir(exist_ok=True)
                shutil.copy2(home.log, stage.logs / "remote.log")
                if home.root.exists():
                    keep_other_modes(home.root, stage, _headers(stage))
        else:
            half = home.folder / "run"
            shutil.rmtree(half, ignore_errors=True)
            unpack(home.archive, half)
            place = stage_of(home.root)
            with written(place):
                shutil.rmtree(place, ignore_errors=True)
                half.rename(place)
    except OutputError:
        raise
    except UsageError:
        home.archive.unlink(missing_ok=True)
        raise


def _headers(stage: Layout) -> list[Header]:
    """Return the headers of what came home; a trace that has none is named where the traces are judged."""
    try:
        found = [read_header(path) for path in sorted(stage.traces.glob("*.jsonl"))]
    except TraceError:
        return []
    return [header for header in found if header is not None]


def _failed(node: Node, code: int, last: str, place: str) -> EngineError:
    if code == 127:
        return EngineError(
            "driftprobe is not there", where=f"{node.host}: {node.command}", measured=last or f"exit code {code}",
            allowed="driftprobe on the node's PATH",
            next_step="install it there (pip install -e . in a checkout), or say where it is: "
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
