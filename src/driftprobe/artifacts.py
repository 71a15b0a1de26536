"""The artifacts folder: what may stand in it, and how a new run takes an old one's place without losing anything.

A run is captured and reported in a staging folder beside its place, and moved there in one step when all of it is
written. Whatever fails before leaves the old run as it was.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from driftprobe.errors import OutputError, TraceError, UsageError
from driftprobe.load import header_of, trace_files
from driftprobe.payload import FOLDER
from driftprobe.report.facts import FILES
from driftprobe.trace import Header

_OURS = (
    re.compile(r"run/[^/]+\.log"),
    re.compile(r"SELF_TEST\.md|self_test\.json"),
    re.compile(r"traces/[^/]+\.(jsonl|parquet)"),
    re.compile(rf"traces/{FOLDER}/[^/]+\.(safetensors|part)"),
)
_PATH_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of one run."""

    root: Path

    @property
    def traces(self) -> Path:
        """Where the trace files are."""
        return self.root / "traces"

    @property
    def logs(self) -> Path:
        """Where the run logs are."""
        return self.root / "run"


def place_of(out: Path, date: str, name: str) -> Path:
    """Return `out/date/name`. Raises UsageError where date or name could lead elsewhere."""
    for option, part in (("--date", date), ("--name", name)):
        if not _PATH_PART.fullmatch(part):
            raise UsageError(
                "not a folder name", where=option, measured=repr(part)[:120],
                allowed="letters, digits, '.', '_' or '-', the first a letter or digit",
                next_step=f"give {option} a plain name",
            )  # fmt: skip
    return out / date / name


def check_place(root: Path) -> None:
    """Raise OutputError where a run cannot go: somebody's files stand there, or it cannot be written."""
    if root.is_symlink():
        raise OutputError(
            "the output folder is a link", where=str(root), measured=f"leads to {root.readlink()}",
            allowed="a folder, or nothing yet", next_step="remove the link, or choose another --name or --out",
        )  # fmt: skip
    strangers = list(_strangers(root)) if root.exists() else []
    if strangers:
        raise OutputError(
            "the output folder holds other files", where=str(root), measured=f"{len(strangers)}, first {strangers[0]}",
            allowed="an empty folder, or an earlier run of driftprobe alone",
            next_step="choose another --name or --out, or move those files",
        )  # fmt: skip
    with written(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(root.parent, os.W_OK) or (root.exists() and not os.access(root, os.W_OK)):
            raise PermissionError(13, "Permission denied")


def check_comparison_place(root: Path, sides: Iterable[Path]) -> None:
    """Raise OutputError where a comparison would take the place of one of its sides, or of a run of its own."""
    for side in map(Path.resolve, sides):
        for taken in map(Path.resolve, (root, stage_of(root), _old_of(root))):
            if taken == side or taken in side.parents or side in taken.parents:
                raise OutputError(
                    "the comparison would overwrite what it compares", where=str(root), measured=f"overlaps {side}",
                    allowed="a folder beside both sides", next_step="choose another --name or --out",
                )  # fmt: skip
    for path in _traces(root):
        header = header_of(path)
        if header is None or not {"reference", "candidate"} <= set(header.labels):
            raise OutputError(
                "the output folder holds a run", where=str(root), measured=path.name,
                allowed="nothing yet, or an earlier comparison", next_step="choose another --name or --out",
            )  # fmt: skip


def _traces(root: Path) -> list[Path]:
    folder = root / "traces"
    return trace_files(folder) if folder.is_dir() else []


def stage_of(root: Path) -> Path:
    """Return the folder beside `root` in which a run is built."""
    return root.with_name(f".{root.name}.partial")


def _old_of(root: Path) -> Path:
    return root.with_name(f".{root.name}.old")


@contextmanager
def staged(root: Path) -> Iterator[Layout]:
    """Give a folder to build a run in; at a clean end it takes the place of `root`.

    After bad input or a full disk nothing of it stays; after an engine's failure or an interrupt its traces do, each a
    valid, incomplete one.
    """
    check_place(root)
    stage = stage_of(root)
    with written(stage):
        if stage.exists():
            shutil.rmtree(stage)
        stage.mkdir()
    try:
        yield Layout(stage)
    except (UsageError, TraceError):
        shutil.rmtree(stage, ignore_errors=True)
        raise
    with written(root):
        old = _old_of(root)
        if old.exists():
            shutil.rmtree(old)
        if root.exists():
            root.rename(old)
        stage.rename(root)
        shutil.rmtree(old, ignore_errors=True)


def keep_other_modes(root: Path, stage: Layout, headers: Iterable[Header]) -> list[str]:
    """Carry traces of another mode over from an earlier run of the same experiment; returns the modes kept."""
    new = list(headers)
    if not new or not (root / "traces").is_dir():
        return []
    kept = []
    old = [(path, header) for path in _traces(root) if (header := header_of(path))]
    for path, header in old:
        prompts = [_prompt(h) for _, h in old if h.mode == header.mode]
        twin = next((h for h in new if h.rung == header.rung), new[0])
        same = _experiment(header) == _experiment(twin) and sorted(prompts) == sorted(map(_prompt, new))
        if header.mode in {h.mode for h in new} or not same:
            continue
        with written(stage.root):
            for file in (
                path,
                *(root / "traces" / FOLDER).glob(f"{path.stem}.*"),
                *(root / "run").glob(f"{path.stem}.log"),
            ):
                target = stage.root / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)
        kept.append(header.mode)
    return sorted(set(kept))


def copy_run(traces: Path, stage: Layout) -> None:
    """Copy traces, their payloads and run logs into a staging folder; whatever else stands beside them stays there."""
    sources = [(path, stage.traces / path.name) for path in trace_files(traces)]
    sources += [(path, stage.traces / FOLDER / path.name) for path in (traces / FOLDER).glob("*.safetensors")]
    sources += [(path, stage.logs / path.name) for path in (traces.parent / "run").glob("*.log")]
    with written(stage.root):
        for source, target in sources:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def write_reports(root: Path, texts: dict[str, str]) -> None:
    """Write report files, each in one step, so that none is ever half there."""
    with written(root):
        root.mkdir(parents=True, exist_ok=True)
        partial = {name: root / f".{name}.part" for name in texts}
        try:
            for name, text in texts.items():
                partial[name].write_text(text, encoding="utf-8", newline="\n")
            for name, path in partial.items():
                path.replace(root / name)
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)


@contextmanager
def written(place: Path) -> Iterator[None]:
    """Turn an OSError of a write into the five-part message."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            "cannot write the output", where=str(error.filename or place), measured=error.strerror or str(error),
            allowed="a writable place with room left",
            next_step="free some space, correct the permissions, or choose another place with --out",
        ) from error  # fmt: skip


def _strangers(root: Path) -> Iterator[str]:
    if not root.is_dir():
        yield root.name
        return
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        if path.is_dir() and relative in {"run", "traces", f"traces/{FOLDER}"} and not path.is_symlink():
            continue
        if relative not in FILES.values() and not any(pattern.fullmatch(relative) for pattern in _OURS):
            yield relative


def _prompt(header: Header) -> tuple[str, str, tuple[int, ...]]:
    return (header.prompt, header.rung, header.token_ids[: header.prompt_len])


def _experiment(header: Header) -> tuple[object, ...]:
    labels = {name: value for name, value in header.labels.items() if name != "output"}
    return (header.engine, header.seed, header.steps, header.payload, sorted(header.taps.items()), labels)
