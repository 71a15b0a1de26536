"""The engines: a table from name to module, and the install line of each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
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
    options: tuple[str, ...] = ()
    """What it may be told beside its model."""

    @property
    def missing(self) -> tuple[str, ...]:
        """The libraries that are not installed here."""
        return tuple(name for name in self.needs if find_spec(name) is None)


ENGINES: dict[str, Entry] = {
    "hf": Entry(
        "driftprobe.engines.hf",
        ("torch", "transformers"),
        "pip install -e '.[hf]'",
        "Hugging Face transformers: a local model folder, builtin:tiny, or a model object",
        ("dtype", "attn"),
    ),
    "llamacpp": Entry(
        "driftprobe.engines.llamacpp",
        ("llama_cpp", "gguf"),
        "pip install -e '.[llamacpp]'",
        "llama.cpp through llama-cpp-python: a GGUF file, on the CPU",
        ("flash_attn", "cache_type", "threads"),
    ),
    "command": Entry(
        "driftprobe.engines.command",
        (),
        "nothing to install",
        "any program that writes a trace: --config FILE says how it is run (docs/engines.md)",
        ("config",),
    ),
}


def include_folder() -> Path:
    """Return the folder of driftprobe.h, for a C or C++ compiler's -I: the package's own, or the checkout's."""
    package = Path(__file__).resolve().parents[1]
    folders = (package / "include", package.parents[1] / "include")
    return next((folder for folder in folders if (folder / "driftprobe.h").is_file()), folders[0])


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
    foreign = sorted(set(options) - {"model", *entry.options})
    if foreign:
        raise UsageError(
            "an option that this engine does not have", where=f"--engine {name}", measured=f"--{foreign[0]}",
            allowed=", ".join(f"--{option}" for option in ("model", *entry.options)),
            next_step=f"leave --{foreign[0]} out, or choose another engine",
        )  # fmt: skip
    engine: Engine = import_module(entry.module).open_engine(**options)
    return engine
