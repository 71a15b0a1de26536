"""The engines: a table from name to module, and the install line of each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from driftprobe.engines.base import Engine
from driftprobe.errors import UsageError


@dataclass(frozen=True, slots=True)
class Entry:
    """One engine of the table."""

    module: str
    needs: tuple[str, ...]
    install: str
    about: str

    @property
    def missing(self) -> tuple[str, ...]:
        """The libraries that are not installed here."""
        return tuple(name for name in self.needs if find_spec(name) is None)


ENGINES: dict[str, Entry] = {
    "hf": Entry(
        "driftprobe.engines.hf",
        ("torch", "transformers"),
        "pip install 'driftprobe[hf]'",
        "Hugging Face transformers: a local model folder, builtin:tiny, or a model object",
    ),
}


def open_engine(name: str, **options: Any) -> Engine:
    """Return an engine by name, its model loaded. Raises UsageError for an unknown or uninstalled one."""
    entry = ENGINES.get(name)
    if entry is None:
        raise UsageError(
            "unknown engine", where="--engine", measured=name, allowed=", ".join(ENGINES),
            next_step="`driftprobe engines` lists them",
        )  # fmt: skip
    if entry.missing:
        raise UsageError(
            "engine not installed", where=f"--engine {name}", measured=f"missing: {', '.join(entry.missing)}",
            allowed="its libraries installed", next_step=entry.install,
        )  # fmt: skip
    engine: Engine = import_module(entry.module).open_engine(**options)
    return engine
