"""include/driftprobe.h: the traces that it writes are read, and what the format forbids is refused, in words."""

from __future__ import annotations

import ctypes as c
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from driftprobe.fingerprint import fingerprint, row_hashes
from driftprobe.payload import Payloads
from driftprobe.taps import TAPS, Scope
from driftprobe.trace import CONSTANTS, Trace
from driftprobe.trace_file import read_trace
from driftprobe.validate import validate
from native_header import (
    BAD_ARGUMENT,
    DUPLICATE,
    INCLUDE,
    NONE,
    NOT_WRITTEN,
    OK,
    ROOT,
    Count,
    Header,
    Key,
    compiler,
    library,
    tensor,
)  # fmt: skip


@pytest.fixture(scope="session")
def header(tmp_path_factory):
    return library(tmp_path_factory.getbasetemp())


class Written:
    """A trace that C writes, its calls short."""

    def __init__(self, made: c.CDLL, path: Path, **fields: object) -> None:
        self.made, self.path, self.trace = made, path, c.c_void_p()
        head: Header = made.dp_default_header(b"p0", b"as_designed")
        for name, value in fields.items():
            setattr(head, name, value)
        self.status = made.dp_open(c.byref(self.trace), os.fsencode(path), c.byref(head))

    def write(self, array: np.ndarray, tap: bytes = b"q_proj", layer: int = 0, **fields: object) -> int:
        key: Key = self.made.dp_make_key(b"P", b"prefill_last", 0, layer, tap)
        for name, value in fields.items():
            setattr(key, name, value)
        return int(self.made.dp_write(self.trace, c.byref(key), c.byref(tensor(array))))

    def close(self) -> int:
        return int(self.made.dp_close(self.trace))

    @property
    def message(self) -> str:
        return str(self.made.dp_message(self.trace).decode())


ROW = np.arange(-5, 7, dtype=np.float32).reshape(1, 3, 4)


def test_a_trace_written_in_c_reads_as_one_written_in_python(header, tmp_path):
    made = Written(header, tmp_path / "p0_as_designed.jsonl", engine=b"mine", layers=2, payloads=1,
                   prompt_text="grüße \"an\" \\ \n alle".encode())  # fmt: skip
    cache = np.random.default_rng(1).normal(size=(5, 2, 4)).astype(np.float16)
    logits = np.array([[0.5, 3.0, -1.0, 3.0]], dtype=np.float32)
    assert made.write(ROW, token_id=7, position=4, pos_id=4, recomputed=1) == OK
    assert made.write(cache, b"k_cache", position=4, row_start=2) == OK
    assert made.write(logits, b"logits", NONE, position=4) == OK
    weight = np.ones((2, 3), np.float32)
    assert header.dp_constant(made.trace, 0, b"q_proj.weight", c.byref(tensor(weight))) == OK
    counts = (Count * 2)(Count(b"rows", 12), Count(b"different", 0))
    assert header.dp_event(made.trace, b"cache_readback", b"A", 0, counts, 2) == OK
    assert made.close() == OK

    trace = read_trace(made.path)
    assert trace.damage == ""
    assert (trace.header.engine.name, trace.header.prompt_text) == ("mine", 'grüße "an" \\ \n alle')
    q, k, out, constant = trace.records
    ours = fingerprint(ROW)
    assert (q.hash, q.shape, q.sketch, q.dtype) == (ours.hash, ours.shape, ours.sketch, "float32")
    assert (q.token_id, q.logical_tok_idx, q.pos_id, q.source) == (7, 4, 4, "recomputed")
    assert (k.rows, k.row_start) == (row_hashes(cache), 2)
    assert out.top is not None
    assert out.top.ids == (1, 3, 0, 2)
    assert out.top.logsumexp == pytest.approx(float(np.log(np.exp(logits.astype(np.float64)).sum())), rel=1e-14)
    assert (constant.arm, constant.tensor) == (CONSTANTS, "q_proj.weight")
    payloads = Payloads(tmp_path)
    for record, array in zip(trace.records, (ROW, cache, logits, weight), strict=True):
        kept = payloads.get(record)
        assert kept is not None
        assert np.array_equal(kept, array)
    assert trace.events[0].measured == {"rows": 12, "different": 0}
    assert not (tmp_path / "payloads/p0_as_designed.part").exists()


def test_numbers_read_back_to_the_same_bits(header, tmp_path):
    made = Written(header, tmp_path / "t.jsonl")
    array = np.array([0.1, 1e-310, 1 / 3, 2**60 + 0.5])
    made.write(array)
    made.close()
    assert read_trace(made.path).records[0].sketch == fingerprint(array).sketch


def test_what_the_format_forbids_is_refused_in_words_and_nothing_is_lost(header, tmp_path):
    made = Written(header, tmp_path / "t.jsonl")
    assert made.write(ROW) == OK
    assert made.write(ROW) == DUPLICATE
    assert "second record" in made.message
    for fields, word in (
        ({"arm": b""}, "empty"),
        ({"phase": b"\xff"}, "UTF-8"),
        ({"phase": b"decode3"}, "decodeK"),
        ({"tap": b"logits"}, "outside the layers"),
        ({"layer": NONE}, "stands in a layer"),
        ({"layer": -1}, "negative layer"),
        ({"step": -1}, "negative step"),
        ({"arm": b"W"}, "dp_constant"),
    ):
        assert made.write(ROW, **fields) == BAD_ARGUMENT
        assert word in made.message
    assert made.write(np.array(1, np.float32), b"v_cache") == BAD_ARGUMENT
    assert header.dp_constant(made.trace, 0, b"q_proj.weight", c.byref(tensor(ROW))) == BAD_ARGUMENT
    assert made.close() == OK
    assert len(read_trace(made.path).records) == 1


@pytest.mark.parametrize("fields", [{"prompt": b""}, {"prompt": b"a/b"}, {"mode": b".."}, {"sketch_size": 0},
                                    {"engine": b"\xc3("}, {"prompt": b"\xed\xa0\x80"}])  # fmt: skip
def test_a_header_that_cannot_be_is_refused_and_no_file_is_made(header, tmp_path, fields):
    made = Written(header, tmp_path / "t.jsonl", **fields)
    assert made.status == BAD_ARGUMENT
    assert header.dp_message(None)
    assert not (tmp_path / "t.jsonl").exists()


def test_a_place_that_cannot_be_written_is_an_error_and_no_abort(header, tmp_path):
    assert Written(header, tmp_path / "no/such/t.jsonl").status == NOT_WRITTEN
    assert b"no/such" in header.dp_message(None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_by_every_call_that_follows(header, tmp_path):
    link = tmp_path / "t.jsonl"
    link.symlink_to("/dev/full")
    assert Written(header, link).status == NOT_WRITTEN
    assert b"No space" in header.dp_message(None)


def test_threads_write_whole_lines_each_once(header, tmp_path):
    made = Written(header, tmp_path / "t.jsonl", payloads=1)
    arrays = [np.random.default_rng(n).normal(size=(1, n + 1)).astype(np.float32) for n in range(200)]
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda n: made.write(arrays[n], layer=n), range(200)))
        again = list(pool.map(lambda n: made.write(arrays[n], layer=n), range(200)))
    assert statuses == [OK] * 200
    assert again == [DUPLICATE] * 200
    assert made.close() == OK
    trace, payloads = read_trace(made.path), Payloads(tmp_path)
    assert trace.damage == ""
    assert {r.layer: r.hash for r in trace.records} == {n: fingerprint(a).hash for n, a in enumerate(arrays)}
    assert all(payloads.get(record) is not None for record in trace.records)


KILLED = """
import ctypes as c, sys, time
from pathlib import Path
import numpy as np
from native_header import library
from test_native_writer import Written
made = library(Path(sys.argv[1]))
trace = Written(made, Path(sys.argv[2]))
for layer in range(3000):
    trace.write(np.full((1, 9), layer, np.float32), layer=layer)
    if layer == 1500:
        made.dp_flush(trace.trace)
        print("flushed", flush=True)
time.sleep(60)
"""


def test_a_killed_process_leaves_a_valid_incomplete_trace(header, tmp_path):
    path = tmp_path / "t.jsonl"
    code = [sys.executable, "-c", KILLED, str(tmp_path), str(path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src"), str(ROOT)])}
    with subprocess.Popen(code, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"flushed\n"
        process.send_signal(signal.SIGKILL)
    trace: Trace = read_trace(path)
    assert trace.damage
    assert len(trace.records) >= 1501
    assert [r.layer for r in trace.records] == list(range(len(trace.records)))


def _sanitized(folder: Path, language: str, flags: list[str]) -> Path:
    out = folder / f"fuzz_{language.strip('+')}_{len(flags)}"
    command = [compiler("cc" if language == "c" else "c++"), *flags, "-g", "-O1", "-Wall", "-Wextra", "-Werror",
               "-x", language, f"-I{INCLUDE}", str(ROOT / "tests/native/fuzz.c"),
               "-o", str(out), "-lm", "-pthread"]  # fmt: skip
    subprocess.run(command, check=True)
    return out


@pytest.mark.parametrize(("language", "standard"), [("c", "-std=c99"), ("c++", "-std=c++17")])
def test_random_calls_run_clean_under_the_sanitizers(tmp_path, language, standard):
    program = _sanitized(
        tmp_path, language, [standard, "-Wpedantic", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    )
    for seed in (1, 2, 3):
        folder = tmp_path / f"s{seed}"
        folder.mkdir()
        done = subprocess.run([program, str(folder), str(seed), "60"], capture_output=True, text=True, timeout=120,
                              check=False)  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        for path in sorted(folder.glob("*.jsonl")):
            report = validate(folder_of(path))
            assert [p for p in report.problems if "record" not in p.what] == [], path


def folder_of(path: Path) -> Path:
    """Put one trace with its payloads into a folder of its own, as a user would have it."""
    alone = path.parent / f"alone_{path.stem}"
    (alone / "payloads").mkdir(parents=True)
    path.rename(alone / path.name)
    payload = path.parent / "payloads" / f"{path.stem}.safetensors"
    if payload.exists():
        payload.rename(alone / "payloads" / payload.name)
    return alone


def test_two_source_files_share_one_implementation(tmp_path):
    (tmp_path / "a.cc").write_text('#define DRIFTPROBE_IMPLEMENTATION\n#include "driftprobe.h"\nint other();\n'
                                   "int main() { return other(); }\n")  # fmt: skip
    (tmp_path / "b.cc").write_text('#include "driftprobe.h"\nint other() { return dp_message(nullptr)[0]; }\n')
    program = tmp_path / "two"
    subprocess.run([compiler("c++"), "-std=c++17", f"-I{INCLUDE}", str(tmp_path / "a.cc"), str(tmp_path / "b.cc"),
                    "-o", str(program), "-pthread"], check=True)  # fmt: skip
    assert subprocess.run([program], check=False).returncode == 0


def test_a_locale_with_a_decimal_comma_changes_nothing(header, tmp_path):
    import locale

    found = next((name for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "de_DE", "es_ES.UTF-8") if _has(locale, name)), None)
    if found is None:
        pytest.skip("no locale with a decimal comma is installed")
    before = locale.setlocale(locale.LC_NUMERIC)
    try:
        locale.setlocale(locale.LC_NUMERIC, found)
        made = Written(header, tmp_path / "t.jsonl")
        made.write(np.array([0.5]))
        made.close()
    finally:
        locale.setlocale(locale.LC_NUMERIC, before)
    assert read_trace(made.path).records[0].abs_sum == 0.5


def _has(module, name: str) -> bool:
    before = module.setlocale(module.LC_NUMERIC)
    try:
        module.setlocale(module.LC_NUMERIC, name)
    except module.Error:
        return False
    module.setlocale(module.LC_NUMERIC, before)
    return True


def test_the_header_knows_every_tap_and_where_it_stands(header, tmp_path):
    made = Written(header, tmp_path / "t.jsonl")
    for tap in TAPS:
        inside = tap.scope is Scope.LAYER
        assert made.write(ROW, tap.name.encode(), 0 if inside else NONE) == OK, tap.name
        assert made.write(ROW, tap.name.encode(), NONE if inside else 0, position=1) == BAD_ARGUMENT, tap.name
    made.close()


@pytest.mark.parametrize("flag", ["-ffinite-math-only", "-ffast-math"])
def test_flags_that_forget_nan_are_refused(tmp_path, flag):
    done = subprocess.run([compiler(), flag, f"-I{INCLUDE}", "-fsyntax-only", str(ROOT / "tests/native/probe.c")],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode != 0
    assert "-ffinite-math-only" in done.stderr


def test_cplusplus_with_every_warning_is_content(tmp_path):
    (tmp_path / "a.cc").write_text('#define DRIFTPROBE_IMPLEMENTATION\n#include "driftprobe.h"\nint main() {}\n')
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Wold-style-cast", "-Wconversion", "-Werror"]
    done = subprocess.run([compiler("c++"), *flags, f"-I{INCLUDE}", str(tmp_path / "a.cc"), "-o",
                           str(tmp_path / "a"), "-pthread"], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.parametrize("fields", [{"prompt_len": 99}, {"prompt_len": -1}, {"steps": 0}, {"layers": -2}])
def test_a_header_of_impossible_counts_is_refused(header, tmp_path, fields):
    ids = (c.c_int64 * 2)(1, 2)
    made = Written(header, tmp_path / "t.jsonl", token_ids=ids, token_count=2, **fields)
    assert made.status == BAD_ARGUMENT
    assert not (tmp_path / "t.jsonl").exists()


def test_an_empty_tensor_may_have_any_other_axes(header, tmp_path):
    made = Written(header, tmp_path / "t.jsonl")
    item = tensor(np.zeros((1, 1, 0), np.float32))
    item.shape[0] = item.shape[1] = 2**62
    key = header.dp_make_key(b"P", b"prefill_last", 0, 0, b"q_proj")
    assert header.dp_write(made.trace, c.byref(key), c.byref(item)) == OK
    made.close()


def test_an_earlier_runs_payloads_are_never_taken_for_a_killed_ones(header, tmp_path):
    first = Written(header, tmp_path / "t.jsonl", payloads=1)
    first.write(ROW)
    first.close()
    second = Written(header, tmp_path / "t.jsonl", payloads=1)
    second.write(ROW + 1)
    header.dp_flush(second.trace)
    assert read_trace(second.path).damage
    assert not (tmp_path / "payloads/t.safetensors").exists()
    assert validate(tmp_path).valid
    second.close()
    assert Payloads(tmp_path).get(read_trace(second.path).records[0]) is not None
    assert not (tmp_path / "payloads/t.safetensors.tmp").exists()


def test_threads_that_fail_to_open_read_their_own_message(header, tmp_path):
    def failing(n: int) -> bytes:
        for _ in range(50):
            Written(header, tmp_path / f"no{n}" / "t.jsonl")
            told = header.dp_message(None)
            if f"no{n}/".encode() not in told:
                return told
        return b""

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(failing, range(4))) == [b""] * 4
