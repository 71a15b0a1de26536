"""docs/probe-paths.md is executed: every example runs and prints what stands behind it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "probe-paths.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```\n.*?```text\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_page_has_its_examples() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") == 3


@pytest.mark.parametrize(("code", "printed"), EXAMPLES, ids=["by_hand", "transformers", "factory"])
def test_an_example_prints_what_it_says(code: str, printed: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == printed, done.stderr
