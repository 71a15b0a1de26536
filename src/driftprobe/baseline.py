"""The baseline file: an accepted run in small, kept in a repository and held against new ones."""

from __future__ import annotations

from pathlib import Path

from driftprobe.artifacts import written
from driftprobe.errors import OutputError, TraceError
from driftprobe.snapshot import SCHEMA, Snapshot, decode, encode
from driftprobe.version import __version__

MAX_BYTES = 64 << 20
"""Size of the longest file that is read: a thousand layers, both modes, dozens of prompts."""


def save_baseline(found: Snapshot, path: Path, *, replace: bool = False) -> None:
    """Write a baseline file in one step. Raises OutputError where something stands there and is not to be replaced.

    Only a baseline is ever replaced: another file stays, whatever is asked.
    """
    if path.is_symlink() or path.exists():
        other = path.is_symlink() or not path.is_file() or not _is_baseline(path)
        if other or not replace:
            raise OutputError(
                "the baseline's place is taken", where=str(path),
                measured="something that is no baseline" if other else "an earlier baseline",
                allowed="nothing yet" + ("" if other else ", or --replace"),
                next_step="choose another file" if other else "look at `driftprobe baseline check`; then add --replace",
            )  # fmt: skip
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.part")
        partial.write_text(encode(found, __version__), encoding="utf-8", newline="\n")
        partial.replace(path)


def _is_baseline(path: Path) -> bool:
    try:
        load_baseline(path)
    except TraceError:
        return False
    return True


def load_baseline(path: Path) -> Snapshot:
    """Return what a baseline file holds. Raises TraceError where it cannot be read or is none."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise TraceError("no baseline", where=str(path), measured=error.strerror or str(error),
                         allowed=f"a file of schema {SCHEMA}",
                         next_step=f"`driftprobe baseline save RUN {path}` writes one") from error  # fmt: skip
    if len(raw) > MAX_BYTES:
        raise TraceError("not a baseline", where=str(path), measured=f"more than {MAX_BYTES} bytes",
                         allowed=f"{MAX_BYTES} bytes", next_step="save it again, with fewer prompts")  # fmt: skip
    return decode(raw, str(path))
