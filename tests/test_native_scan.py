"""The scanner of records under sanitizers: no line, however damaged, makes it read or write where it may not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from make_trace import write
from native_header import ROOT, compiler

FLAGS = ("-std=c99", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=all")  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the fuzzer, built."""
    out = tmp_path_factory.mktemp("fuzz") / "fuzz_scan"
    subprocess.run([compiler("cc"), *FLAGS, f"-I{ROOT / 'src/driftprobe'}", str(ROOT / "tests/native/fuzz_scan.c"),
                    "-o", str(out), "-lm"], check=True)  # fmt: skip
    return out


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_damaged_lines_are_scanned_clean_under_the_sanitizers(seed: int, program: Path, tmp_path: Path) -> None:
    write(tmp_path / "traces")
    lines = sorted((tmp_path / "traces").rglob("*.jsonl"))[0]
    done = subprocess.run([program, str(lines), str(seed), "1000"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
