"""What a command loads: no engine's library, unless it runs one; `--help` hardly anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import driftprobe
from make_trace import write

SCRIPT = """
import sys
from driftprobe.cli import main
sys.argv = ["driftprobe", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print(end.code, *sorted({name.partition(".")[0] for name in sys.modules}), sep="\\n", file=sys.stderr)
"""


def loaded_by(*words: str) -> tuple[str, set[str]]:
    """Return the exit code of a command, and the packages that it loaded."""
    command = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, *loaded = done.stderr.splitlines()
    return code, set(loaded)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    write(tmp_path / "traces")
    return tmp_path / "traces"


@pytest.mark.parametrize("words", [["--help"], ["analyze"], ["validate"]])
def test_no_command_on_traces_loads_an_engines_library(words: list[str], traces: Path) -> None:
    code, loaded = loaded_by(*words, *([] if words == ["--help"] else [str(traces)]))
    assert code in ("0", "3"), loaded
    assert not loaded & {"torch", "transformers", "tokenizers", "llama_cpp", "gguf", "ray"}
    assert "click" in loaded


def test_help_loads_no_numbers() -> None:
    _, loaded = loaded_by("--help")
    assert not loaded & {"numpy", "rich", "msgspec", "safetensors"}


def test_every_public_name_is_there() -> None:
    assert all(getattr(driftprobe, name) is not None for name in driftprobe.__all__)
    assert set(driftprobe.__all__) <= set(dir(driftprobe))
    with pytest.raises(AttributeError, match="no attribute 'prob'"):
        driftprobe.prob  # noqa: B018


def test_a_verdict_on_the_terminal_loads_no_page_and_no_fault_dictionary(traces: Path) -> None:
    script = SCRIPT.replace('name.partition(".")[0]', "name")
    done = subprocess.run(
        [sys.executable, "-c", script, "analyze", str(traces)], capture_output=True, text=True, check=True
    )
    loaded = set(done.stderr.splitlines())
    assert {"driftprobe.verdict", "driftprobe.cli.show"} <= loaded
    assert not loaded & {"jinja2", "polars", "driftprobe.report.html", "driftprobe.report.final_report",
                         "driftprobe.report.junit", "driftprobe.hypotheses", "rich.progress"}  # fmt: skip
