"""The artifacts folder: nothing of anybody else's is touched, nothing of ours is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from driftprobe.artifacts import check_place, place_of, staged, write_reports
from driftprobe.errors import EngineError, OutputError, UsageError


def test_an_earlier_run_may_be_replaced_and_other_files_may_not(tmp_path: Path) -> None:
    for name in ("run/a.log", "traces/a.jsonl", "traces/payloads/a.P.safetensors", "verdict.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    check_place(tmp_path)
    (tmp_path / "traces" / "notes.md").write_text("x")
    with pytest.raises(OutputError, match=r"traces/notes\.md"):
        check_place(tmp_path)


def test_a_link_is_a_stranger(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "traces").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError):
        check_place(tmp_path / "root")


def test_a_clean_end_replaces_and_an_error_does_not(tmp_path: Path) -> None:
    root = tmp_path / "run"
    write_reports(root, {"verdict.json": "old"})
    with pytest.raises(UsageError), staged(root) as stage:
        write_reports(stage.root, {"verdict.json": "new"})
        raise UsageError("x", where="x", measured="x", allowed="x", next_step="x")
    assert (root / "verdict.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    with staged(root) as stage:
        write_reports(stage.root, {"verdict.json": "new"})
    assert (root / "verdict.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_engine_failure_keeps_what_was_captured(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with pytest.raises(EngineError), staged(root) as stage:
        write_reports(stage.root, {"verdict.json": "half"})
        raise EngineError("x", where="x", measured="x", allowed="x", next_step="x")
    assert not root.exists()
    assert (tmp_path / ".run.partial" / "verdict.json").read_text() == "half"


@pytest.mark.parametrize("part", ["..", ".", "", "a/b", "a\\b", "-x", "a\n", "é" * 3, "x" * 101])
def test_date_and_name_cannot_lead_elsewhere(part: str) -> None:
    with pytest.raises(UsageError):
        place_of(Path("artifacts"), part, "name")
    with pytest.raises(UsageError):
        place_of(Path("artifacts"), "2026-02-07", part)
