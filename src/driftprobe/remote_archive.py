"""Unpacking an archive that came from elsewhere: only files that a run leaves, and nothing outside its folder."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path

from driftprobe.artifacts import written
from driftprobe.errors import UsageError

MAX_BYTES, MAX_FILES = 64 << 30, 100_000
_ALLOWED = re.compile(
    r"traces/[^/\x00-\x1f\\]{1,200}\.jsonl|traces/payloads/[^/\x00-\x1f\\]{1,200}\.safetensors|run/[^/\x00-\x1f\\]{1,200}\.log"
)


def unpack(archive: Path, folder: Path, *, max_bytes: int = MAX_BYTES) -> list[str]:
    """Unpack a tar archive's traces, payloads and logs into a folder; returns their names.

    Raises UsageError, with nothing written outside `folder`, for a member that is no plain file or has another name
    than a run gives, a second member of one name, more than MAX_FILES members or `max_bytes` bytes, and for what is no
    tar archive.
    """
    names: list[str] = []
    seen: set[str] = set()
    total = 0
    try:
        with tarfile.open(archive, "r:") as tar:
            for count, member in enumerate(tar, 1):
                total += member.size
                if total > max_bytes or count > MAX_FILES:
                    raise _refused(archive, f"more than {max_bytes} bytes, or {MAX_FILES} members")
                name = member.name.removeprefix("./")
                if member.isdir() and name in {".", "", "traces", "traces/payloads", "run"}:
                    continue
                if name.endswith(".part") and member.isfile():
                    continue  # what a broken run had not finished
                _check(archive, member, name, seen)
                seen.add(name)
                names.append(name)
                _write(tar, member, folder / name)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _refused(archive, f"not a tar archive: {error}"[:200]) from error
    return names


def _check(archive: Path, member: tarfile.TarInfo, name: str, seen: set[str]) -> None:
    if not member.isreg() or member.issparse():
        raise _refused(archive, f"{name!r} is not a plain file")
    if not _ALLOWED.fullmatch(name):
        raise _refused(archive, f"a file named {name!r}")
    if name in seen:
        raise _refused(archive, f"{name!r} stands there twice")


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None, "a plain file has contents"
    with written(path), source:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def _refused(archive: Path, measured: str) -> UsageError:
    return UsageError(
        "the node's archive is not what a run leaves", where=archive.name, measured=measured[:300],
        allowed="plain files traces/*.jsonl, traces/payloads/*.safetensors and run/*.log, each once",
        next_step="do not trust that node's answer; look at what runs there",
    )  # fmt: skip
