"""remote.py against a real sshd on loopback: a run comes home, and whatever goes wrong says so and loses nothing."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from driftprobe.cli import group
from driftprobe.errors import EngineError, UsageError
from driftprobe.remote import run_there
from driftprobe.remote_archive import unpack
from driftprobe.remote_ssh import Node, check_host
from node import Sshd, driftprobe_there, sshd
from test_engine_command import described


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with sshd(tmp_path_factory.mktemp("sshd")) as made:
        yield made


@pytest.fixture(autouse=True)
def client(server: Sshd, monkeypatch):
    monkeypatch.setenv("DRIFTPROBE_SSH", server.ssh)


def node(tmp_path: Path, command: str, **more: str) -> Node:
    return Node("node", command, folder=str(tmp_path / "there"), **more)


def script(tmp_path: Path, body: str) -> str:
    """A stand-in for driftprobe on the node; it is called with the arguments of `driftprobe run`."""
    path = tmp_path / "stand_in.sh"
    path.write_text("set -eu\n" + body, encoding="utf-8")
    return f"sh {path}"


TRACES = (
    "mkdir -p out/d/n/traces out/d/n/run; printf x > out/d/n/traces/a_as_designed.jsonl; echo log > out/d/n/run/a.log\n"
)


def at_home(tmp_path: Path) -> Path:
    root = tmp_path / "d" / "n"
    root.parent.mkdir(exist_ok=True)
    return root


def left_there(tmp_path: Path) -> list[str]:
    there = tmp_path / "there"
    runs = sorted(p.name for p in (there / "runs").iterdir()) if (there / "runs").exists() else []
    return runs + (["lock"] if (there / "lock").is_symlink() else [])


@pytest.mark.parametrize("quiet", [False, True])
def test_a_run_on_a_node_comes_home_with_its_verdict(tmp_path, server, quiet):
    toml = described(tmp_path)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(
        json.dumps({'it\'s "mine" $HOME'[:4]: [3, 1, 4, 1, 5]}).replace("it's", "mine"), encoding="utf-8"
    )
    done = CliRunner().invoke(
        group,
        ["run", "--host", "node", "--remote-command", f"echo a word; {driftprobe_there()}",
         "--remote-folder", str(tmp_path / "there"), "--engine", "command", "--config", str(toml),
         "--prompt-file", str(prompts), "--mode", "as_designed",
         "--ladder", "off", "--date", "2026-01-02", "--name", "far", "--out", str(tmp_path / "here"),
         *(["--quiet"] if quiet else [])],
        standalone_mode=False,
    )  # fmt: skip
    assert done.exception is None, done.output
    assert ("node: a word" in done.output) is not quiet
    root = tmp_path / "here/2026-01-02/far"
    assert done.output.count("verdict:") == 1  # the node does not show its own
    assert "verdict: STRUCTURAL_DRIFT" in done.output
    assert (root / "B3_66_V2_FINAL_REPORT.md").is_file()
    assert {p.name for p in (root / "run").iterdir()} == {"mine_as_designed.log", "remote.log"}
    assert "progress: 1/" in (root / "run/remote.log").read_text(encoding="utf-8")
    assert left_there(tmp_path) == []
    assert [p.name for p in root.parent.iterdir()] == ["far"]


def test_the_nodes_lines_come_as_they_are_printed(tmp_path):
    stamps = {}
    body = TRACES + "echo first; sleep 2; echo second\n"

    def told(line: str) -> None:
        stamps[line] = time.monotonic()

    assert run_there(node(tmp_path, script(tmp_path, body)), [], at_home(tmp_path), told) == 0
    assert stamps["second"] - stamps["first"] > 1.0


def test_arguments_reach_the_node_as_they_are(tmp_path):
    body = TRACES + "printf '<%s>\\n' \"$@\"\n"
    heard: list[str] = []
    odd = ["--prompt", 'it\'s $HOME `id` "x"; rm -rf * \n new', "--layers", "0,1"]
    run_there(node(tmp_path, script(tmp_path, body)), odd, at_home(tmp_path), heard.append)
    assert "\n".join(heard).startswith(f"<run>\n<--prompt>\n<{odd[1]}>\n<--layers>\n<0,1>\n<--out>")


# ---- what is wrong between here and there


def refused(tmp_path: Path, host: str, *words: str) -> None:
    with pytest.raises(EngineError) as caught:
        run_there(Node(host, "true", str(tmp_path / "there")), [], at_home(tmp_path), lambda _: None)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "there").exists()


def config(server: Sshd, monkeypatch, **changes: str) -> None:
    """The client's configuration with other values, in the config file of this test's own."""
    text = server.config.read_text(encoding="utf-8")
    lines = [
        next((f"  {name} {value}" for name, value in changes.items() if line.split()[:1] == [name]), line)
        for line in text.splitlines()
    ]
    path = server.folder / "changed_config"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setenv("DRIFTPROBE_SSH", f"ssh -F {path}")


def test_an_unknown_host_key_is_refused(tmp_path, server, monkeypatch):
    config(server, monkeypatch, UserKnownHostsFile="/dev/null")
    refused(tmp_path, "node", "host key is not known", "compare the key")


def test_a_changed_host_key_is_refused(tmp_path, server, monkeypatch):
    known = tmp_path / "known"
    other = (server.folder / "stranger.pub").read_text(encoding="utf-8").split()
    known.write_text(f"[127.0.0.1]:{server.port} {other[0]} {other[1]}\n", encoding="utf-8")
    config(server, monkeypatch, UserKnownHostsFile=str(known))
    refused(tmp_path, "node", "not the one you know", "find out why")


def test_a_wrong_user_key_is_refused(tmp_path, server, monkeypatch):
    config(server, monkeypatch, IdentityFile=str(server.folder / "stranger"))
    refused(tmp_path, "node", "does not let you in", "check user name and key")


def test_an_unknown_host_is_refused(tmp_path, server, monkeypatch):
    config(server, monkeypatch, HostName="no-such-host.invalid")
    refused(tmp_path, "node", "no such host")


def test_a_node_that_does_not_answer(tmp_path, server, monkeypatch):
    config(server, monkeypatch, Port="1")
    refused(tmp_path, "node", "does not answer")


@pytest.mark.parametrize("host", ["-oProxyCommand=touch pwned", "", "a b", "a;b", "$(id)"])
def test_what_is_no_host_never_reaches_ssh(host):
    with pytest.raises(UsageError, match="not a host"):
        check_host(host)


def test_no_ssh_client(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFTPROBE_SSH", "/no/such/ssh")
    with pytest.raises(UsageError, match="no ssh client"):
        run_there(node(tmp_path, "true"), [], at_home(tmp_path), lambda _: None)


# ---- what is wrong there


def test_a_command_that_is_not_there(tmp_path):
    with pytest.raises(EngineError) as caught:
        run_there(node(tmp_path, "no-such-driftprobe"), [], at_home(tmp_path), lambda _: None)
    assert "driftprobe is not there" in str(caught.value)
    assert "--remote-command" in str(caught.value)
    assert left_there(tmp_path) == []


def test_an_engine_that_fails_half_way_leaves_its_traces_here(tmp_path):
    body = ("mkdir -p out/d/.n.partial/traces; printf x > out/d/.n.partial/traces/a_as_designed.jsonl\n"
            "echo 'error: the model failed while it ran'; exit 2\n")  # fmt: skip
    with pytest.raises(EngineError) as caught:
        run_there(node(tmp_path, script(tmp_path, body)), [], at_home(tmp_path), lambda _: None)
    assert "the model failed while it ran" in str(caught.value)
    assert (tmp_path / "d/.n.partial/traces/a_as_designed.jsonl").read_text(encoding="utf-8") == "x"
    assert left_there(tmp_path) == []


def test_a_node_that_is_taken_says_who_has_it_and_since_when(tmp_path):
    lock = tmp_path / "there/lock"
    lock.mkdir(parents=True)
    (lock / "holder").write_text("ada on zuse (process 7) since 2026-01-01T00:00:00+00:00\n", encoding="utf-8")
    with pytest.raises(EngineError) as caught:
        run_there(node(tmp_path, "true"), [], at_home(tmp_path), lambda _: None)
    assert "ada on zuse (process 7) since 2026-01-01" in str(caught.value)
    assert lock.is_dir()
    assert not list((tmp_path / "there/runs").iterdir())


def test_a_run_of_this_node_holds_it_while_it_goes_on(tmp_path):
    first = threading.Thread(
        target=run_there,
        args=(node(tmp_path, script(tmp_path, TRACES + "sleep 3\n")), [], at_home(tmp_path), lambda _: None),
    )
    first.start()
    for _ in range(100):
        if (tmp_path / "there/lock").is_symlink():
            break
        time.sleep(0.05)
    other = tmp_path / "e" / "n"
    other.parent.mkdir()
    with pytest.raises(EngineError, match="holds this node"):
        run_there(node(tmp_path, "true"), [], other, lambda _: None)
    first.join()
    assert left_there(tmp_path) == []


def test_a_folder_that_this_run_did_not_make_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("driftprobe.remote_home.secrets.token_hex", lambda _: "feed")
    mine = tmp_path / "there/runs/feed"
    mine.mkdir(parents=True)
    (mine / "precious").write_text("mine", encoding="utf-8")
    run_there(node(tmp_path, script(tmp_path, TRACES)), [], at_home(tmp_path), lambda _: None)
    assert (mine / "precious").read_text(encoding="utf-8") == "mine"


# ---- what is lost on the way


class Cutter:
    """A proxy in front of sshd that cuts the connection once so many bytes have come from it."""

    def __init__(self, server: Sshd, limits: list[int]) -> None:
        import socket

        self.limits, self.server = limits, server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        import socket

        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.server.port))
            limit = self.limits.pop(0) if self.limits else None
            threading.Thread(target=self._pump, args=(near, far, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, limit), daemon=True).start()

    def _pump(self, source, target, limit: int | None) -> None:
        import contextlib
        import socket

        passed = 0
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                passed += len(part)
                if limit is not None and passed > limit:
                    self.cuts += 1
                    break
                target.sendall(part)
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def cutter(server, monkeypatch):
    made: list[Cutter] = []

    def make(*limits: int) -> Cutter:
        made.append(Cutter(server, list(limits)))
        config(
            server, monkeypatch, Port=str(made[0].port), HostName=f"127.0.0.1\n  HostKeyAlias [127.0.0.1]:{server.port}"
        )
        return made[0]

    yield make
    for item in made:
        item.close()


BIG = (
    TRACES
    + "head -c 3000000 /dev/urandom > out/d/n/traces/b_as_designed.jsonl\n"
    + "sha256sum out/d/n/traces/b_as_designed.jsonl\n"
)


def test_a_connection_cut_in_the_transfer_goes_on_where_it_was(tmp_path, cutter):
    cut = cutter(1_000_000, 1_500_000)
    heard: list[str] = []
    run_there(node(tmp_path, script(tmp_path, BIG)), [], at_home(tmp_path), heard.append)
    import hashlib

    data = (tmp_path / "d/n/traces/b_as_designed.jsonl").read_bytes()
    assert heard[0].split()[0] == hashlib.sha256(data).hexdigest()
    assert cut.cuts == 2
    assert left_there(tmp_path) == []


def test_after_a_long_outage_the_same_command_goes_on_and_the_run_is_not_repeated(
    tmp_path, cutter, server, monkeypatch
):
    cutter(*[1_000_000] + [0] * 20)
    monkeypatch.setattr("driftprobe.remote_ssh.PAUSES", (0.01, 0.01))
    where = node(tmp_path, script(tmp_path, f"echo once >> {tmp_path}/count\n" + BIG))
    with pytest.raises(EngineError) as caught:
        run_there(where, [], at_home(tmp_path), lambda _: None)
    assert "run the same command again" in str(caught.value)
    have = (tmp_path / "d/.n.remote/artifacts.tar.part").stat().st_size
    assert 0 < have < 3_000_000

    with pytest.raises(UsageError, match="another remote run of this place"):
        run_there(where, ["--steps", "9"], at_home(tmp_path), lambda _: None)

    monkeypatch.setenv("DRIFTPROBE_SSH", server.ssh)
    assert run_there(where, [], at_home(tmp_path), lambda _: None) == 0
    assert (tmp_path / "count").read_text(encoding="utf-8") == "once\n"
    assert (tmp_path / "d/n/traces/b_as_designed.jsonl").stat().st_size == 3_000_000
    assert left_there(tmp_path) == []
    assert not (tmp_path / "d/.n.remote").exists()


def test_an_interrupt_ends_what_this_run_started_and_nothing_else(tmp_path):
    def told(line: str) -> None:
        if line == "go":
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_there(node(tmp_path, script(tmp_path, f"echo $$ > {tmp_path}/pid; echo go; exec sleep 300\n")), [],
                  at_home(tmp_path), told)  # fmt: skip
    assert time.monotonic() - began < 9  # neither until the node says something, nor until it is killed
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    assert left_there(tmp_path) == []


# ---- what comes home


def archive(path: Path, *members: tuple[str, bytes | tuple[bytes, str]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, what in members:
            info = tarfile.TarInfo(name)
            if isinstance(what, tuple):
                info.type, info.linkname = what
                tar.addfile(info)
            else:
                info.size = len(what)
                tar.addfile(info, io.BytesIO(what))
    return path


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("../outside.jsonl", b"x"),
        ("/tmp/absolute.jsonl", b"x"),
        ("traces/../../up.jsonl", b"x"),
        ("traces/link.jsonl", (tarfile.SYMTYPE, "/etc/passwd")),
        ("traces/hard.jsonl", (tarfile.LNKTYPE, "traces/a.jsonl")),
        ("traces/pipe.jsonl", (tarfile.FIFOTYPE, "")),
        ("traces/device.jsonl", (tarfile.CHRTYPE, "")),
        ("verdict.json", b"x"),
        ("traces/deep/a.jsonl", b"x"),
        ("run/a.sh", b"x"),
        ("traces/a.jsonl", b"again"),
        ("traces/new\nline.jsonl", b"x"),
    ],
)
def test_a_hostile_member_is_refused_and_nothing_lands_outside(tmp_path, name, what):
    made = archive(tmp_path / "a.tar", ("traces/a.jsonl", b"fine"), (name, what))
    with pytest.raises(UsageError, match="not what a run leaves"):
        unpack(made, tmp_path / "in")
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"a.tar", "in/traces/a.jsonl"}


def test_too_large_an_archive_and_none_at_all_are_refused(tmp_path):
    made = archive(tmp_path / "a.tar", ("traces/a.jsonl", b"x" * 1000))
    with pytest.raises(UsageError, match="more than 999 bytes"):
        unpack(made, tmp_path / "in", max_bytes=999)
    (tmp_path / "b.tar").write_bytes(b"this is no archive" * 99)
    with pytest.raises(UsageError, match="not a tar archive"):
        unpack(tmp_path / "b.tar", tmp_path / "in2")


def test_a_hostile_archive_of_a_node_leaves_no_run(tmp_path):
    body = TRACES + "ln -s /etc/passwd out/d/n/traces/evil.jsonl\n"
    with pytest.raises(UsageError, match="not what a run leaves"):
        run_there(node(tmp_path, script(tmp_path, body)), [], at_home(tmp_path), lambda _: None)
    assert not (tmp_path / "d/n").exists()


def test_a_gigabyte_of_traces_comes_home(tmp_path):
    body = TRACES + "truncate -s 1G out/d/n/traces/big_as_designed.jsonl\n"
    run_there(node(tmp_path, script(tmp_path, body)), [], at_home(tmp_path), lambda _: None)
    came = tmp_path / "d/n/traces/big_as_designed.jsonl"
    assert came.stat().st_size == 1 << 30
    came.unlink()  # pytest would keep it


# ---- the command line


def test_a_dry_run_prints_what_would_be_done_and_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFTPROBE_SSH", "/no/such/ssh")
    arguments = ["--host", "me@gpu01", "--dry-run", "--model", "/m x", "--steps", "3"]
    done = CliRunner().invoke(group, ["run", *arguments, "--date", "2026-01-02", "--out", str(tmp_path)],
                              standalone_mode=False)  # fmt: skip
    assert done.exception is None
    assert "driftprobe run --model '/m x' --steps 3 --out out --date 2026-01-02" in done.output
    assert "me@gpu01" in done.output
    assert "StrictHostKeyChecking=yes" in done.output
    assert not list(tmp_path.iterdir())


def test_dry_run_without_a_host_and_a_self_test_with_one_are_refused(tmp_path):
    for arguments, words in ((["--dry-run"], "nothing to run dry"), (["--host", "n", "--self-test"], "self-test")):
        done = CliRunner().invoke(group, ["run", "--out", str(tmp_path), *arguments])
        assert isinstance(done.exception, UsageError)
        assert words in str(done.exception)
