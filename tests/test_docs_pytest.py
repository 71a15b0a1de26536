"""docs/pytest.md is executed: its suite runs, its commands run, its failure and its TOML are what comes out."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from report_traces import broken_from, prompt_trace
from test_docs import shell
from test_pytest_plugin import PLUGIN, ROOT, STAND_IN, write

PAGE = (ROOT / "docs/pytest.md").read_text(encoding="utf-8")


def block(language: str, which: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)[which]


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """The sample project, which the page's commands are about, with an engine that is quick: traces in its place."""
    shutil.copytree(ROOT / "examples/pytest_project", tmp_path / "suite",
                    ignore=shutil.ignore_patterns("artifacts", "__pycache__"))  # fmt: skip
    write(tmp_path / "suite/clean", prompt_trace("p0_short", "kv_aligned"))
    write(tmp_path / "suite/rope", prompt_trace("p0_short", "kv_aligned", broken_from(0, "q_rope")))
    (tmp_path / "suite/conftest.py").write_text(
        STAND_IN.replace("analyze(model)", "analyze('rope' if 'fault' in options else 'clean')").replace(
            '("both", "kv_aligned")', '("both", "kv_aligned", "as_designed")'
        )
    )
    (tmp_path / "pytest").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m pytest {" ".join(PLUGIN)} -p no:cacheprovider "$@"\n', encoding="utf-8"
    )
    (tmp_path / "pytest").chmod(0o755)
    return tmp_path


def commands(text: str) -> list[str]:
    return [line.split("#")[0].strip() for line in text.splitlines()]


def test_the_commands_run(reader):
    accepted = reader / "suite/driftprobe-accepted.toml"
    for line in commands(block("bash")):
        if "-n" in line:
            pytest.importorskip("xdist")
        done = shell(f"export PATH={reader}:$PATH; {line}", reader / "suite")
        assert done.returncode == 1, done.stdout  # the stand-in's cause is another than the accepted one
        assert "accepted was:" in done.stdout
    assert (reader / "suite/reports").is_dir() and "driftprobe" in (reader / "suite/results.xml").read_text()
    accepted.unlink()
    done = shell(f"export PATH={reader}:$PATH; {commands(block('bash', 1))[0]}", reader / "suite")
    assert done.returncode == 0 and "accepted from now on" in done.stdout, done.stdout
    written = [line for line in accepted.read_text().splitlines() if line and not line.startswith(("#", "cause"))]
    assert written == [line for line in block("toml").splitlines() if not line.startswith("cause")]


def test_the_readmes_mark_is_one(reader):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (mark,) = re.findall(r"^```python\n(@pytest.mark.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    (reader / "suite/tests/test_readme.py").write_text(f"import pytest\n\n\n{mark}")
    done = shell(f"export PATH={reader}:$PATH; pytest tests/test_readme.py", reader / "suite")
    assert "1 passed" in done.stdout, done.stdout


def test_the_pages_suite_and_failure(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "test_page.py").write_text(
        block("python") + '\n\ndef test_broken():\n    driftprobe.assert_equivalent("builtin:tiny", '
        '{"greeting": "Hello"}, fault="rope_plus_one", modes="kv_aligned", ladder="off")\n'
    )
    done = shell(f"{sys.executable} -m pytest {' '.join(PLUGIN)} -p no:cacheprovider test_page.py", tmp_path)
    assert "1 failed, 3 passed" in done.stdout, done.stdout
    for line in block("text").splitlines():
        assert line in done.stdout, done.stdout
