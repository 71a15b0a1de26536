"""Builds driftprobe._core and driftprobe._scan with the system's C compiler.

Without one, or for _core without xxhash.h, NumPy and the line-by-line reader do their work.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
PACKAGE = ROOT / "src" / "driftprobe"
WITHOUT = {"_core": "fingerprints are computed by NumPy", "_scan": "large traces are read line by line"}
"""Module -> what is done without it."""


class CoreHook(BuildHookInterface):  # type: ignore[misc]
    """Compile the core into the package, and mark the wheel as one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it packs; a core that cannot be built is told and left out."""
        for name, instead in WITHOUT.items():
            target = PACKAGE / f"{name}.abi3.so"
            target.unlink(missing_ok=True)
            if os.environ.get("DRIFTPROBE_NO_CORE"):
                continue
            done = _compile(PACKAGE / f"{name}.c", target)
            if done:
                self.app.display_warning(f"driftprobe.{name} is not built, {instead}: {done}")
                continue
            build_data["artifacts"].append(f"src/driftprobe/{name}.abi3.so")
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"cp310-abi3-{platform}"


def _compile(source: Path, target: Path) -> str:
    """Compile; returns why that failed, or an empty text."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None or os.name == "nt":
        return f"no C compiler `{compiler[0]}`"
    flags = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-pthread"]
    command = [*compiler, "-std=c99", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", *flags,
               f"-I{sysconfig.get_paths()['include']}", f"-I{ROOT / 'include'}",
               str(source), "-o", str(target), "-lm"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    if "xxhash.h" in done.stderr:
        return "xxhash.h is missing (Debian: libxxhash-dev)"
    return done.stderr.strip().splitlines()[0] if done.stderr.strip() else f"{compiler[0]} failed"
