"""remote.py where a run breaks off, on a real sshd: whose the lock is, what is ended, what goes on, what is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from driftprobe.errors import EngineError, UsageError
from driftprobe.remote import run_there
from driftprobe.remote_archive import unpack
from driftprobe.remote_scripts import PREPARE
from driftprobe.remote_ssh import Connection
from driftprobe.trace_file import TraceWriter
from make_trace import drifting, toy
from node import driftprobe_there, sshd
from test_engine_command import described
from test_remote import (  # noqa: F401
    BIG,
    TRACES,
    archive,
    at_home,
    client,
    cutter,
    left_there,
    node,
    script,
    server,
)  # fmt: skip


def silent(_line: str) -> None:
    """Nobody listens."""


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2]
    except OSError:
        return True
    return state.startswith("Z")


def waited(what, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(what())


def lost_after(monkeypatch, begins: str) -> None:
    """The node does what it is told, and its answer to one script is lost for good."""
    once = Connection._once
    monkeypatch.setattr("driftprobe.remote_ssh.PAUSES", ())

    def cut(self, text):
        done = once(self, text)
        if begins in text:
            return subprocess.CompletedProcess(done.args, 255, b"", b"Connection reset by peer")
        return done

    monkeypatch.setattr(Connection, "_once", cut)


TASK = ("id", "host", "command", "base", "prompts", "folder")
"""What the note of a run holds."""


# ---- the lock


def test_after_a_drop_in_the_first_step_the_lock_is_known_as_ones_own(tmp_path, monkeypatch):
    where = node(tmp_path, script(tmp_path, TRACES))
    with monkeypatch.context() as lost:
        lost_after(lost, PREPARE)
        with pytest.raises(EngineError, match="connection was lost"):
            run_there(where, [], at_home(tmp_path), silent)
    assert left_there(tmp_path)[-1] == "lock"
    assert run_there(where, [], at_home(tmp_path), silent) == 0
    assert left_there(tmp_path) == []


def test_the_lock_is_made_with_its_content(tmp_path, monkeypatch):
    """Whoever sees the lock can read whose it is: nothing lies between making and filling it."""
    lost_after(monkeypatch, PREPARE)
    with pytest.raises(EngineError):
        run_there(node(tmp_path, "true"), [], at_home(tmp_path), silent)
    kept = json.loads((tmp_path / "d/.n.remote/task.json").read_text(encoding="utf-8"))
    assert str((tmp_path / "there/lock").readlink()).startswith(kept["id"] + " ")


def test_a_lock_of_ones_own_earlier_run_says_which(tmp_path, monkeypatch):
    where = node(tmp_path, script(tmp_path, TRACES))
    with monkeypatch.context() as lost:
        lost_after(lost, PREPARE)
        with pytest.raises(EngineError):
            run_there(where, [], at_home(tmp_path), silent)
    other = tmp_path / "e" / "m"
    other.parent.mkdir()
    with pytest.raises(EngineError) as caught:
        run_there(where, [], other, silent)
    assert "--date d --name n" in str(caught.value)
    assert not (tmp_path / "e/.m.remote").exists()


def test_the_advice_to_remove_a_lock_works_as_it_is_printed(tmp_path, server, monkeypatch):  # noqa: F811
    (tmp_path / "there with space").mkdir()
    where = node(tmp_path, "true")
    where = type(where)(where.host, "true", str(tmp_path / "there with space"))
    (tmp_path / "there with space/lock").symlink_to("feed ada on zuse")
    with pytest.raises(EngineError, match="ada on zuse") as caught:
        run_there(where, [], at_home(tmp_path), silent)
    advice = caught.value.next_step.split("`")[1]
    subprocess.run(advice.replace("ssh ", server.ssh + " ", 1), shell=True, check=True)
    assert not (tmp_path / "there with space/lock").is_symlink()
    default = Connection(type(where)("node"), "/s", silent)._held("x").next_step
    assert "`ssh node 'rm -r ~/.driftprobe/lock'`" in default


def test_nothing_that_is_empty_stays_on_the_node(tmp_path):
    run_there(node(tmp_path, script(tmp_path, TRACES)), [], at_home(tmp_path), silent)
    assert list((tmp_path / "there").iterdir()) == []


# ---- the same command, or not


@pytest.mark.parametrize("changed", ["prompts", "folder"])
def test_another_prompt_file_or_folder_is_another_run(tmp_path, monkeypatch, changed):
    where = node(tmp_path, script(tmp_path, TRACES))
    with monkeypatch.context() as lost:
        lost_after(lost, "artifacts.part")
        with pytest.raises(EngineError):
            run_there(where, [], at_home(tmp_path), silent, prompts='{"a": [1]}')
    if changed == "folder":
        where = type(where)(where.host, where.command, str(tmp_path / "elsewhere"))
    again = '{"a": [2]}' if changed == "prompts" else '{"a": [1]}'
    with pytest.raises(UsageError, match="another remote run of this place"):
        run_there(where, [], at_home(tmp_path), silent, prompts=again)


@pytest.mark.parametrize("note", ['{"id": ', '["id"]', '{"id": "a"}', json.dumps(dict.fromkeys(TASK, 1))])
def test_a_damaged_note_is_named(tmp_path, note):
    home = tmp_path / "d/.n.remote"
    home.mkdir(parents=True)
    (home / "task.json").write_text(note, encoding="utf-8")
    with pytest.raises(UsageError, match="note of a remote run is damaged"):
        run_there(node(tmp_path, "true"), [], at_home(tmp_path), silent)


# ---- what is ended


def interrupting(line: str) -> None:
    if line.endswith("go"):
        raise KeyboardInterrupt


def test_an_interrupt_ends_the_program_of_an_engine_too(tmp_path):
    """The engine's program runs in a session of its own: only driftprobe there can end it."""
    pid = tmp_path / "pid"
    hang = tmp_path / "hang.py"
    hang.write_text(
        f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)\n", encoding="utf-8"
    )
    toml = described(tmp_path)
    text = toml.read_text(encoding="utf-8")
    toml.write_text(text.replace(str(Path(__file__).parent / "stand_in.py"), str(hang)), encoding="utf-8")
    command = tmp_path / "there.sh"
    command.write_text(
        f'(until [ -s {pid} ]; do sleep 0.1; done; echo go) &\n{driftprobe_there()} "$@"\n', encoding="utf-8"
    )
    with pytest.raises(KeyboardInterrupt):
        run_there(node(tmp_path, f"sh {command}"), ["--engine", "command", "--config", str(toml)], at_home(tmp_path),
                  interrupting)  # fmt: skip
    assert gone(int(pid.read_text(encoding="utf-8")))
    assert left_there(tmp_path) == []


def test_what_does_not_heed_an_interrupt_is_killed_before_the_lock_goes(tmp_path, monkeypatch):
    monkeypatch.setattr("driftprobe.remote._PATIENCE", 3)
    body = f"trap '' TERM; sh -c 'trap \"\" TERM; echo $$ > {tmp_path}/pid; echo go; while :; do sleep 1; done'\n"
    with pytest.raises(KeyboardInterrupt):
        run_there(node(tmp_path, script(tmp_path, body)), [], at_home(tmp_path), interrupting)
    assert gone(int((tmp_path / "pid").read_text(encoding="utf-8")))
    assert left_there(tmp_path) == []


def test_a_process_that_has_got_the_runs_id_is_left_alone(tmp_path):
    """After a restart of the node the id may be somebody's: the start says that it is not the run's."""
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        said: list[BaseException] = []

        def told(line: str) -> None:
            if line == "go":
                run = next((tmp_path / "there/runs").iterdir())
                assert waited((run / "pid").exists)
                (run / "pid").write_text(f"{other.pid}\n", encoding="utf-8")
                raise KeyboardInterrupt

        body = f"echo $$ > {tmp_path}/own; echo go; exec sleep 60\n"
        try:
            run_there(node(tmp_path, script(tmp_path, body)), [], at_home(tmp_path), told)
        except BaseException as error:
            said.append(error)
        assert isinstance(said[0], KeyboardInterrupt)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        own = int((tmp_path / "own").read_text(encoding="utf-8"))
        if not gone(own):
            os.kill(own, signal.SIGKILL)


def test_sigterm_ends_driftprobe_like_an_interrupt():
    code = (
        "import os, signal, driftprobe.cli as c\nc.group = lambda **_: os.kill(os.getpid(), signal.SIGTERM)\nc.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


# ---- what the node says


def test_a_shell_that_greets_does_no_harm(tmp_path, tmp_path_factory, monkeypatch):
    greeting = "ForceCommand printf 'Welcome\\nto /the/node\\n'; exec sh -c \"$SSH_ORIGINAL_COMMAND\"\n"
    heard: list[str] = []
    with sshd(tmp_path_factory.mktemp("greets"), greeting) as greets:
        monkeypatch.setenv("DRIFTPROBE_SSH", greets.ssh)
        run_there(node(tmp_path, script(tmp_path, BIG)), [], at_home(tmp_path), heard.append)
    assert len(heard) == 1
    assert left_there(tmp_path) == []


def test_a_node_without_a_digest_says_so_and_is_given_free(tmp_path, monkeypatch):
    from driftprobe import remote_scripts

    monkeypatch.setattr(
        remote_scripts, "PACK", remote_scripts.PACK.replace("sha256sum", "no_a").replace("shasum", "no_b")
    )
    with pytest.raises(EngineError, match="sha256sum or shasum"):
        run_there(node(tmp_path, script(tmp_path, TRACES)), [], at_home(tmp_path), silent)
    assert not (tmp_path / "there/lock").is_symlink()
    monkeypatch.undo()


def test_an_archive_that_is_gone_there_is_named(tmp_path, monkeypatch):
    from driftprobe import remote_scripts

    monkeypatch.setattr(remote_scripts, "FETCH", remote_scripts.FETCH.replace("[ -f", "rm artifacts.tar; [ -f", 1))
    with pytest.raises(EngineError, match="is gone"):
        run_there(node(tmp_path, script(tmp_path, TRACES)), [], at_home(tmp_path), silent)
    assert not (tmp_path / "there/lock").is_symlink()


def test_an_archive_of_another_digest_is_not_kept_and_comes_again_whole(tmp_path, monkeypatch):
    from driftprobe import remote_scripts

    where = node(tmp_path, script(tmp_path, TRACES + f"echo once >> {tmp_path}/runs\n"))
    with monkeypatch.context() as spoiled:
        spoiled.setattr(remote_scripts, "FETCH", remote_scripts.FETCH.rstrip() + " | tr a b\n")
        with pytest.raises(EngineError, match="did not come home whole"):
            run_there(where, [], at_home(tmp_path), silent)
    assert not (tmp_path / "there/lock").is_symlink()
    assert not (tmp_path / "d/.n.remote/artifacts.tar.part").exists()
    assert not (tmp_path / "d/n").exists()
    assert run_there(where, [], at_home(tmp_path), silent) == 0
    assert (tmp_path / "runs").read_text(encoding="utf-8") == "once\n", "the run is not repeated"
    assert list((tmp_path / "d/n/traces").iterdir())


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("PACK", 'cd "$dir"', 'echo good morning\ncd "$dir"', "good morning"),
        ("FOLLOW", "n=$heard", "exit 5", "its output could not be followed"),
    ],
)
def test_a_step_that_does_something_else_is_told_with_what_it_said(tmp_path, monkeypatch, name, old, new, said):
    from driftprobe import remote_scripts

    monkeypatch.setattr(remote_scripts, name, getattr(remote_scripts, name).replace(old, new, 1))
    with pytest.raises(EngineError, match="a step on the node failed") as caught:
        run_there(node(tmp_path, script(tmp_path, TRACES)), [], at_home(tmp_path), silent)
    assert said in caught.value.measured


def test_more_than_the_archive_that_lies_here_is_fetched_anew(tmp_path):
    home = tmp_path / "d/.n.remote"
    home.mkdir(parents=True)
    (home / "artifacts.tar.part").write_bytes(b"x" * 5_000_000)
    assert run_there(node(tmp_path, script(tmp_path, TRACES)), [], at_home(tmp_path), silent) == 0
    assert list((tmp_path / "d/n/traces").iterdir())


def test_a_line_without_an_end_is_handed_on_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("driftprobe.remote.MAX_LINE", 10_000)
    heard: list[str] = []
    body = TRACES + "head -c 300000 /dev/zero | tr '\\0' x; echo\n"
    run_there(node(tmp_path, script(tmp_path, body)), [], at_home(tmp_path), heard.append)
    parts = [line for line in heard if line.strip("x") == ""]
    assert sum(map(len, parts)) == 300_000
    assert len(parts) > 1


def test_a_lost_connection_is_told(tmp_path, cutter, monkeypatch):  # noqa: F811
    cutter(1_000_000)
    monkeypatch.setattr("driftprobe.remote_ssh.PAUSES", (0.01, 0.01))
    heard: list[str] = []
    run_there(node(tmp_path, script(tmp_path, BIG)), [], at_home(tmp_path), heard.append)
    assert [line for line in heard if "trying again" in line]


# ---- how much may come


def test_more_than_was_announced_is_not_taken(tmp_path, monkeypatch):
    from driftprobe import remote_scripts

    monkeypatch.setattr(remote_scripts, "FETCH", remote_scripts.FETCH + "cat /dev/zero\n")
    assert run_there(node(tmp_path, script(tmp_path, TRACES)), [], at_home(tmp_path), silent) == 0


def test_an_archive_beyond_the_limit_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("driftprobe.remote.MAX_BYTES", 1000)
    with pytest.raises(UsageError, match="too large"):
        run_there(node(tmp_path, script(tmp_path, TRACES)), [], at_home(tmp_path), silent)
    assert not (tmp_path / "d/.n.remote/artifacts.tar.part").exists()


def test_of_endless_output_a_part_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("driftprobe.remote.MAX_LOG", 100_000)
    body = TRACES + "head -c 3000000 /dev/zero | tr '\\0' x\n"
    run_there(node(tmp_path, script(tmp_path, body)), [], at_home(tmp_path), silent)
    assert (tmp_path / "d/n/run/remote.log").stat().st_size == 100_000


def test_unfinished_members_count_too(tmp_path):
    made = archive(tmp_path / "a.tar", ("traces/a.jsonl.part", b"x" * 1000))
    with pytest.raises(UsageError, match="more than 999 bytes"):
        unpack(made, tmp_path / "in", max_bytes=999)


# ---- what is here already


def test_a_half_done_unpacking_does_not_stand_in_the_way(tmp_path):
    body = "mkdir -p out/d/.n.partial/traces; printf x > out/d/.n.partial/traces/a_as_designed.jsonl; exit 2\n"
    half = tmp_path / "d/.n.remote/run/traces/a_as_designed.jsonl"
    half.parent.mkdir(parents=True)
    half.write_text("half", encoding="utf-8")
    with pytest.raises(EngineError, match="run on the node failed"):
        run_there(node(tmp_path, script(tmp_path, body)), [], at_home(tmp_path), silent)
    assert (tmp_path / "d/.n.partial/traces/a_as_designed.jsonl").read_text(encoding="utf-8") == "x"


def test_the_earlier_mode_of_the_same_name_is_kept(tmp_path):
    for mode, place in (("as_designed", tmp_path / "far/traces"), ("kv_aligned", tmp_path / "d/n/traces")):
        trace, _ = toy(drifting(0.1), mode=mode)
        place.mkdir(parents=True)
        with TraceWriter(place / trace.path, trace.header) as writer:
            for record in trace.records:
                writer.record(record)
    had = {p.name for p in (tmp_path / "d/n/traces").iterdir()}
    body = f"mkdir -p out/d/n; cp -r {tmp_path}/far/traces out/d/n/\n"
    run_there(node(tmp_path, script(tmp_path, body)), [], at_home(tmp_path), silent)
    assert had < {p.name for p in (tmp_path / "d/n/traces").iterdir()}


def test_traces_that_are_none_come_home_and_stand_beside_nothing_earlier(tmp_path):
    """Which mode they are of cannot be read: the judgement names them, and no earlier trace is taken for theirs."""
    had = tmp_path / "d/n/traces"
    trace, _ = toy(mode="kv_aligned")
    had.mkdir(parents=True)
    with TraceWriter(had / trace.path, trace.header) as writer:
        for record in trace.records:
            writer.record(record)
    body = "mkdir -p out/d/n/traces; echo '{' > out/d/n/traces/a_as_designed.jsonl\n"
    assert run_there(node(tmp_path, script(tmp_path, body)), [], at_home(tmp_path), silent) == 0
    assert (had / "a_as_designed.jsonl").read_text(encoding="utf-8") == "{\n"
