"""Pages of docs/ that no test of their own reads: their commands run, and print what the page says they print."""

from __future__ import annotations

import re
import shutil
import sys
from datetime import date
from importlib import import_module
from pathlib import Path

import pytest

import driftprobe
from driftprobe import matched
from driftprobe.fingerprint import UNIT_ROUNDOFF
from test_docs import shell

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
MINE = ("quick-start", "faults", "troubleshooting")
"""Pages whose commands run here, in their order."""
ELSEWHERE = {
    "ci": "test_docs_ci",
    "engines": "test_docs_engines",
    "pytest": "test_docs_pytest",
    "how-it-decides": "test_diagnose",
    "contributing": "test_docs_contributing",  # make check, make test, make docs: what a test stands in
    "verdict-json": "test_docs_pages",
}
"""Pages with commands that another test runs."""


def page(name: str) -> str:
    return (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page(name), flags=re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[str]:
    """The page's own commands; what sets up an environment (make, source) is what a test already stands in."""
    lines = [line.split("#")[0].strip() for block in blocks(name, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("driftprobe")]


@pytest.mark.parametrize("name", MINE)
def test_the_pages_commands_run_and_print_what_it_says(name, tmp_path):
    shutil.copytree(Path(driftprobe.__file__).parent / "models/tiny", tmp_path / "my-llama")
    printed = []
    assert commands(name)
    for line in commands(name):
        done = shell(line.replace("DATE", date.today().isoformat()), tmp_path)
        assert done.returncode == (1 if "--fault" in line else 0), line + done.stdout + done.stderr
        printed.append(done.stdout)
    everything = " ".join(" ".join(printed).split())
    for sentence in (part for block in blocks(name, "text") for part in re.split(r"\n(?=\S)", block.strip())):
        if not sentence.startswith("error:"):  # test_docs_troubleshooting
            assert " ".join(sentence.split()) in everything, sentence


def test_the_quick_starts_python_runs(tmp_path, monkeypatch, capsys):
    import transformers

    monkeypatch.chdir(tmp_path)
    folder = Path(driftprobe.__file__).parent / "models/tiny"
    (code,) = blocks("quick-start", "python")
    exec(
        compile(code, "quick-start.md", "exec"),
        {"model": transformers.AutoModelForCausalLM.from_pretrained(str(folder))},
    )
    assert capsys.readouterr().out.startswith("Verdict.")


def test_the_verdicts_one_liner_reads_a_verdict(tmp_path):
    from driftprobe.report import verdict_json
    from html_pages import toy_run

    (tmp_path / "verdict.json").write_text(verdict_json.render(*toy_run("fault")[:2]), encoding="utf-8")
    (line,) = blocks("verdict-json", "bash")
    done = shell(f'python() {{ {sys.executable} "$@"; }}; {line}', tmp_path)
    assert done.stdout.startswith("MISMATCH {"), done.stderr


def test_no_page_with_commands_is_forgotten():
    docs = ROOT / "docs"
    names = {path.relative_to(docs).with_suffix("").as_posix() for path in docs.rglob("*.md")}
    told = {name for name in names if any(line for block in blocks(name, "bash") for line in block.splitlines())}
    known = set(MINE) | {name for name, test in ELSEWHERE.items() if (ROOT / f"tests/{test}.py").is_file()}
    assert told <= known, sorted(told - known)


def test_the_faults_page_is_made_from_the_faults(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    sys.modules.pop("fault_table", None)
    import fault_table

    assert fault_table.page(page("faults")) == page("faults"), "python tools/fault_table.py"


def test_the_mathematics_names_the_constants_as_they_are():
    table = re.findall(r"^\| `([A-Z_]+)` \| (\S+) \| `(\w+)\.py` \|", page("mathematics"), flags=re.MULTILINE)
    assert len(table) == 24
    for name, value, where in table:
        assert getattr(import_module(f"driftprobe.{where}"), name) == float(value), name
    for dtype, power in re.findall(r"\| (float\w+|bfloat16|tfloat32) \| 2⁻([⁰¹²³⁴⁵⁶⁷⁸⁹]+) ", page("mathematics")):
        digits = power.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789"))
        assert UNIT_ROUNDOFF[dtype] == 2.0 ** -int(digits), dtype
    assert matched.LEAST_SHARE == {"mlp_out": 1.5, "q_rope": 1.0, "k_rope": 1.0}


def test_the_figure_of_the_filters_is_of_the_fault_that_the_page_names(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import docs_pictures

    drawn = (ROOT / "docs/pictures/filters.svg").read_text(encoding="utf-8")
    assert f"scores × {docs_pictures.FACTOR:g}<" in drawn
    assert f"scores by {docs_pictures.FACTOR:g}" in page("mathematics")
    for name in docs_pictures.SECTIONS:
        shown = page("how-it-decides") + page("mathematics")
        assert f"(pictures/{name}.png)" in shown and (ROOT / f"docs/pictures/{name}.png").is_file(), name
