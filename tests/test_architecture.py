"""Who may import whom, that the middle is pure and loads without torch, and that judgement reads no labels."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import driftprobe
from driftprobe.trace_file import TraceWriter
from make_trace import drifting, toy

PACKAGE = Path(driftprobe.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
LADDER = (
    {"errors", "version", "json_numbers"},
    {"taps", "causes"},
    {"faults"},
    {"fingerprint"},
    {"trace_checks", "written"},
    {"trace"},
    {"trace_file"},
    {"plan", "payload", "boundaries", "columns"},
    {"compare", "scan", "seal", "relined"},
    {"packed"},
    {"load"},
    {"floor", "validate"},
    {"local"},
    {"turns"},
    {"matched"},
    {"judgement"},
    {"products"},
    {"gates", "rows", "row_causes", "impact", "climb", "scores"},
    {"ties", "cells"},
    {"failures"},
    {"modes"},
    {"verdict", "scene"},
    {"thin"},
    {"quick"},
    {"hypotheses"},
    {"explain"},
    {"diagnose"},
    {"snapshot"},
    {"difference"},
    {"report"},
)
"""Lowest first: a module imports from its own step downwards. Modules that stand nowhere are checked one by one."""
STEP = {name: step for step, names in enumerate(LADDER) for name in names}
MIDDLE = ("compare", "floor", "local", "turns", "matched", "judgement", "products", "gates", "rows", "row_causes",
          "impact", "climb", "scores", "ties", "cells", "failures", "modes", "verdict", "scene", "columns", "thin",
          "hypotheses", "explain", "diagnose", "snapshot", "difference", "report")  # fmt: skip
JUDGEMENT = tuple(name for name in MIDDLE if name != "report")
THIRD_PARTY = {"numpy", "ml_dtypes", "xxhash", "msgspec", "safetensors", "jinja2", "markupsafe", "polars"}
"""What analysis may stand on; torch and transformers are an engine's own."""


def head(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def names_of(part: str) -> list[str]:
    return [name for name in MODULES if head(name) == part]


def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[str]:
    """Every import of a module, those inside functions included; those for types alone are not."""
    body = tree(name)
    for_types = {
        id(node)
        for branch in ast.walk(body)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(body):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            module = node.module or ""
            below = [f"{module}.{alias.name}" for alias in node.names]
            yield from (found if found.removeprefix("driftprobe.") in MODULES else module for found in below)


def own(name: str) -> set[str]:
    """The modules of driftprobe that a module imports."""
    return {found.removeprefix("driftprobe.") for found in imports(name) if found.startswith("driftprobe.")}


def test_the_modules_are_found():
    assert {"compare", "report.final_report", "engines.hf.engine", "cli.run"} <= MODULES.keys()
    assert "taps" in own("floor")
    assert all(names_of(part) for step in LADDER for part in step)


@pytest.mark.parametrize("name", [name for name in MODULES if head(name) in STEP])
def test_imports_go_one_way(name):
    for other in own(name):
        assert head(other) in STEP, f"{name} imports {other}, which stands above it"
        above = STEP[head(other)] > STEP[head(name)]
        same = STEP[head(other)] == STEP[head(name)] and head(other) != head(name)
        assert not above and not same, f"{name} imports {other}"


def test_nothing_imports_the_command_line():
    for name in MODULES:
        if head(name) != "cli":
            assert "cli" not in {head(other) for other in own(name)}, name


@pytest.mark.parametrize("name", [name for name in MODULES if head(name) == "engines" and name != "engines"])
def test_engines_know_neither_each_other_nor_the_judgement(name):
    engine = name.split(".")[1]
    for other in own(name):
        assert head(other) not in {*MIDDLE, "load", "validate", "api", "capture", "artifacts"}, (
            f"{name} imports {other}"
        )
        if head(other) == "engines":
            assert other in {"engines", "engines.base"} or other.split(".")[1] == engine, f"{name} imports {other}"


def test_an_engine_is_imported_only_when_it_is_asked_for():
    for name in MODULES:
        if head(name) != "engines":
            top = {n for node in tree(name).body if isinstance(node, ast.ImportFrom) for n in [node.module or ""]}
            assert not {n for n in top if n.startswith("driftprobe.engines.") and n != "driftprobe.engines.base"}, name


@pytest.mark.parametrize(
    "name", [n for part in (*MIDDLE, "taps", "fingerprint", "trace_checks", "plan") for n in names_of(part)]
)
def test_the_middle_does_no_input_or_output(name):
    """No file, no clock, no environment, no terminal: frozen data in, frozen data or text out."""
    for found in imports(name):
        assert head(found) not in {"pathlib", "os", "io", "sys", "shutil", "tempfile", "time", "datetime", "subprocess",
                                   "logging", "socket", "random"}, f"{name} imports {found}"  # fmt: skip
        assert not found.startswith("driftprobe.payload"), f"{name} imports {found}"
    called = {n.func.id for n in ast.walk(tree(name)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"open", "print", "input", "Path", "read_trace", "load_traces", "TraceWriter"}, name


@pytest.mark.parametrize("name", [n for n in MODULES if head(n) in {*MIDDLE, "load", "validate", *STEP}])
def test_analysis_stands_on_few_libraries(name):
    for found in imports(name):
        if head(found) != "driftprobe" and head(found) not in sys.stdlib_module_names:
            assert head(found) in THIRD_PARTY, f"{name} imports {found}"


@pytest.mark.parametrize("name", [n for part in JUDGEMENT for n in names_of(part)])
def test_judgement_never_reads_labels(name):
    """A label may say which fault was planted: a verdict that read it would know the answer."""
    assert "faults" not in own(name)
    for node in ast.walk(tree(name)):
        assert not (isinstance(node, ast.Attribute) and node.attr == "labels"), f"{name}, line {node.lineno}"
        assert not (isinstance(node, ast.Constant) and node.value == "labels"), f"{name}, line {node.lineno}"


WITHOUT_TORCH = """
import sys
for missing in ("torch", "transformers", "tokenizers", "ray"):
    sys.modules[missing] = None
import driftprobe
result = driftprobe.analyze(sys.argv[1])
assert result.reports()
print(result.verdict.value, result.first_failure.layer, result.first_failure.tensor, len(result.reports()))
assert not [name for name in sys.modules if name.startswith("driftprobe.engines.hf")]
"""


def test_a_trace_is_judged_and_reported_without_torch(tmp_path):
    trace, _ = toy(drifting(0.1, start=(1, "q_rope")), mode="kv_aligned")
    with TraceWriter(tmp_path / trace.path, trace.header) as writer:
        for record in trace.records:
            writer.record(record)
        for event in trace.events:
            writer.event(event)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["MISMATCH", "1", "q_rope", "5"], done.stderr
