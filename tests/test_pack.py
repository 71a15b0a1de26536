"""pack and unpack lose nothing, packed folders read as unpacked ones do, and no Parquet file is trusted."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from driftprobe import quick as quick_module
from driftprobe import scan as scan_module
from driftprobe.api import compare
from driftprobe.cli import group
from driftprobe.errors import DriftprobeError, OutputError, TraceError
from driftprobe.load import lines_of, load_traces
from driftprobe.pack import pack_folder, unpack_folder
from driftprobe.packed import packed_columns, read_packed
from driftprobe.result import analyze
from driftprobe.scan import BUILT, read_columns
from driftprobe.seal import OPEN, is_sealed, seal
from driftprobe.validate import validate
from make_trace import assert_five_parts, both, drifting, put, rows, toy, write
from test_quick import jittered, written

pl = pytest.importorskip("polars")
pytestmark = pytest.mark.skipif(not BUILT, reason="driftprobe._scan is not built here: it needs a C compiler")
SLOW = settings(max_examples=int(os.environ.get("DRIFTPROBE_EXAMPLES", "20")), deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def assert_there_and_back(folder: Path) -> None:
    """Every byte of every trace comes back, and nothing else is left."""
    before = contents(folder)
    packed = pack_folder(folder)
    assert sorted(contents(folder)) == sorted(name.replace(".jsonl", ".parquet") for name in before)
    assert [turned.after for turned in packed] == [len(body) for body in contents(folder).values()]
    unpack_folder(folder)
    assert contents(folder) == before


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70)
texts = st.text(max_size=8)
values = st.recursive(st.none() | st.booleans() | numbers | texts, lambda v: st.lists(v, max_size=3), max_leaves=6)
FIELDS = ("step", "token_id", "layer", "dtype", "shape", "abs_sum", "min", "l2", "nan_count", "sketch", "rows",
          "source", "hash", "arm", "phase", "payload", "order", "top")  # fmt: skip
usual = st.fixed_dictionaries({}, optional={
    "abs_sum": numbers, "min": numbers, "mean": numbers, "l2": numbers, "token_id": st.integers(-(2**65), 2**65),
    "sketch": st.lists(numbers, min_size=3, max_size=4), "shape": st.lists(st.integers(-1, 9), max_size=3),
    "rows": st.lists(st.sampled_from(["0x" + "0f" * 8, "0x" + "e1" * 8, "x"]), max_size=3), "source": texts,
})  # fmt: skip
odd = st.dictionaries(st.sampled_from(FIELDS) | texts, values, max_size=3)
ends = st.sampled_from(["\n", "\r\n", " \n", "\n\n"])


@SLOW
@given(
    bodies=st.lists(st.tuples(usual, odd, ends, st.sampled_from([(",", ":"), (", ", ": ")])), max_size=6),
    cut=st.integers(0, 30), with_header=st.booleans(), ascii_only=st.booleans(),
)  # fmt: skip
def test_any_lines_come_back_to_the_byte(tmp_path, bodies, cut, with_header, ascii_only):
    place = {"type": "record", "prompt": "p0", "phase": "prefill_last", "layer": 0, "tensor": "q_proj",
             "hash": "0x" + "ab" * 8, "arm": "P"}  # fmt: skip
    lines = ['{"type":"header","schema":"driftprobe/trace/1","prompt":"p0","sketch_size":3}\n'] if with_header else []
    for known, unknown, end, separators in bodies:
        lines.append(json.dumps(place | known | unknown, separators=separators, ensure_ascii=ascii_only) + end)
    body = "".join(lines).encode("utf-8", "surrogatepass")
    folder = tmp_path / "t"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "x.jsonl").write_bytes(body[: len(body) - cut] if cut < len(body) else body)
    assert_there_and_back(folder)


@SLOW
@given(st.binary(max_size=200))
def test_any_bytes_come_back(tmp_path, body):
    (tmp_path / "x.jsonl").write_bytes(body)
    assert_there_and_back(tmp_path)


EXTREMES = [0.0, -0.0, 5e-324, -5e-324, 1.7976931348623157e308, -1.7976931348623157e308, 2.2250738585072014e-308, 0.1,
            1e16, 1e15, 123456789012345678.0, 1 / 3, 1e22, 1e23, 9007199254740993.0, 4.35, 5e-7, 1e-4]  # fmt: skip


def test_extreme_numbers_come_back_to_the_bit(tmp_path):
    path = write(tmp_path)
    lines = rows(path)
    places = [at for at, line in enumerate(lines) if line["type"] == "record"][: len(EXTREMES)]
    for at, number in zip(places, EXTREMES, strict=True):
        lines[at] |= {"mean": number, "sketch": [number] * 64}
    put(path, *lines)
    read = read_columns(path)
    assert read is None  # the footer's digest is another: line by line, it says so
    assert_there_and_back(tmp_path)
    pack_folder(tmp_path)
    packed = read_packed(path.with_suffix(".parquet"))
    columns, order = packed.columns, packed.order[places].tolist()
    kept = [(row, number) for row, number in zip(order, EXTREMES, strict=True) if columns.rows["taken"][row]]
    assert len(kept) > len(EXTREMES) - 4  # the logits of four arms among them have a top
    for row, number in kept:
        for found in (columns.sums[columns.rows["sums"][row], 0], columns.rows["mean"][row]):
            assert (found, np.signbit(found)) == (number, np.signbit(number))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two traces of our own writer: one quiet, one that fails."""
    quiet, _ = toy(jittered(1e-7, ("D", "E1"), 0.3), steps=2, prompt="quiet")
    failing, _ = toy(both(drifting(1e-2, start=(1, "q_rope"))), prompt="failing", mode="kv_aligned")
    return written(tmp_path / "run" / "traces", quiet, failing)


def test_our_own_traces_need_no_line_twice(folder):
    whole = {path.stem: path.read_bytes().splitlines(keepends=True) for path in folder.iterdir()}
    pack_folder(folder)
    for path in folder.iterdir():
        packed = read_packed(path)
        plain = [b'"top":' not in line and b'"type":"record"' in line for line in whole[path.stem]]
        assert [row in packed.raw for row in packed.order.tolist()] == [not p for p in plain]


@pytest.mark.parametrize("large", [0, 1 << 30])
def test_a_packed_folder_reads_as_an_unpacked_one(folder, monkeypatch, large):
    monkeypatch.setattr(quick_module.Quick.__init__, "__defaults__", (large,))
    traces, result, valid = load_traces(folder), analyze(folder), validate(folder)
    reports = result.reports()
    pack_folder(folder.parent)
    assert load_traces(folder.parent) == traces
    assert analyze(folder).judgement == result.judgement
    assert analyze(folder).reports() == reports
    quickly = analyze(folder, whole=False)
    assert (quickly.verdict, quickly.reason) == (result.verdict, result.reason)
    assert quickly.thinned is (large == 0)
    assert quickly.reports() == reports
    again = validate(folder)
    assert (again.records, again.valid, len(again.warnings)) == (valid.records, True, len(valid.warnings))


def test_packed_columns_are_those_of_the_lines(folder):
    path = folder / "quiet_as_designed.jsonl"
    before = read_columns(path)
    pack_folder(folder)
    after = packed_columns(path.with_suffix(".parquet"))
    assert before is not None and after is not None
    assert (after.header, after.events, after.name) == (before.header, before.events, before.name)
    records = {before.record(i).key: before.record(i) for i in range(len(before.rows))}
    assert {after.record(i).key: after.record(i) for i in range(len(after.rows))} == records


def test_packed_sides_are_compared_and_written(folder, tmp_path):
    result, left_out = compare(folder, folder, tmp_path / "a")
    pack_folder(folder)
    again, still = compare(folder, folder, tmp_path / "b")
    assert (again.verdict, again.reason, still) == (result.verdict, result.reason, left_out)
    analyze(folder).write(tmp_path / "written")
    assert {path.suffix for path in (tmp_path / "written" / "traces").iterdir()} == {".parquet"}
    assert analyze(tmp_path / "written").verdict is analyze(folder).verdict


def test_a_damaged_trace_is_packed_with_its_damage(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"\n", 0, len(whole) - 1) - 40])
    (found,) = load_traces(tmp_path)
    assert_there_and_back(tmp_path)
    pack_folder(tmp_path)
    assert load_traces(tmp_path) == (found,)


def test_a_strangers_traces_are_packed_too(tmp_path):
    line = {"phase": "prefill", "layer": 0, "tensor": "q_proj", "hash": "9f"}
    put(tmp_path / "p_trace.jsonl", line)
    put(tmp_path / "p_decode_trace.jsonl", line | {"phase": "decode"})
    found = load_traces(tmp_path)
    assert_there_and_back(tmp_path)
    pack_folder(tmp_path)
    assert [trace.records for trace in load_traces(tmp_path)] == [trace.records for trace in found]


def test_lines_are_sorted_by_key_and_have_statistics(folder):
    pack_folder(folder)
    table = pl.read_parquet(folder / "quiet_as_designed.parquet").filter(pl.col("arm").is_not_null())
    keys = table.select(
        pl.col("arm").to_physical(), "step", pl.col("layer").fill_null(-1), pl.col("tensor").to_physical()
    )
    assert keys.rows() == sorted(keys.rows())
    assert table["line"].to_list() != sorted(table["line"].to_list())


def test_the_same_trace_packed_and_unpacked_is_an_error(folder):
    whole = folder / "quiet_as_designed.jsonl"
    body = whole.read_bytes()
    pack_folder(folder)
    whole.write_bytes(body)
    with pytest.raises(TraceError) as error:
        load_traces(folder)
    assert_five_parts(error.value, what="two traces of the same prompt and mode", where="quiet")
    for turn in (pack_folder, unpack_folder):
        with pytest.raises(OutputError) as taken:
            turn(folder)
        assert_five_parts(taken.value, what="there already", where="quiet_as_designed")
    assert whole.read_bytes() == body


def test_the_commands_pack_and_unpack(folder):
    names = sorted(path.name for path in folder.iterdir())
    for turn, ending in (("pack", ".parquet"), ("unpack", ".jsonl")):
        done = CliRunner().invoke(group, [turn, str(folder.parent)])
        assert done.exit_code == 0, done.output
        assert [line.split(":")[0] for line in done.output.splitlines()] == [name[:-6] + ending for name in names]


def test_without_polars_a_packed_folder_says_what_is_missing(folder, monkeypatch):
    pack_folder(folder)
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(DriftprobeError) as error:
        load_traces(folder)
    assert_five_parts(error.value, what="need polars", where="parquet")
    assert "[scale]" in error.value.next_step


def test_without_the_scanner_large_traces_are_read_line_by_line(folder, monkeypatch):
    found = load_traces(folder)
    monkeypatch.setattr(scan_module, "scanner", None)
    assert all(read_columns(path) is None for path in folder.iterdir())
    assert load_traces(folder) == found


# ---- hostile files


def packed_file(folder: Path) -> Path:
    write(folder)
    pack_folder(folder)
    return next(folder.glob("*.parquet"))


def assert_refused(path: Path, measured: str = "") -> None:
    for read in (load_traces, analyze, unpack_folder, lambda folder: analyze(folder, whole=False)):
        with pytest.raises(DriftprobeError) as error:
            read(path.parent)
        assert_five_parts(error.value, what="packed trace", where=path.name, measured=measured)
    assert not validate(path.parent).valid


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = packed_file(tmp_path)
    body = path.read_bytes()
    path.write_bytes(body[: int(len(body) * share)])
    assert_refused(path)


@SLOW
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_refused_before_polars_sees_it(tmp_path, at, mask):
    folder = tmp_path / "t"
    shutil.rmtree(folder, ignore_errors=True)
    path = packed_file(folder)
    body = bytearray(path.read_bytes())
    body[at % len(body)] ^= mask
    path.write_bytes(body)
    assert not is_sealed(path)
    with pytest.raises(TraceError) as error:
        list(lines_of(path)())
    assert_five_parts(error.value, what="packed trace", where=path.name, measured="seal")


def rewritten(path: Path, change: object, **facts: object) -> None:
    """Make another file of it, sealed: a stranger can do as much."""
    meta = json.loads(pl.read_parquet_metadata(path)["driftprobe"]) | {"seal": OPEN} | facts
    change(pl.read_parquet(path)).write_parquet(path, metadata={"driftprobe": json.dumps(meta)})  # type: ignore[operator]
    seal(path)


CHANGES = {
    "a lost row": (lambda t: t.filter(pl.col("line") != 3), "lines are missing"),
    "a row twice": (lambda t: pl.concat([t, t[:1]]), "lines are missing"),
    "a lost column": (lambda t: t.drop("hash"), "columns hash"),
    "one more column": (lambda t: t.with_columns(more=pl.lit(1)), "columns more"),
    "a column of another type": (lambda t: t.with_columns(pl.col("hash").cast(pl.Float64)), "columns hash"),
    "another number": (lambda t: t.with_columns(pl.col("abs_sum") + 1), "digest"),
    "another hash": (lambda t: t.with_columns(pl.col("hash") ^ 1), "digest"),
    "NaN": (lambda t: t.with_columns(l2=pl.lit(float("nan"))), "digest"),
    "a sketch of another size": (lambda t: t.with_columns(sketch=pl.lit(b"12345678")), "sketch of the wrong size"),
    "rows of no size": (lambda t: t.with_columns(rows=pl.lit(b"123")), "rows of the wrong size"),
    "no raw lines": (lambda t: t.with_columns(raw=pl.lit(None, dtype=pl.Binary)), "a line that is neither"),
    "a record without its key": (lambda t: t.with_columns(step=pl.lit(None, dtype=pl.Int64)), "without its key"),
    "nothing": (lambda t: t.clear(), "digest"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_was_changed_is_refused(tmp_path, name):
    change, measured = CHANGES[name]
    path = packed_file(tmp_path)
    rewritten(path, change)
    assert_refused(path, measured)


@pytest.mark.parametrize(("facts", "measured"), [
    ({"made_by": "x"}, "made by"), ({"sketch_size": -1}, "sketch size"), ({"sketch_size": "64"}, "sketch size"),
    ({"digest": None}, "digest"),
])  # fmt: skip
def test_metadata_that_is_not_ours_is_refused(tmp_path, facts, measured):
    path = packed_file(tmp_path)
    rewritten(path, lambda table: table, **facts)
    assert_refused(path, measured)


def test_a_parquet_file_of_somebody_else_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pl.DataFrame({"a": [1, 2]}).write_parquet(path)
    assert_refused(path, "no description by driftprobe")


def test_a_raw_line_that_was_changed_is_seen_by_the_footer(tmp_path):
    path = packed_file(tmp_path)
    other = pl.col("raw").bin.encode("hex").str.replace(b"toy".hex(), b"tox".hex()).str.decode("hex")
    rewritten(path, lambda table: table.with_columns(raw=other))
    with pytest.raises(TraceError) as error:
        load_traces(tmp_path)
    assert "footer disagrees" in error.value.what
    with pytest.raises(TraceError) as error:
        unpack_folder(tmp_path)
    assert_five_parts(error.value, what="does not give back", where=path.name)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    outside = packed_file(tmp_path / "elsewhere")
    folder = tmp_path / "traces"
    folder.mkdir()
    (folder / "x.parquet").symlink_to(outside)
    with pytest.raises(TraceError) as error:
        load_traces(folder)
    assert "leads out of the folder" in error.value.what


def test_a_file_of_endless_rows_is_refused_before_it_is_read(tmp_path):
    path = packed_file(tmp_path)
    many = 30_000_000
    rewritten(path, lambda _table: pl.DataFrame({"line": pl.Series([1], dtype=pl.UInt32).new_from_index(0, many)}))
    assert path.stat().st_size * 8 < many
    assert_refused(path, "rows in")
