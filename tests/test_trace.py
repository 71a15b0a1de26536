"""The trace file: what the writer writes is read, and what breaks a MUST is refused in five parts."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import make_trace
from driftprobe import trace_file
from driftprobe.errors import OutputError, TraceError
from driftprobe.trace import Event, Footer, Header, Record, Top, encode_line
from driftprobe.trace_checks import json_object
from driftprobe.trace_file import TraceWriter, read_trace, scan

Body = dict[str, object]


def refused(path: Path, what: str, line: int, measured: str = "") -> None:
    """The trace is refused, and the message has its five parts."""
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    make_trace.assert_five_parts(caught.value, what=what, where=f"{path.name}, line {line}", measured=measured)


def spoil(path: Path, line: int, **changes: object) -> Path:
    """Change fields of one line; a value of `...` takes the field away."""
    bodies = make_trace.rows(path)
    for name, value in changes.items():
        if value is ...:
            del bodies[line - 1][name]
        else:
            bodies[line - 1][name] = value
    return make_trace.put(path, *bodies)


def test_what_is_written_is_read(tmp_path):
    top = Top(ids=(3, 1), values=(2.5, -1.0), logsumexp=2.6)
    wanted = [make_trace.record("P", *tap) for tap in make_trace.TAPS] + [
        make_trace.record("D", None, "logits", top=top, source="recomputed"),
        make_trace.record("D", 0, "k_cache", row_start=0, payload="payloads/x.safetensors#k"),
    ]
    event = Event(event="cache_read_back", arm="A", step=0, measured={"rows": 16, "equal": 16})
    head = make_trace.header(token_ids=(1, 2, 3), labels={"fault": "none"}, prompt_text='áé\n"')
    with TraceWriter(tmp_path / "t.jsonl", head) as writer:
        for record in wanted:
            writer.record(record)
        writer.event(event)
    found = read_trace(tmp_path / "t.jsonl")
    assert found.header == head
    assert found.records == tuple(wanted)
    assert found.events == (event,)
    assert (found.path, found.damage, found.foreign) == ("t.jsonl", "", False)


statistics = st.floats(allow_nan=False, allow_infinity=False, width=64)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(statistics, min_size=64, max_size=64),
    statistics,
    st.text(st.characters(codec="utf-8"), max_size=40),
)
def test_numbers_and_text_survive_exactly(tmp_path_factory, sketch, mean, text):
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    record = make_trace.record("P", 0, "q_proj", sketch=tuple(sketch), mean=mean)
    head = make_trace.header(prompt_text=text)
    with TraceWriter(path, head) as writer:
        writer.record(record)
    found = read_trace(path)
    assert (found.header.prompt_text, repr(found.records)) == (text, repr((record,)))


def test_footer_counts_and_digests_every_byte_before_it(tmp_path):
    path = make_trace.write(tmp_path)
    *before, last = path.read_bytes().splitlines(keepends=True)
    footer = json.loads(last)
    assert footer["sha256"] == hashlib.sha256(b"".join(before)).hexdigest()
    assert (footer["records"], footer["events"]) == (20, 5)


def test_lines_are_on_disk_before_the_writer_ends(tmp_path):
    writer = TraceWriter(tmp_path / "t.jsonl", make_trace.header())
    writer.record(make_trace.record("P", None, "embed"))
    assert read_trace(tmp_path / "t.jsonl").damage.startswith("no footer after line 2")
    writer.__exit__(None)
    assert read_trace(tmp_path / "t.jsonl").damage == ""


def test_a_run_that_raises_leaves_an_incomplete_trace(tmp_path):
    with pytest.raises(KeyError), TraceWriter(tmp_path / "t.jsonl", make_trace.header()) as writer:
        writer.record(make_trace.record("P", None, "embed"))
        raise KeyError
    found = read_trace(tmp_path / "t.jsonl")
    assert len(found.records) == 1
    assert "no footer" in found.damage


def test_a_trace_cut_at_any_byte_of_its_last_two_lines_is_incomplete_and_readable(tmp_path):
    whole = make_trace.write(tmp_path).read_bytes()
    *kept, event, footer = whole.splitlines(keepends=True)
    path = tmp_path / "cut.jsonl"
    for size in range(len(whole) - len(event) - len(footer), len(whole)):
        path.write_bytes(whole[:size])
        found = read_trace(path)
        assert found.damage, size
        assert len(found.records) == 20
        assert len(found.events) == (4 if size < len(whole) - len(footer) else 5)
    path.write_bytes(b"".join(kept) + event + footer)
    assert read_trace(path).damage == ""


def test_a_header_that_is_cut_is_no_trace(tmp_path):
    path = tmp_path / "t.jsonl"
    first = make_trace.write(tmp_path).read_bytes().splitlines(keepends=True)[0]
    for size in (1, 20, len(first) - 2):
        path.write_bytes(first[:size])
        refused(path, "invalid JSON", 1)
    path.write_bytes(first[:-1])
    assert "no footer" in read_trace(path).damage


def test_an_empty_file_is_no_trace(tmp_path):
    refused(make_trace.put(tmp_path / "t.jsonl"), "no header", 1)


NOT_OBJECTS = ["{", "nonsense", "", '{"type": "record"} x', "\ufeff{}", "[" * 100_000, "7", "[]", "null",
               '{"a": ' + "9" * 5000 + "}", '{"type": "record", "prompt": "\\ud800"}']  # fmt: skip


@pytest.mark.parametrize("text", NOT_OBJECTS, ids=range(len(NOT_OBJECTS)))
def test_a_line_that_is_no_json_object_is_refused(tmp_path, text):
    bodies = make_trace.rows(make_trace.write(tmp_path))
    refused(make_trace.put(tmp_path / "t.jsonl", *bodies[:3], text, *bodies[4:]), "invalid JSON", 4)


def test_bytes_that_are_not_utf_8_are_refused(tmp_path):
    path = make_trace.write(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"q_proj"', b'"q_pr\xffj"'))
    refused(path, "invalid JSON", 1, "utf-8")


def test_a_line_of_endless_length_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = make_trace.write(tmp_path)
    longest = max(map(len, path.read_bytes().splitlines(keepends=True)))
    monkeypatch.setattr(trace_file, "MAX_LINE", longest)
    assert read_trace(path).damage == ""
    spoil(path, 3, source="x" * longest)
    refused(path, "line too long", 3, f"over {longest} bytes")


def test_a_duplicated_name_in_an_object_is_refused(tmp_path):
    path = make_trace.write(tmp_path)
    path.write_text(path.read_text().replace('"layer":0,', '"layer":0,"layer":1,', 1))
    refused(path, "invalid JSON", 3, "duplicated key 'layer'")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("name", ["abs_sum", "l2", "mean"])
def test_nan_and_infinity_in_a_statistic_are_refused(tmp_path, name, number):
    path = make_trace.write(tmp_path)
    path.write_text(re.sub(rf'"{name}":[-0-9.e]+', f'"{name}":{number}', path.read_text(), count=1))
    refused(path, "invalid JSON", 2, "is not a number")


@pytest.mark.parametrize("value", ["[1.0,-1e999]", '["a",1e999]', '[[1e999]]', '{"b":[{"c":1e999}]}', "[1,NaN]",
                                   "[1e999," + "9" * 400 + "]"])  # fmt: skip
def test_a_number_beyond_float64_is_refused_however_deep_it_stands(value):
    with pytest.raises(ValueError, match=r"(1e999|NaN) is not a number"):
        json_object(b'{"a":' + value.encode() + b"}")


def test_an_integer_beyond_float64_is_a_number():
    assert json_object(b'{"a":[1.5,' + b"9" * 400 + b"]}") == {"a": [1.5, int("9" * 400)]}


@pytest.mark.parametrize("schema", ["driftprobe/trace/2", "", None, 1, ...])
def test_an_unknown_schema_version_is_refused(tmp_path, schema):
    refused(spoil(make_trace.write(tmp_path), 1, schema=schema), "unknown schema version", 1)


def test_a_second_header_is_refused(tmp_path):
    bodies = make_trace.rows(make_trace.write(tmp_path))
    refused(make_trace.put(tmp_path / "t.jsonl", *bodies[:5], bodies[0], *bodies[5:]), "header out of place", 6)


def test_records_without_a_header_are_refused(tmp_path):
    bodies = make_trace.rows(make_trace.write(tmp_path))
    refused(make_trace.put(tmp_path / "t.jsonl", *bodies[1:]), "no header", 1)


def test_a_second_record_of_a_key_is_refused(tmp_path):
    bodies = make_trace.rows(make_trace.write(tmp_path))
    again = bodies[2] | {"hash": "0x0000000000000000"}
    refused(make_trace.put(tmp_path / "t.jsonl", *bodies[:4], again), "duplicated key", 5, "first on line 3")


def test_a_line_after_the_footer_is_refused(tmp_path):
    path = make_trace.write(tmp_path)
    path.write_bytes(path.read_bytes() + b'{"type": "event", "event": "late", "arm": "P"}')
    refused(path, "line after the footer", 28)


def test_a_lost_record_is_seen_by_the_footer(tmp_path):
    bodies = make_trace.rows(make_trace.write(tmp_path))
    path = make_trace.put(tmp_path / "t.jsonl", *bodies[:5], *bodies[6:])
    refused(path, "footer disagrees", 26, "footer says")


def test_a_changed_byte_is_seen_by_the_footer(tmp_path):
    path = make_trace.write(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"token_id":7', b'"token_id":8', 1))
    refused(path, "footer disagrees", 27, "sha256")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"type": "tensor"}, "unknown line type"),
        ({"type": ...}, "unknown line type"),
        ({"type": ["record"]}, "unknown line type"),
        ({"hash": ...}, "record does not fit the schema"),
        ({"hash": 12}, "record does not fit the schema"),
        ({"layer": "0"}, "record does not fit the schema"),
        ({"layer": ...}, "record does not fit the schema"),
        ({"abs_sum": "nan"}, "record does not fit the schema"),
        ({"abs_sum": 10**400}, "record does not fit the schema"),
        ({"nz_count": True}, "record does not fit the schema"),
        ({"shape": [1.5]}, "record does not fit the schema"),
        ({"sketch": [None] * 64}, "record does not fit the schema"),
        ({"hash": ""}, "empty name"),
        ({"arm": ""}, "empty name"),
        ({"prompt": "p9"}, "record of another prompt"),
        ({"layer": None}, "q_proj in the wrong place"),
        ({"tensor": "logits"}, "logits in the wrong place"),
        ({"layer": -1}, "negative statistic"),
        ({"phase": "decode3"}, "phase disagrees with the step"),
        ({"dtype": "float12"}, "unknown dtype"),
        ({"shape": [1, 1, 2]}, "shape disagrees with the counts"),
        ({"shape": [-1, -8]}, "shape disagrees with the counts"),
        ({"rows": ["0x1"]}, "row hashes on a tap without rows"),
        ({"sketch": [0.0] * 63}, "sketch of the wrong size"),
        ({"nz_count": -1}, "negative statistic"),
        ({"logical_tok_idx": -1}, "negative statistic"),
        ({"min": 2.0, "max": 1.0}, "min above max"),
        ({"top": {"ids": [1], "values": [], "logsumexp": 0.0}}, "top of two lengths"),
        ({"payload": "x.safetensors"}, "payload leaves"),
        ({"payload": "../x.safetensors#a"}, "payload leaves"),
        ({"payload": "a/../../x.safetensors#a"}, "payload leaves"),
        ({"payload": "/etc/x.safetensors#a"}, "payload leaves"),
        ({"payload": "\\\\host\\x.safetensors#a"}, "payload leaves"),
        ({"payload": "..\\x.safetensors#a"}, "payload leaves"),
        ({"payload": "C:x.safetensors#a"}, "payload leaves"),
        ({"payload": "~/x.safetensors#a"}, "payload leaves"),
        ({"payload": "x\0.safetensors#a"}, "payload leaves"),
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_breaks_a_must_is_refused(tmp_path, changes, what):
    refused(spoil(make_trace.write(tmp_path), 3, **changes), what, 3)


def test_row_hashes_that_disagree_with_the_shape_are_refused(tmp_path):
    refused(spoil(make_trace.write(tmp_path), 4, rows=["0x1"]), "shape disagrees with the rows", 4, "1 row hashes")
    refused(spoil(make_trace.write(tmp_path), 4, shape=[], nz_count=1), "shape disagrees with the rows", 4)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"prompt": ""}, "prompt cannot name a file"),
        ({"prompt": "../p"}, "prompt cannot name a file"),
        ({"prompt": "a\\b"}, "prompt cannot name a file"),
        ({"prompt": "\x1b[2J"}, "prompt cannot name a file"),
        ({"mode": "a\nb"}, "mode cannot name a file"),
        ({"sketch_size": 0}, "impossible sketch size"),
        ({"sketch_size": 10**9}, "impossible sketch size"),
        ({"prompt_len": 99, "token_ids": [1, 2]}, "prompt longer than its tokens"),
        ({"prompt_len": -1}, "negative count in the header"),
        ({"steps": -3}, "negative count in the header"),
        ({"engine": {"name": "toy", "layers": -2}}, "negative count in the header"),
        ({"taps": {"q_proj": [-1]}}, "negative count in the header"),
        ({"reads": [{"arm": "P", "phase": "prefill_last", "step": -1, "position": 3}]}, "negative count in the header"),
        ({"reads": [{"arm": "P", "phase": "prefill_last", "step": 0, "position": -3}]}, "negative count in the header"),
        ({"engine": "hf"}, "header does not fit the schema"),
        ({"prompt": ...}, "header does not fit the schema"),
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_breaks_a_must_is_refused(tmp_path, changes, what):
    refused(spoil(make_trace.write(tmp_path), 1, **changes), what, 1)


def test_fields_of_a_later_writer_are_ignored(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [
        encode_line("header", make_trace.header()),
        encode_line("record", make_trace.record("P", None, "embed")),
    ]
    lines = [line.replace(b"{", b'{"colour":{"x":[1]},', 1) for line in lines]
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    path.write_bytes(b"".join([*lines, encode_line("footer", Footer(records=1, events=0, sha256=digest))]))
    assert read_trace(path).records == (make_trace.record("P", None, "embed"),)


def test_scan_reports_every_line_and_goes_on(tmp_path):
    path = make_trace.write(tmp_path)
    for line in (3, 9, 15):
        spoil(path, line, hash="")
    found = scan(path)
    assert [problem.line for problem in found.problems] == [3, 9, 15, 27]


def test_scan_does_not_blame_the_footer_for_a_line_that_it_could_not_read(tmp_path):
    path = spoil(make_trace.write(tmp_path), 3, hash=7)
    assert [problem.line for problem in scan(path).problems] == [3]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["abs_sum", "min", "mean", "sketch"])
def test_the_writer_refuses_what_the_reader_would(tmp_path, name, value):
    record = replace(make_trace.record("P", 0, "q_proj"), **{name: (value,) * 64 if name == "sketch" else value})
    with (
        pytest.raises(TraceError) as caught,
        TraceWriter(tmp_path / "t.jsonl", make_trace.header()) as writer,
    ):
        writer.record(record)
    make_trace.assert_five_parts(caught.value, what="NaN or infinity", where="t.jsonl, line 2")
    assert read_trace(tmp_path / "t.jsonl").records == ()


def test_the_writer_refuses_a_second_record_of_a_key(tmp_path):
    record = make_trace.record("P", 0, "q_proj")
    with (
        pytest.raises(TraceError, match="duplicated key"),
        TraceWriter(tmp_path / "t.jsonl", make_trace.header()) as writer,
    ):
        writer.record(record)
        writer.record(record)


def test_the_writer_refuses_a_header_before_it_makes_a_file(tmp_path):
    with pytest.raises(TraceError, match="prompt cannot name a file"):
        TraceWriter(tmp_path / "t.jsonl", Header(prompt="../p"))
    assert not (tmp_path / "t.jsonl").exists()


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        TraceWriter(tmp_path / "file" / "t.jsonl", make_trace.header())
    make_trace.assert_five_parts(caught.value, what="cannot write", where="t.jsonl")


def test_layer_null_is_written_and_other_nothings_are_not():
    body = json.loads(encode_line("record", Record(prompt="p", phase="x", layer=None, tensor="embed", hash="0x1")))
    assert body["layer"] is None
    assert "abs_sum" not in body


def test_every_must_of_the_format_page_names_a_test_that_exists():
    here = Path(__file__).parent
    page = (here.parent / "docs" / "trace-format.md").read_text()
    code = "".join(path.read_text() for path in here.glob("test_*.py"))
    musts = re.findall(r"^\| M(\d+) \|.*$", page, flags=re.MULTILINE)
    assert [int(m) for m in musts] == list(range(1, len(musts) + 1))
    for line in re.findall(r"^\| M\d+ \|.*$", page, flags=re.MULTILINE):
        named = re.findall(r"`(test_\w+)`", line)
        assert named, line
        assert all(f"def {name}(" in code for name in named), line
