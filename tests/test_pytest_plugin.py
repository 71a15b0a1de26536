"""The pytest plugin in test suites of its own: what fails, what it prints, what is accepted and what no longer is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from driftprobe.accepted import read_accepted
from driftprobe.errors import UsageError
from driftprobe.expect import NotEquivalentError, assert_equivalent
from driftprobe.pytest_plugin import folder_name
from driftprobe.trace import Trace
from driftprobe.trace_file import TraceWriter
from make_trace import assert_five_parts
from report_traces import broken_from, prompt_trace, same

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[1]
INSTALLED = any(found.name == "driftprobe" for found in entry_points(group="pytest11"))
PLUGIN = () if INSTALLED else ("-p", "driftprobe.pytest_plugin")
"""The checkout may be on the path without having been installed since the plugin's entry point is there."""
STAND_IN = """
import inspect

import driftprobe.api

KNOWN = inspect.signature(driftprobe.api.probe)

def probe(model, prompts=None, *, mode="both", **options):
    KNOWN.bind(model, prompts, mode=mode, **options)
    assert mode in ("both", "kv_aligned"), mode
    return driftprobe.api.analyze(model)

driftprobe.api.probe = probe
"""
"""A conftest that judges a folder of traces in place of running a model: no torch, and a finding of our choice."""


def write(folder: Path, *traces: Trace) -> Path:
    for trace in traces:
        with TraceWriter(folder / trace.path, trace.header) as writer:
            for record in trace.records:
                writer.record(record)
            for event in trace.events:
                writer.event(event)
    return folder


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A suite with traces `clean`, `rope` (wrong from layer 1 q_rope on) and `values` (from layer 0 v_proj on)."""
    pytester.makeconftest(STAND_IN)
    pytester.makeini("[pytest]\naddopts = --strict-markers\n")
    for name, change in {"clean": same, "rope": broken_from(1, "q_rope"), "values": broken_from(0, "v_proj")}.items():
        write(pytester.path / name, prompt_trace("p0_short", "kv_aligned", change))
    return pytester


def ran(suite: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return suite.runpytest_subprocess(*PLUGIN, "-p", "no:cacheprovider", *arguments)


def test_a_mismatch_prints_verdict_first_failure_cause_and_report(suite):
    suite.makepyfile(test_model="import driftprobe\ndef test_it():\n    driftprobe.assert_equivalent('rope')\n")
    done = ran(suite)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines([
        "*driftprobe: MISMATCH: prefill and decode do not agree",
        "*first failure:  layer 1 q_rope (prompt p0_short, step 0): drift 1.00e-02, floor *, ×*",
        "*cause:*layer 1 q_rope*",
        "*report:*FINAL_REPORT.md",
        "*next:*--driftprobe-accept test_model.py::test_it --driftprobe-reason WHY",
    ])  # fmt: skip
    report = next(line.split("report:")[1].strip() for line in done.outlines if "report:" in line)
    assert "MISMATCH" in Path(report).read_text(encoding="utf-8")
    assert Path(report).parent == suite.path / "artifacts/driftprobe" / folder_name("test_model.py::test_it")


def test_what_cannot_be_told_fails(suite):
    path = suite.path / "clean" / "p0_short_kv_aligned.jsonl"
    path.write_bytes(path.read_bytes()[:-500])
    suite.makepyfile("import driftprobe\ndef test_it():\n    driftprobe.assert_equivalent('clean')\n")
    done = ran(suite, "--driftprobe-accept", "test_what_cannot_be_told_fails.py::test_it", "--driftprobe-reason", "x")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*driftprobe: N/A:*", "*nothing to accept: *::test_it is N/A*"])
    assert not (suite.path / "driftprobe-accepted.toml").exists()


MARKED = """
import pytest

def model():
    return "values"

@pytest.mark.driftprobe(model="clean", modes=["kv_aligned"])
def test_good(driftprobe):
    assert [result.verdict.value for result in driftprobe.results] == ["NO_DRIFT"]

@pytest.mark.driftprobe(model=model)
def test_bad():
    raise AssertionError("the body runs only after the check")

def test_two(driftprobe):
    driftprobe.assert_equivalent("clean")
    driftprobe.assert_equivalent("clean")
    driftprobe.assert_equivalent("clean", name="third")

@pytest.mark.driftprobe("clean")
def test_without_a_name():
    pass
"""


def test_marks_and_the_fixture_below_a_folder_of_choice(suite):
    suite.makepyfile(test_marks=MARKED)
    done = ran(suite, "--driftprobe-dir", "out/of it")
    done.assert_outcomes(passed=2, failed=2)
    done.stdout.fnmatch_lines(["*first failure:  layer 0 v_proj*", "*takes names alone*"])
    done.stdout.no_fnmatch_line("*the body runs only after*")
    checks = ("test_marks.py::test_good", "test_marks.py::test_bad", "test_marks.py::test_two",
              "test_marks.py::test_two#2", "third")  # fmt: skip
    assert {p.name for p in (suite.path / "out/of it").iterdir()} == set(map(folder_name, checks))


SUITE = """
import driftprobe
import pytest

@pytest.mark.parametrize("which", ["clean", "rope", "values"])
def test_it(which):
    driftprobe.assert_equivalent(which)
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_a_mismatch_is_accepted_by_name_with_a_reason(suite, workers):
    if workers:
        pytest.importorskip("xdist")
    suite.makepyfile(test_model=SUITE)
    name = "test_model.py::test_it[rope]"
    done = ran(suite, *workers, "--driftprobe-accept", name, "--driftprobe-reason", 'upstream "42"\n# not a comment')
    done.assert_outcomes(passed=2, failed=1)
    done.stdout.fnmatch_lines([f"accepted from now on, in driftprobe-accepted.toml: {name.replace('[', '[[]')}*"])
    entry = read_accepted(suite.path / "driftprobe-accepted.toml")[name]
    assert entry.reason == 'upstream "42"\n# not a comment'
    assert (entry.finding.verdict, entry.finding.first_tap) == ("MISMATCH", "layer 1 q_rope")
    again = ran(suite, *workers)
    again.assert_outcomes(passed=2, failed=1)
    again.stdout.fnmatch_lines(['accepted: *rope*layer 1 q_rope*upstream "42"*'])


def test_another_mismatch_is_not_accepted_and_one_that_is_gone_is_told(suite):
    suite.makepyfile(test_model=SUITE)
    name = "test_model.py::test_it[rope]"
    ran(suite, "--driftprobe-accept", name, "--driftprobe-reason", "known").assert_outcomes(passed=2, failed=1)
    shutil.rmtree(suite.path / "rope")
    write(suite.path / "rope", prompt_trace("p0_short", "kv_aligned", broken_from(1, "v_proj")))
    other = ran(suite, "-k", "rope")
    other.assert_outcomes(failed=1)
    other.stdout.fnmatch_lines(["*accepted was:   MISMATCH, layer 1 q_rope*known*another one",
                                "*once the old entry is removed"])  # fmt: skip
    shutil.rmtree(suite.path / "rope")
    shutil.copytree(suite.path / "clean", suite.path / "rope")
    gone = ran(suite)
    gone.assert_outcomes(passed=2, failed=1)
    gone.stdout.fnmatch_lines(["no longer happens: *rope*MISMATCH, layer 1 q_rope*; now NO_DRIFT; remove its entry*"])


def test_an_acceptance_needs_a_reason_and_a_check(suite):
    suite.makepyfile("def test_it():\n    pass\n")
    assert ran(suite, "--driftprobe-accept", "x").ret == pytest.ExitCode.USAGE_ERROR
    done = ran(suite, "--driftprobe-accept", "x", "--driftprobe-reason", "y")
    done.stdout.fnmatch_lines(["nothing to accept: no check of this run is called x"])


BAD_FILES = {
    "not TOML": "[[accepted]",
    "another key": 'version = 1\n[[accepted]]\nname = "a"\n',
    "a missing field": '[[accepted]]\nname = "a"\nreason = "b"\nverdict = "MISMATCH"\n',
    "a number": '[[accepted]]\nname = "a"\nreason = 3\nverdict = "MISMATCH"\nfirst_tap = ""\ncause = ""\n',
    "no reason": '[[accepted]]\nname = "a"\nreason = " "\nverdict = "MISMATCH"\nfirst_tap = ""\ncause = ""\n',
    "another verdict": '[[accepted]]\nname = "a"\nreason = "b"\nverdict = "N/A"\nfirst_tap = ""\ncause = ""\n',
    "twice": '[[accepted]]\nname = "a"\nreason = "b"\nverdict = "MISMATCH"\nfirst_tap = ""\ncause = ""\n' * 2,
    "too long": "# " + "x" * (1 << 20),
    "nested": "a = " + "[" * 5000,
}


@pytest.mark.parametrize("text", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_of_accepted_mismatches_that_says_something_else_is_refused(text, tmp_path):
    path = tmp_path / "accepted.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_accepted(path)
    assert_five_parts(caught.value, what="accepted", where="accepted.toml")


def test_outside_of_a_session_the_report_of_a_failure_is_kept(tmp_path, monkeypatch):
    import driftprobe.api

    write(tmp_path / "rope", prompt_trace("p0_short", "kv_aligned", broken_from(1, "q_rope")))
    monkeypatch.setattr("driftprobe.api.probe", lambda model, prompts, **_: driftprobe.api.analyze(model))
    monkeypatch.setattr("driftprobe.expect._Running.session", None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(NotEquivalentError, match="first failure:  layer 1 q_rope") as caught:
        assert_equivalent(tmp_path / "rope", modes=["as_designed", "kv_aligned"])
    assert "read the report" in str(caught.value)
    assert [p.name for p in tmp_path.glob("driftprobe-*/*.md")]
    with pytest.raises(UsageError, match="no mode to run"):
        assert_equivalent("anything", modes=[])


def test_the_plugin_costs_nothing_at_import():
    code = (
        "import sys; import driftprobe.pytest_plugin; "
        "print(*sorted({'numpy', 'msgspec', 'torch', 'rich', 'safetensors', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_found_and_no_other():
    import driftprobe

    for name in driftprobe.__all__:
        assert getattr(driftprobe, name) is not None
        assert name in dir(driftprobe)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = driftprobe.nothing


def test_the_sample_project_runs(pytester: pytest.Pytester):
    pytest.importorskip("transformers")
    shutil.copytree(ROOT / "examples/pytest_project", pytester.path, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("artifacts", "__pycache__"))  # fmt: skip
    done = ran(pytester, "-o", "addopts=--strict-markers")
    done.assert_outcomes(passed=5)
    done.stdout.fnmatch_lines(["accepted: tests/test_decode.py::test_a_known_bug: MISMATCH, layer 0 q_rope, rope_*"])


@pytest.mark.parametrize("check", ["a/b.py::t[1]", "a-b.py::t-1-", "../../etc", "x" * 400, "…", "\ud800"])
def test_every_check_has_a_plain_folder_of_its_own(check):
    assert Path(folder_name(check)).name == folder_name(check) and len(folder_name(check)) < 100
    assert folder_name(check).isascii() and not folder_name(check).startswith((".", "-"))
    assert folder_name(check) != folder_name(check + " ")
