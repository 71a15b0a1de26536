"""docs/engines.md is executed: its commands run, its tables name what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import fields
from datetime import date
from importlib.util import find_spec

import pytest

from driftprobe.engines.command import PLACEHOLDERS, Program
from driftprobe.plan import ARMS
from native_header import ROOT, compiler
from test_docs import shell

pytest.importorskip("transformers")

PAGE = (ROOT / "docs/engines.md").read_text(encoding="utf-8")
LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder as a reader of the page has it: the examples, the header, and a driftprobe on the PATH."""
    compiler()
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("llama", "artifacts"))
    shutil.copytree(ROOT / "include", folder / "include")
    (folder / "tools").symlink_to(ROOT / "tools")
    for name, words in (("driftprobe", "-c 'from driftprobe.cli import main; main()'"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def is_for_the_reader_alone(line: str) -> bool:
    """A node, an installation, a table that takes minutes; and llama.cpp, where it is not installed."""
    of_llama = "llamacpp" in line or "gguf" in line
    return (
        ("--host" in line and "--dry-run" not in line)
        or "pip install" in line
        or line.startswith("python -m benchmarks")
        or (of_llama and find_spec("llama_cpp") is None)
    )


def test_the_pages_commands_run_in_their_order(reader):
    ran = 0
    for line in LINES:
        if is_for_the_reader_alone(line):
            continue
        command = f"export PATH={reader}:$PATH; {line.replace('DATE', date.today().isoformat())}"
        done = shell(command, reader)
        assert done.returncode == (1 if "--fault" in line else 0), line + done.stdout + done.stderr
        ran += 1
    assert ran >= 6


def test_the_pages_tables_name_every_placeholder_field_and_arm():
    for name in PLACEHOLDERS:
        assert f"`{{{name}}}`" in PAGE, name
    for spec in fields(Program):
        assert f"`{spec.name}`" in PAGE or f"`[{spec.name}]`" in PAGE, spec.name
    for arm in ARMS:
        assert f"`{arm}`" in PAGE, arm


def test_the_pages_c_compiles(tmp_path):
    code = re.search(r"^```c\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert code is not None
    (tmp_path / "snippet.c").write_text(
        '#define DRIFTPROBE_IMPLEMENTATION\n#include "driftprobe.h"\n'
        "void snippet(const char *out, int layer, int token, int n, int heads, int dim, void *data);\n"
        "void snippet(const char *out, int layer, int token, int n, int heads, int dim, void *data) {\n"
        f"{code[1]}}}\n",
        encoding="utf-8",
    )
    done = subprocess.run([compiler(), "-std=c99", "-Wall", "-Wextra", "-Werror", "-fsyntax-only",
                           f"-I{ROOT / 'include'}", str(tmp_path / "snippet.c")],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_toml_of_the_page_is_the_examples():
    page = re.search(r"^```toml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    example = (ROOT / "examples/c_engine/driftprobe.toml").read_text(encoding="utf-8")
    assert page is not None
    assert page[1] == "".join(f"{line}\n" for line in example.splitlines() if not line.startswith("#"))
