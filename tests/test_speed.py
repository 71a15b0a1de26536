"""`make bench`: what its ratios are made of, and that CI's quick form fails on a gross regression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.speed import __main__ as bench
from benchmarks.speed import quick
from benchmarks.speed.figures import Ratio, in_turn
from benchmarks.speed.report import render


def test_a_machine_that_slows_down_slows_both_sides() -> None:
    clock = iter(range(1, 1000))
    found = in_turn(lambda: float(next(clock)), {"twice": lambda: 2.0 * next(clock)}, 5)["twice"]
    assert found.quotients == (2.0,) * 5


def test_the_first_round_does_not_count() -> None:
    times = iter([9.0, 2.0, 2.0, 2.0])
    assert in_turn(lambda: 1.0, {"x": lambda: next(times)}, 3)["x"].quotients == (2.0, 2.0, 2.0)


def test_a_ratio_is_told_with_its_spread() -> None:
    ratio = Ratio((1.0, 1.1, 1.2, 1.3, 1.4), 0.5)
    assert (ratio.median, str(ratio)) == (1.2, "1.20 (1.10–1.30)")
    assert ratio.as_json()["base_seconds"] == 0.5


def test_ci_fails_on_a_gross_regression_and_not_on_what_is_usual() -> None:
    usual = dict.fromkeys(quick.LIMITS, 0.1)
    assert quick.judge(usual) == []
    for name, limit in quick.LIMITS.items():
        assert quick.judge(usual | {name: 2 * limit}) == [f"{name}: {2 * limit:.2f}, at most {limit:g}"]
        assert quick.judge(usual | {name: float("nan")})


def found_in_one_part(ratio: float) -> dict[str, Any]:
    told = {"median": ratio, "low": ratio, "high": ratio, "repetitions": 3, "base_seconds": 0.04}
    off_and_on = {"scores off": told, "scores on": told}
    both = {"prefill": off_and_on, "decode": off_and_on}
    here = {"cpu": "c", "cores": 2, "load": 0.1, "python": "3", "torch": "2", "transformers": "5", "date": "d"}
    return {"capture": {"machine": here, "seconds": 9, "found": {"float32": both, "bfloat16": both}}}


def test_the_page_tells_what_was_measured_and_what_was_not_and_the_reason_of_a_target_that_is_missed() -> None:
    page = render(found_in_one_part(1.01))
    assert "| float32 decode, scores off | ≤ 1.12 | 1.010 | yes |" in page
    assert "Not measured yet: `python -m benchmarks.speed --only scale`." in page
    assert "processor time" not in page
    slow = found_in_one_part(1.5)
    assert "| float32 decode, scores off | ≤ 1.12 | 1.500 | no |" in render(slow)
    assert "its profile is not measured yet" in render(slow)
    assert (
        "float32 decode, scores off; float32 decode, scores on; bfloat16 decode, scores off**: its profile"
        in render(slow)
    )
    shares = {"model": 40.0, "hooks": 2.5, "begun": 6.1, "written": 1.4}
    slow["breakdown"] = {**slow["capture"], "found": shares}
    assert "own thread, 2.5 ms" in render(slow)


def test_ten_million_records_are_held_to_the_rate_of_one() -> None:
    part = found_in_one_part(1.0)["capture"]
    judged = [{"container": "JSONL", "records": 10**n, "wall": wall, "peak": 100.0 * n}
              for n, wall in ((6, 1.0), (7, 14.0), (8, 999.0))]  # fmt: skip
    page = render({"scale": {**part, "found": {"table": "| |", "figures": judged}}})
    assert "| 10 M records, JSONL: rate ÷ that of 1 M | ≥ 0.8 | 0.714 | no |" in page
    assert "| 10 M records, JSONL: MB at most | ≤ 700 | 700 | yes |" in page


def test_a_part_that_is_measured_anew_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = found_in_one_part(1.01)
    (tmp_path / "performance.json").write_text(json.dumps(before), encoding="utf-8")
    row = {"dtype": "float32", "elements": 1 << 20, "fingerprint_gb_s": 9.0, "reading_gb_s": 10.0, "share": 0.9}
    monkeypatch.setattr(bench, "fingerprints", lambda: [row])
    monkeypatch.setattr("sys.argv", ["speed", "--only", "fingerprint", "--out", str(tmp_path)])
    bench.main()
    known = json.loads((tmp_path / "performance.json").read_text(encoding="utf-8"))
    assert known["capture"] == before["capture"]
    assert known["fingerprint"]["found"] == [row]
    assert "| float32, 1 Mi | ≥ 0.3 | 0.900 | yes |" in (tmp_path / "performance.md").read_text(encoding="utf-8")
