"""A node for the tests: a real sshd on loopback with keys and a port of its own, ended with the fixture."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or next((p for p in ("/usr/sbin/sshd", "/usr/local/sbin/sshd") if Path(p).exists()), None)


@dataclass
class Sshd:
    """The server, and what a client needs to reach it as host `node`."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def config(self) -> Path:
        return self.folder / "ssh_config"

    @property
    def ssh(self) -> str:
        """What DRIFTPROBE_SSH is set to."""
        return f"ssh -F {self.config}"


def _key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


@contextmanager
def sshd(folder: Path, extra: str = "") -> Iterator[Sshd]:
    """Start a server that lets the client's key in, and nothing else; `extra` is more of its configuration."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("no sshd on this machine: install Debian's openssh-server")
    for name in ("host", "client", "stranger"):
        _key(folder / name)
    (folder / "authorized").write_bytes((folder / "client.pub").read_bytes())
    port = _free_port()
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile {folder}/pid\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"UsePAM no\nPermitRootLogin yes\nLogLevel ERROR\n{extra}",
        encoding="utf-8",
    )
    host_key = (folder / "host.pub").read_text(encoding="utf-8").split()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {host_key[0]} {host_key[1]}\n", encoding="utf-8")
    (folder / "ssh_config").write_text(
        f"Host node\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/client\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known\n  GlobalKnownHostsFile /dev/null\n",
        encoding="utf-8",
    )
    if os.geteuid() == 0:  # sshd started by root wants its privilege separation folder
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield Sshd(folder, port, process)
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(port: int) -> None:
    for _ in range(100):
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("sshd does not answer")


def driftprobe_there() -> str:
    """The command that is driftprobe on the 'node', which is this machine."""
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root / "src"), str(root)])
    return f"env PYTHONPATH={path} OMP_NUM_THREADS=1 {sys.executable} -c 'from driftprobe.cli import main; main()'"
