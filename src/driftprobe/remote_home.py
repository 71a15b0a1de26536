"""What waits here for a run elsewhere: which run it is, and what has come of it so far."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from driftprobe.artifacts import written
from driftprobe.errors import UsageError
from driftprobe.remote_ssh import LAST_LINES, Node


@dataclass(frozen=True, slots=True)
class Task:
    """A run that goes on elsewhere, as it is kept in a file here until it has come home."""

    id: str
    host: str
    command: str
    base: str
    """The folder on the node that the user named; empty for the default."""
    prompts: str
    """SHA-256 of the prompt file's text, so that another text is not taken for the same run."""
    folder: str
    """The run's own folder on the node; empty until it is made."""

    @property
    def what(self) -> tuple[str, ...]:
        """What the user asked for: a run goes on only where all of it is the same."""
        return (self.host, self.base, self.command, self.prompts)


class Home:
    """The hidden folder beside the run's place in which all that has come from the node waits until it is whole."""

    def __init__(self, root: Path, command: str, node: Node, prompts: str) -> None:
        self.root, self.folder = root, root.with_name(f".{root.name}.remote")
        digest = hashlib.sha256(prompts.encode()).hexdigest()
        self._new = Task(secrets.token_hex(8), node.host, command, node.folder, digest, "")
        self.archive, self.log = self.folder / "artifacts.tar.part", self.folder / "remote.log"

    def task(self) -> Task:
        """Return the run that waits here, or a new one. Raises UsageError where another one waits."""
        kept, new = self.folder / "task.json", self._new
        with written(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log.touch()
        if not kept.is_file():
            return new
        found = read_task(kept)
        if found is None:
            raise UsageError(
                "the note of a remote run is damaged", where=str(kept), measured="not what driftprobe wrote there",
                allowed="the note as it was written",
                next_step=f"remove {self.folder} and run again; the lock on {new.host}, if it is held, says by whom",
            )  # fmt: skip
        if found.what != new.what:
            others = "" if found.prompts == new.prompts else " (with another prompt file's text)"
            raise UsageError(
                "another remote run of this place has not come home", where=str(self.folder),
                measured=f"on {found.host}, {found.base or '~/.driftprobe'}: {found.command}"[:400] + others,
                allowed="the same command, which goes on with it",
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
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - (1 << 16)))
            text = file.read().decode("utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("progress: ")]
        return " | ".join(lines[-LAST_LINES:])

    def forget(self) -> None:
        """Remove the folder: everything in it has its place."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def others(self) -> Iterator[tuple[Path, Task]]:
        """Yield the other places below the same out folder whose runs have not come home."""
        for kept in sorted(self.root.parent.parent.glob("*/.*.remote/task.json")):
            task = read_task(kept)
            if task is not None and kept.parent != self.folder:
                name = kept.parent.name.removeprefix(".").removesuffix(".remote")
                yield kept.parent.with_name(name), task


def read_task(path: Path) -> Task | None:
    """Return the run of a note, or None for what is none."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        task = Task(**body)
    except (OSError, ValueError, TypeError):
        return None
    return task if all(isinstance(value, str) for value in asdict(task).values()) else None
