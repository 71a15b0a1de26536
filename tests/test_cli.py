"""The command line as a user meets it: exit codes, messages, what stands on the disk afterwards."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

REPORTS = {"report.html", "B3_66_V2_FINAL_REPORT.md", "B3_66_V2_ANALYSIS.md", "B3_66_V2_ANALYSIS.tsv", "verdict.json"}
PARTS = ("error:", "where:", "measured:", "allowed:", "next:")
ONE_PROMPT = ("--prompts", "p0_short", "--date", "2026-02-07")
QUICK = (*ONE_PROMPT, "--ladder", "off")


def driftprobe(*arguments: object, cwd: Path, **extra: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    code = "from driftprobe.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd, text=True, capture_output=True, timeout=300, check=False, **extra,  # type: ignore[call-overload]
    )  # fmt: skip


def assert_five_parts(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Exit code, the five parts in order, the given words, and nothing of Python's own."""
    assert done.returncode == code, done.stderr + done.stdout
    places = [done.stderr.find(part) for part in PARTS]
    assert -1 not in places and places == sorted(places), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of both modes; returns the folder it was started in."""
    place = tmp_path_factory.mktemp("finished")
    done = driftprobe("run", *ONE_PROMPT, cwd=place)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run's artifacts folder, to be broken."""
    return Path(shutil.copytree(finished / "artifacts/2026-02-07/b3_66_v2", tmp_path / "b3_66_v2"))


def test_run_writes_everything_the_report_names(finished: Path) -> None:
    root = finished / "artifacts/2026-02-07/b3_66_v2"
    assert {p.name for p in root.iterdir()} == REPORTS | {"run", "traces"}
    assert {p.name for p in (root / "run").iterdir()} == {
        f"p0_short_{mode}{rung}.log" for mode in ("as_designed", "kv_aligned") for rung in ("", "_float64")
    }
    verdict = json.loads((root / "verdict.json").read_text())
    assert verdict["verdict"] == "STRUCTURAL_DRIFT"
    assert [verdict["modes"][m]["status"] for m in ("as_designed", "kv_aligned")] == ["COMPLETE", "COMPLETE"]
    report = (root / "B3_66_V2_FINAL_REPORT.md").read_text()
    assert "TBD" not in report and "PENDING" not in report


def test_report_is_rebuilt_byte_for_byte_elsewhere(copied: Path) -> None:
    before = {name: (copied / name).read_bytes() for name in REPORTS}
    for name in REPORTS:
        (copied / name).unlink()
    assert driftprobe("report", copied, cwd=copied.parent).returncode == 0
    assert {name: (copied / name).read_bytes() for name in REPORTS} == before


def test_analyze_accepts_the_run_and_its_traces_folder(copied: Path) -> None:
    for folder in (copied, copied / "traces"):
        done = driftprobe("analyze", folder, cwd=copied.parent)
        assert done.returncode == 0 and "STRUCTURAL_DRIFT" in done.stdout, done.stderr


def test_analyze_keeps_to_one_mode(copied: Path) -> None:
    done = driftprobe("analyze", copied, "--mode", "kv_aligned", cwd=copied.parent)
    assert "kv_aligned" in done.stdout and "as_designed" not in done.stdout


def test_validate_passes_what_we_wrote(copied: Path) -> None:
    done = driftprobe("validate", copied, cwd=copied.parent)
    assert done.returncode == 0 and "0 problems" in done.stdout, done.stdout


def test_one_mode_leaves_the_other_pending_and_the_next_run_fills_it(tmp_path: Path) -> None:
    root = tmp_path / "artifacts/2026-02-07/b3_66_v2"
    assert driftprobe("run", *QUICK, "--mode", "as_designed", cwd=tmp_path).returncode == 0
    first = (root / "B3_66_V2_FINAL_REPORT.md").read_text()
    assert "PENDING" in first and "--mode kv_aligned" in first
    assert driftprobe("run", *QUICK, "--mode", "kv_aligned", cwd=tmp_path).returncode == 0
    second = (root / "B3_66_V2_FINAL_REPORT.md").read_text()
    assert "PENDING" not in second and "TBD" not in second


def test_modes_of_different_prompts_are_not_one_run(tmp_path: Path) -> None:
    root = tmp_path / "artifacts/2026-02-07/b3_66_v2"
    assert driftprobe("run", *QUICK, "--mode", "as_designed", cwd=tmp_path).returncode == 0
    other = ("--prompt", "hello", "--date", "2026-02-07", "--mode", "kv_aligned", "--ladder", "off")
    assert driftprobe("run", *other, cwd=tmp_path).returncode == 0
    names = {p.name for p in (root / "traces").glob("*.jsonl")}
    assert names == {"prompt_kv_aligned.jsonl"}
    assert "PENDING" in (root / "B3_66_V2_FINAL_REPORT.md").read_text()


def test_mismatch_exits_with_one_and_names_the_tap(tmp_path: Path) -> None:
    done = driftprobe("run", *QUICK, "--fault", "rope_plus_one", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "layer 0 q_rope" in done.stdout and "root cause" in done.stdout


def test_not_aligned_exits_with_three(tmp_path: Path) -> None:
    done = driftprobe("run", *QUICK, "--fault", "wrong_token", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "embed" in done.stdout


def test_own_prompts_from_text_and_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.toml").write_text('greeting = "Hello"\nids = [72, 105, 33]\n')
    done = driftprobe("run", "--prompt", "one", "--prompt-file", "prompts.toml", "--mode", "as_designed",
                      "--date", "d", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "artifacts/d/b3_66_v2/traces").glob("*.jsonl")}
    assert names == {
        f"{name}_as_designed{rung}.jsonl" for name in ("prompt", "greeting", "ids") for rung in ("", "_float64")
    }


def test_no_colour_and_no_progress_in_a_pipe(tmp_path: Path) -> None:
    done = driftprobe("run", *QUICK, cwd=tmp_path)
    assert "\x1b" not in done.stdout and done.stderr == ""


BAD_OPTIONS = [
    (("--model", "nowhere"), "no such model folder"),
    (("--dtype", "float7"), "unknown dtype"),
    (("--attn", "flash9"), "unknown attention kernel"),
    (("--mode", "sideways"), "unknown mode"),
    (("--prompts", "p9"), "unknown prompt"),
    (("--fault", "gremlin"), "unknown fault"),
    (("--layers", "0,99"), "unknown layer"),
    (("--layers", "two"), "unknown layer"),
    (("--steps", "0"), "too few steps"),
    (("--payload", "some"), "unknown payload"),
    (("--engine", "abacus"), "unknown engine"),
    (("--prompt", ""), "empty prompt"),
    (("--prompt", "x" * 2048), "prompt too long"),
    (("--prompt-file", "missing.json"), "prompt file"),
    (("--seed", "99999999999999999999"), "seed out of range"),
    (("--date", "../up"), "not a folder name"),
    (("--name", "a/b"), "not a folder name"),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_bad_option_says_five_things_and_touches_nothing(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    assert_five_parts(driftprobe("run", *options, cwd=tmp_path), 2, words)
    assert not list(tmp_path.rglob("*.jsonl")) and not list(tmp_path.rglob("*.md"))


def model_folder(tmp_path: Path) -> Path:
    """A copy of the built-in model's folder."""
    import driftprobe

    source = Path(driftprobe.__file__).parent / "models" / "tiny"
    return Path(shutil.copytree(source, tmp_path / "model"))


def test_folder_without_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_five_parts(driftprobe("run", "--model", folder, cwd=tmp_path), 2, "no weights", "pytorch_model.bin")


def test_folder_with_half_the_weights(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = model_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(dict(sorted(weights.items())[:10]), folder / "model.safetensors", metadata={"format": "pt"})
    assert_five_parts(driftprobe("run", "--model", folder, cwd=tmp_path), 2, "weights are missing")


def test_folder_with_a_cut_weights_file(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    assert_five_parts(driftprobe("run", "--model", folder, cwd=tmp_path), 2, "cannot be loaded")


def test_tokenizer_missing_says_so_and_token_ids_still_work(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert_five_parts(driftprobe("run", "--model", folder, cwd=tmp_path), 2, "tokenizer missing")
    (tmp_path / "ids.json").write_text('{"ids": [1, 2, 3]}')
    done = driftprobe("run", "--model", folder, "--prompt-file", "ids.json", "--mode", "as_designed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_other_files_in_the_output_folder_are_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "artifacts/2026-02-07/b3_66_v2"
    root.mkdir(parents=True)
    (root / "thesis.txt").write_text("mine")
    assert_five_parts(driftprobe("run", *QUICK, cwd=tmp_path), 2, "other files", "thesis.txt")
    assert [p.name for p in root.iterdir()] == ["thesis.txt"]


def test_output_place_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("a file")
    assert_five_parts(driftprobe("run", *QUICK, cwd=tmp_path), 2, "cannot write the output")


def test_a_full_disk_leaves_the_earlier_run_as_it_was(copied: Path) -> None:
    """A file-size limit stands in for a full disk: the write fails in the middle of a trace."""
    place = copied.parent / "out" / "2026-02-07"
    place.mkdir(parents=True)
    shutil.move(str(copied), place / "b3_66_v2")
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    done = driftprobe(
        "run", *QUICK, "--out", "out", cwd=place.parent.parent,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert_five_parts(done, 2, "cannot write")
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere; the file-size test covers a failing write")
def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert_five_parts(driftprobe("run", *QUICK, cwd=tmp_path), 2, "cannot write the output")


def break_trace(folder: Path, change: object) -> None:
    """Apply a change to the lines of the first trace of a run."""
    path = sorted((folder / "traces").glob("*.jsonl"))[0]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))  # type: ignore[operator]


BROKEN = {
    "invalid JSON": lambda lines: [*lines[:3], "{oops\n", *lines[4:]],
    "duplicated key": lambda lines: [*lines[:3], lines[2], *lines[3:]],
    "unknown schema": lambda lines: [lines[0].replace("trace/1", "trace/99"), *lines[1:]],
    "not a number": lambda lines: [*lines[:2], lines[2].replace('"l2":', '"l2":NaN,"x":'), *lines[3:]],
    "leaves": lambda lines: [*lines[:2], lines[2].replace("}\n", ',"payload":"../../etc/passwd#x"}\n'), *lines[3:]],
}


@pytest.mark.parametrize("words", BROKEN)
def test_broken_trace_is_refused(words: str, copied: Path) -> None:
    break_trace(copied, BROKEN[words])
    for name in REPORTS:
        (copied / name).unlink()
    for command in ("analyze", "report"):
        assert_five_parts(driftprobe(command, copied, cwd=copied.parent), 2)
    assert not any((copied / name).exists() for name in REPORTS)
    checked = driftprobe("validate", copied, cwd=copied.parent)
    assert checked.returncode == 2 and "mend:" in checked.stdout


def test_truncated_trace_is_not_available(copied: Path) -> None:
    path = sorted((copied / "traces").glob("*.jsonl"))[0]
    path.write_bytes(path.read_bytes()[:-700])
    done = driftprobe("analyze", copied, cwd=copied.parent)
    assert done.returncode == 3 and "N/A" in done.stdout, done.stdout + done.stderr
    assert_five_parts(done, 3, "incomplete")


@pytest.mark.parametrize("make", ["missing", "empty"])
def test_no_traces(make: str, tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    if make == "empty":
        folder.mkdir()
    assert_five_parts(driftprobe("analyze", folder, cwd=tmp_path), 2)


def test_an_interrupt_leaves_valid_incomplete_traces_and_the_earlier_run(tmp_path: Path) -> None:
    root = tmp_path / "artifacts/2026-02-07/b3_66_v2"
    root.mkdir(parents=True)
    (root / "verdict.json").write_text("earlier")
    code = "from driftprobe.cli import main; main()"
    words = [sys.executable, "-c", code, "run", *QUICK, "--steps", "40"]
    running = subprocess.Popen(
        words, cwd=tmp_path, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (a background job ignores it)
    )  # fmt: skip
    trace = root.with_name(".b3_66_v2.partial") / "traces" / "p0_short_as_designed.jsonl"
    deadline = time.monotonic() + 60
    while not (trace.exists() and trace.stat().st_size > 100_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and "driftprobe analyze" in errors, errors
    again = (
        "to go on: `driftprobe run --prompts p0_short --date 2026-02-07 --ladder off --steps 40` runs all of it again"
    )
    assert again in errors and "until it is done nothing in artifacts/2026-02-07/b3_66_v2 changes" in errors
    done = driftprobe("analyze", trace.parent.parent, cwd=tmp_path)
    assert_five_parts(done, 3, "incomplete")
    assert (root / "verdict.json").read_text() == "earlier"


def test_a_crash_is_not_taken_for_a_bug_found(tmp_path: Path) -> None:
    code = (
        "import driftprobe.cli.taps as taps\nfrom driftprobe.cli import main\n"
        "def fail():\n    raise ZeroDivisionError('oops')\ntaps.command.callback = fail\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "taps"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert_five_parts(done, 3, "ZeroDivisionError: oops")


def test_lists(tmp_path: Path) -> None:
    names = driftprobe("faults", "--names", cwd=tmp_path).stdout.split()
    assert len(names) >= 10 and "rope_plus_one" in names
    assert "q_rope" in driftprobe("taps", cwd=tmp_path).stdout
    assert "ready" in driftprobe("engines", cwd=tmp_path).stdout


def test_help_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom driftprobe.cli import main\nsys.argv = ['driftprobe', 'analyze', '--help']\n"
        "try:\n    main()\nfinally:\n    sys.exit(10 if 'torch' in sys.modules or 'transformers' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_fault_is_told_with_what_must_be_found(tmp_path):
    told = driftprobe("faults", "attn_scale", cwd=tmp_path).stdout
    for words in ("1.05 1.01 1.001 times the scale", "MISMATCH", "layer 0 attn_scores", "score_scale: softmax scale"):
        assert words in told


def test_the_faults_are_listed_by_family(tmp_path):
    listed = driftprobe("faults", cwd=tmp_path).stdout
    assert listed.index("positions") < listed.index("rope_plus_one") < listed.index("cache contents")
    assert "None" not in listed


@pytest.mark.parametrize(
    ("arguments", "what", "measured"),
    [
        (("--fault", "rope_plus"), "unknown fault", "rope_plus_one"),
        (("--fault", "rope_reset", "--fault-strength", "3"), "this fault has no strength", "--fault-strength 3"),
        (("--fault-strength", "1.5"), "a strength of no fault", "1.5"),
        (("--fault", "attn_scale", "--fault-strength", "nan"), "a strength that is no finite number", "nan"),
        (("--boundaries", "--longest", "1"), "nothing to probe", "2 tokens or more"),
        (("--boundaries", "--longest", "-3"), "nothing to probe", "-3"),
        (("--self-test", "--fault", "rope_reset"), "the self-test does not have", "--fault"),
        (("--self-test", "--prompts", "p0_short", "--steps", "2"), "the self-test does not have", "--prompts, --steps"),
        (("--self-test", "--mode", "both", "--layers", "0"), "the self-test does not have", "--mode, --layers"),
        (("--self-test", "--prompt", "a", "--boundaries"), "the self-test does not have", "--prompt, --boundaries"),
        (("--self-test", "--prompt-file", "p.json"), "the self-test does not have", "--prompt-file"),
        (("--self-test", "--json", "--junit", "x.xml"), "the self-test does not have", "--json, --junit"),
    ],
)
def test_wrong_faults_and_lengths_say_so(tmp_path, arguments, what, measured):
    done = driftprobe("run", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert what in done.stderr
    assert measured in done.stderr
    assert not list(tmp_path.glob("artifacts/*/*")), "nothing is written for a wrong option"
