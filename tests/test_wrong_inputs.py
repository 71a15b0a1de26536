"""Wrong words on the command line: five parts whatever refuses them, at once, before anything is judged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from driftprobe import cli
from driftprobe.cli import compare, diff
from driftprobe.errors import UsageError
from driftprobe.judgement import Verdict
from report_traces import broken_from, prompt_trace
from test_output import driftprobe, raised
from test_pytest_plugin import write

PARTS = ("error:", "where:", "measured:", "allowed:", "next:")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A traces folder of one prompt, wrong from layer 1 q_rope on."""
    return write(tmp_path / "rope", prompt_trace("p0_short", "kv_aligned", broken_from(1, "q_rope")))


@pytest.mark.parametrize(
    ("words", "what", "where", "measured"),
    [
        ("run --stepz 4", "no such option '--stepz'", "driftprobe run", "run --stepz 4"),
        ("run --steps many", "invalid value for '--steps'", "driftprobe run", "run --steps many"),
        ("runn", "no such command 'runn'", "driftprobe", "runn"),
        ("diff one", "missing argument 'NEW'", "driftprobe diff", "diff one"),
        ("baseline save one two three", "got unexpected extra argument (three)", "driftprobe baseline save", "three"),
    ],
)
def test_what_the_parser_refuses_has_five_parts(words, what, where, measured, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["driftprobe", *words.split()])
    monkeypatch.setattr(cli, "_end_as_if_interrupted", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    places = [said.find(part) for part in PARTS]
    assert -1 not in places and places == sorted(places), said
    assert f"error: {what}" in said
    assert f"where:    {where}\n" in said
    assert measured in said
    assert said.endswith(f"next:     {where} --help\n")


@pytest.mark.parametrize("command", ["diff", "compare"])
@pytest.mark.parametrize("first", [True, False])
def test_a_folder_that_is_not_there_is_said_before_the_other_is_judged(command, first, folder, tmp_path, monkeypatch):
    def judged(*_: object, **__: object) -> None:
        pytest.fail("a run was judged before both paths were looked at")

    monkeypatch.setattr(diff, "analyze", judged)
    monkeypatch.setattr(compare, "compare", judged)
    paths = [folder, tmp_path / "nowhere"]
    error = raised(command, *(reversed(paths) if first else paths))
    assert (error.what, error.where) == ("no such folder", str(tmp_path / "nowhere"))


def test_a_verdict_names_the_page_that_explains_it(folder):
    assert "explained:       docs/reading-a-report.md\n" in driftprobe("analyze", folder).output
    for verdict, page in cli.show.EXPLAINED.items():
        assert verdict in {Verdict.MISMATCH, Verdict.NOT_AVAILABLE}
        file, _, heading = page.partition(", ")
        text = (Path(__file__).resolve().parents[1] / file).read_text(encoding="utf-8")
        assert not heading or f"## {heading.strip('“”')}".replace("N/A", "`N/A`") in text


def test_a_quiet_verdict_stays_one_line(folder):
    assert len(driftprobe("analyze", folder, "--quiet").output.splitlines()) == 1


def test_a_message_without_a_command_is_of_driftprobe_itself():
    import click

    error = cli._of_click(click.ClickException("Something else."))
    assert isinstance(error, UsageError)
    assert (error.what, error.where) == ("something else", "driftprobe")
