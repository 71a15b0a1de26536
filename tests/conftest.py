"""Shared fixtures: one captured run of the built-in model, made once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test workers on two cores; read by torch when it loads


@pytest.fixture(scope="session")
def clean_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts folder of a clean run of builtin:tiny in both modes, every payload kept."""
    pytest.importorskip("transformers")
    from driftprobe import probe

    root = tmp_path_factory.mktemp("clean") / "run"
    probe("builtin:tiny", {"p0_short": "Hi", "p6_len_16": "def main(argv):\n"}, out=root, payload="all")
    return root
