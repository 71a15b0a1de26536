"""docs/ci.md is executed: its commands run in their order, its workflow names them, its tables say what there is."""

from __future__ import annotations

import json
import re
import shutil
from datetime import date
from pathlib import Path

import pytest

import driftprobe
from driftprobe.cli.output import FORMATS
from driftprobe.difference import BETTER, WORSE, Kind
from driftprobe.floor import LIMIT
from driftprobe.report.difference import render_json
from test_difference import CLEAN, ROPE, difference
from test_docs import shell

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


def test_the_pages_commands_run_in_their_order(tmp_path):
    shutil.copytree(Path(driftprobe.__file__).parent / "models/tiny", tmp_path / "my-llama")
    today = tmp_path / "artifacts" / date.today().isoformat()
    for line in LINES:
        done = shell(f"unset GITHUB_STEP_SUMMARY; {line.replace('DATE', today.name)}", tmp_path)
        assert done.returncode == 0, line + done.stdout + done.stderr
        if not (today / "before").exists():  # the reader's earlier run
            shutil.copytree(today / "after", today / "before")
    assert json.loads((tmp_path / "verdict.json").read_text())["verdict"] == "STRUCTURAL_DRIFT"
    assert json.loads((tmp_path / "diff.json").read_text())["result"] == "not worse"
    assert "<testsuites" in (tmp_path / "driftprobe.xml").read_text()


def test_the_workflows_commands_are_the_pages():
    (workflow,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    commands = re.findall(r"run: (driftprobe .*)", workflow)
    assert len(commands) == 2
    for command in commands:
        assert command in LINES, command


def test_the_tables_name_every_format_and_kind():
    for name in FORMATS:
        assert f"`--format {name}`" in PAGE
    for kind in Kind:
        if kind is not Kind.NEW:
            word = "worse" if kind in WORSE else "better" if kind in BETTER else "not compared"
            assert re.search(rf"^\|.*{kind.value}.*\| {word} \|", PAGE, re.MULTILINE), kind
    assert f"{LIMIT:g} × the larger floor" in PAGE


def test_the_pages_fields_are_those_of_the_json():
    body = json.loads(render_json(difference(CLEAN, ROPE)))
    names = set(body) | set(body["worse"][0]) | set(body["verdicts"][0]) | set(body["verdicts"][0]["new"])
    for name in names | set(body["worse"][0]["new"]) | set(body["old"]):
        assert f"`{name}`" in PAGE, name
