"""README is executed: its commands run, its example says what it says, its figures are printed by their command."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    parts = re.split(r"^```(\w*)\n", README, flags=re.MULTILINE)
    fences = list(zip(parts[1::2], parts[2::2], strict=True))
    return [body for name, body in fences[::2] if name == language]  # every other fence closes a block


def command_lines() -> list[str]:
    """Every driftprobe command in the README, comments cut."""
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    own = [line for line in lines if line.startswith("driftprobe")]
    return [line for line in own if "--host" not in line and "mine.toml" not in line]  # what the reader alone has


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's reader has: a model, a prompt file, and a run in artifacts/DATE/NAME."""
    import driftprobe

    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(Path(driftprobe.__file__).parent / "models" / "tiny", folder / "my-llama")
    (folder / "prompts.toml").write_text('greeting = "Hello"\nids = [72, 105]\n')
    driftprobe.probe("builtin:tiny", {"p0_short": "Hi"}, out=folder / "artifacts" / "DATE" / "NAME")
    return folder


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run one documented line as a shell would, `driftprobe` being this checkout's."""
    function = f"driftprobe() {{ {sys.executable} -c 'from driftprobe.cli import main; main()' \"$@\"; }}; "
    return subprocess.run(
        ["bash", "-c", function + line], cwd=cwd, text=True, capture_output=True, timeout=300, check=False
    )


@pytest.mark.parametrize("line", command_lines())
def test_command_runs(line: str, place: Path) -> None:
    done = shell(line, place)
    expected = 1 if "--fault" in line else 0
    assert done.returncode == expected, done.stdout + done.stderr


def test_the_worked_example_is_what_the_command_prints(place: Path) -> None:
    done = shell("driftprobe run --fault cache_shift --name example", place)
    example = next(block for block in blocks("") if "root cause" in block)
    printed = " ".join(done.stdout.split())
    for sentence in re.split(r"\n(?=\S)|\n(?=  \S)", example.strip()):
        assert " ".join(sentence.split()) in printed, done.stdout


def test_python_example_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.chdir(place)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(place / "my-llama"))
    exec(compile(blocks("python")[0], "README.md", "exec"), {"model": model})
    assert (place / "artifacts" / "mine" / "B3_66_V2_FINAL_REPORT.md").is_file()


def test_the_real_fault_is_found_as_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    if int(transformers.__version__.split(".", maxsplit=1)[0]) < 5:
        pytest.skip("the example's configuration is that of transformers 5")
    code = next(block for block in blocks("python") if "dynamic" in block)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == blocks("text")[0]


def test_the_model_figures_are_printed_by_their_command() -> None:
    done = subprocess.run(
        [sys.executable, "tools/train_tiny.py", "--evaluate"], cwd=ROOT, text=True, capture_output=True, check=True
    )
    printed = dict(re.findall(r"bits per byte, (\w+):\s+([\d.]+)", done.stdout))
    for name in ("uniform", "unigram", "model"):
        assert printed[name] in README, done.stdout


def test_the_seed_entry_points(place: Path) -> None:
    script = ROOT / "tools" / "benchmarks"
    run = f"PATH={place}:$PATH; {script}/run_b3_66_mi300x.sh"
    (place / "driftprobe").write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from driftprobe.cli import main; main()' \"$@\"\n"
    )
    (place / "driftprobe").chmod(0o755)
    done = shell(f"{run} local 2026-02-07 kv_aligned --prompts p0_short", place)
    assert done.returncode == 0, done.stdout + done.stderr
    traces = place / "artifacts/2026-02-07/b3_66_v2/traces"
    analyzer = f"{sys.executable} {script}/analyze_b3_66_prefill_decode_drift.py"
    done = shell(f"{analyzer} --traces-dir {traces} --mode kv_aligned --output out.md", place)
    assert done.returncode == 0 and (place / "out.md").is_file() and (place / "out.tsv").is_file(), done.stderr
    done = shell(f"{run} 129.212.184.200 2026-02-07 kv_aligned --dry-run", place)
    assert done.returncode == 0 and "--host" not in done.stdout and "129.212.184.200" in done.stdout, done.stderr
