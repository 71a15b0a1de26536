"""doctor(): what of driftprobe works here, in which versions, and the line that installs what is missing.

Nothing is imported to find out: versions come from the installed packages' metadata.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

from driftprobe.engines import ENGINES, include_folder
from driftprobe.fingerprint import BUILT
from driftprobe.version import __version__

SCHEMA = "driftprobe/doctor/1"
CORE_INSTALL = "install with a C compiler and xxhash.h (Debian: libxxhash-dev) at hand"
"""What gives the compiled core."""
LIBRARIES = ("click", "ml_dtypes", "msgspec", "numpy", "rich", "safetensors", "xxhash")
"""What analysing a trace stands on."""
_DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python"}
_FRAMES = ("polars", "pandas")
_PROGRAMS = {"ssh": "driftprobe run --host", "cc": "the compiled core and the examples in C"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked for."""

    kind: str
    """`library`, `engine`, `core`, `plugin`, `frames` or `program`."""
    name: str
    works: bool
    found: str
    """Its version or versions, or its place; what is missing where it does not work."""
    purpose: str = ""
    install: str = ""
    """What to type, or what to do; empty where nothing is missing."""


@dataclass(frozen=True, slots=True)
class Health:
    """Everything that was found."""

    driftprobe: str
    python: str
    system: str
    folder: str
    """Where the package lies."""
    checks: tuple[Check, ...]

    @property
    def next_step(self) -> str:
        """What to type next."""
        if any(check.kind == "engine" and check.name == "hf" and check.works for check in self.checks):
            return "driftprobe run"
        return ENGINES["hf"].install


def doctor() -> Health:
    """Look at this installation."""
    checks = [_library(name) for name in LIBRARIES]
    checks.append(Check("core", "fingerprints in C", BUILT, "compiled" if BUILT else "NumPy, slower",
                        "the trace writer's speed", "" if BUILT else CORE_INSTALL))  # fmt: skip
    checks += [_engine(name) for name in ENGINES]
    checks += [_plugin(), _frames()]
    checks += [_program(name, purpose) for name, purpose in _PROGRAMS.items()]
    return Health(
        __version__, platform.python_version(), platform.platform(), str(Path(__file__).parent), tuple(checks)
    )


def version_of(module: str) -> str:
    """Return the version of the package that a module comes from; empty where it is not installed."""
    try:
        return version(_DISTRIBUTIONS.get(module, module)) if find_spec(module) else ""
    except PackageNotFoundError:
        return "version unknown"


def _library(name: str) -> Check:
    found = version_of(name)
    return Check("library", name, bool(found), found or "missing", "analysing traces",
                 "" if found else "pip install -e .")  # fmt: skip


def _engine(name: str) -> Check:
    entry = ENGINES[name]
    versions = ", ".join(f"{need} {version_of(need) or 'missing'}" for need in entry.needs)
    return Check("engine", name, not entry.missing, versions or "needs nothing", entry.about,
                 entry.install if entry.missing else "")  # fmt: skip


def _plugin() -> Check:
    known = any(found.value == "driftprobe.pytest_plugin" for found in entry_points(group="pytest11"))
    pytest = version_of("pytest")
    found = f"pytest {pytest or 'missing'}" + ("" if known else ", plugin not registered")
    missing = "pip install pytest" if not pytest else "pip install -e ."
    return Check("plugin", "pytest plugin", bool(known and pytest), found, "driftprobe in a test suite",
                 "" if known and pytest else missing)  # fmt: skip


def _frames() -> Check:
    found = [f"{name} {version_of(name)}" for name in _FRAMES if version_of(name)]
    return Check("frames", "data frames", bool(found), ", ".join(found) or "neither polars nor pandas",
                 "Result.to_frame()", "" if found else "pip install polars")  # fmt: skip


def _program(name: str, purpose: str) -> Check:
    found = shutil.which(name)
    return Check("program", name, found is not None, found or "not on the PATH", purpose,
                 "" if found else f"install `{name}` with your system's package manager")  # fmt: skip


def header_folder() -> str:
    """Return what a C compiler needs to find the trace writer's header."""
    return f"-I{include_folder()}"
