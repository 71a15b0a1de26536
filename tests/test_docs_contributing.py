"""docs/contributing.md is followed: its engine runs, its tap is where a difference is found, its fault is named."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import driftprobe
from driftprobe import explain, taps
from driftprobe.causes import CAUSES
from driftprobe.engines import ENGINES
from driftprobe.hypotheses import HYPOTHESES
from driftprobe.options import RunOptions
from driftprobe.plan import Mode, Prompt
from driftprobe.result import Result
from driftprobe.taps import BY_NAME, TAPS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
ENGINE, ENTRY, TAP, FAULT, PLANTER, CAUSE, HYPOTHESIS = re.findall(
    r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL
)


def known(*modules: str) -> dict[str, Any]:
    """What stands in some modules of the product, as the code of the page finds it around itself."""
    found: dict[str, Any] = {}
    for name in modules:
        __import__(f"driftprobe.{name}")
        found |= vars(sys.modules[f"driftprobe.{name}"])
    return found


def executed(code: str, *modules: str) -> dict[str, Any]:
    names = known(*modules)
    exec(compile(code, "docs/contributing.md", "exec"), names)
    return names


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's engine, in the table under its name."""
    module = ModuleType("driftprobe.engines.toy")
    exec(compile(ENGINE, "toy.py", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(ENGINES, "toy", raising=False)
    executed(ENTRY, "engines")
    yield module
    ENGINES.pop("toy", None)


def judged(engine: Any, folder: Path) -> Result:
    options = RunOptions(modes=(Mode.AS_DESIGNED,), payload="all", ladder="off")
    return driftprobe.api.run(engine, [Prompt("p", tuple(b"Hello, world"))], options, folder)


def test_the_engine_is_clean_and_its_bug_is_found(toy, tmp_path, monkeypatch, capsys):
    from driftprobe.cli import main

    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"`driftprobe (run --engine toy [^`]*?)`", PAGE.replace("\n   ", " "))
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
    clean = [word for word in words if word not in {"--fault", "attn_scale"}]
    for arguments, code in ((clean, 0), (words, 1)):
        monkeypatch.setattr(sys, "argv", ["driftprobe", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr().out
        assert (left.value.code or 0) == code, printed
    assert "softmax scale × 1.05" in printed
    assert "*softmax scale × 1.05*" in PAGE


def test_a_new_tap_is_where_a_difference_is_found(toy, tmp_path, monkeypatch):
    new = eval(TAP, known("taps"))
    order = [tap.name for tap in TAPS]
    at = order.index("attn_ctx") + 1
    monkeypatch.setattr(taps, "TAPS", (*TAPS[:at], new, *TAPS[at:]))
    monkeypatch.setattr(taps, "_RANK", {tap.name: rank for rank, tap in enumerate(taps.TAPS)})
    monkeypatch.setitem(BY_NAME, new.name, new)

    class Gated(toy.Toy):
        wrong = 1.0

        def __init__(self):
            super().__init__()
            self.taps = {name: where for tap in taps.TAPS if (name := tap.name) in {*toy.Toy.taps, new.name}
                         for where in [toy.Toy.taps.get(name, (0,))]}  # fmt: skip

        def call(self, tokens, start, cache):
            rows, keys, values = super().call(tokens, start, cache)
            gate = rows["attn_ctx"] / 2 * (self.wrong if start else 1.0)
            out = rows["x_in"] + gate
            return rows | {new.name: gate, "x_out": out, "logits": out @ self.table.T}, keys, values

    assert judged(Gated(), tmp_path / "clean").verdict.value == "STRUCTURAL_DRIFT"
    Gated.wrong = 1.01
    first = judged(Gated(), tmp_path / "wrong").judgement.modes["as_designed"].first_failure
    assert (first.layer, first.tensor) == (0, new.name)
    assert new.suspect in first.root_cause


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's fault with its planter; returns its name."""
    pytest.importorskip("transformers")
    fault = executed(FAULT, "faults")["FAULT"]
    planter = executed(PLANTER, "faults", "engines.hf.planting.swap")["PLANTER"]
    monkeypatch.setitem(driftprobe.faults.FAULTS, fault.name, fault)
    for name, plant in planter.items():
        monkeypatch.setitem(known("engines.hf.planting")["PLANTERS"], name, plant)
    return fault.name


def found(fault: str, tmp_path: Path) -> Any:
    options: dict[str, Any] = {"mode": "kv_aligned", "fault": fault, "ladder": "off", "strength": 1.05}
    with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        result = driftprobe.probe("builtin:tiny", {"p": "Hello"}, **options)
    first = result.judgement.modes["kv_aligned"].first_failure
    assert (first.layer, first.tensor) == (0, "mlp_out")
    return first


def test_a_new_fault_is_found_and_its_cause_is_named_once_it_can_be(planted, tmp_path, monkeypatch):
    before = found(planted, tmp_path)
    assert before.diagnosis is None and "suspects" in before.root_cause
    cause = executed(CAUSE, "causes")["CAUSE"]
    monkeypatch.setitem(CAUSES, cause.name, cause)
    family = executed(HYPOTHESIS, "hypotheses.base")["mlp_scale"]
    monkeypatch.setattr(explain, "HYPOTHESES", (*HYPOTHESES, family))
    after = found(planted, tmp_path)
    assert after.diagnosis.cause == "mlp_scale"
    assert after.diagnosis.parameters["factor"] == pytest.approx(1.05, rel=cause.tolerance)
    assert "the MLP's result × 1.05" in after.root_cause


def test_the_places_that_the_page_names_exist():
    for path in set(re.findall(r"`((?:src|tests|tools|engines|include)/[\w./]*)`", PAGE)):
        if path != "src/driftprobe/engines/toy.py":
            assert (ROOT / path).exists() or (ROOT / "src/driftprobe" / path).exists(), path
    for name, file in (("_PASSED_ON", "gates"), ("_SUMS_OF", "gates"), ("_SPREADS", "local"),
                       ("_layer_hooks", "engines/hf/spy")):  # fmt: skip
        assert f"`{name}`" in PAGE
        assert name in (ROOT / f"src/driftprobe/{file}.py").read_text(encoding="utf-8")
