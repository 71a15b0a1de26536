"""load_traces(): ours and strangers' traces of a folder, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import make_trace
from driftprobe import trace_file
from driftprobe.errors import TraceError
from driftprobe.load import load_traces, survey, traces_folder
from driftprobe.trace import Record, Trace

Body = dict[str, object]


def loose(layer: object = 0, tensor: str = "q_proj", digest: str = "a1", **more: object) -> Body:
    """A stranger's record: the least that a trace can hold."""
    return {"prompt": "p0", "layer": layer, "tensor": tensor, "hash": digest} | more


def only(folder: Path) -> Trace:
    (found,) = load_traces(folder)
    return found


def by_arm(found: Trace, arm: str) -> list[Record]:
    return [record for record in found.records if record.arm == arm]


def refused(folder: Path, what: str, where: str, measured: str = "") -> None:
    with pytest.raises(TraceError) as caught:
        load_traces(folder)
    make_trace.assert_five_parts(caught.value, what=what, where=where, measured=measured)


# ---- ours


def test_traces_are_sorted_by_mode_and_prompt(tmp_path):
    for prompt, mode in (("p6", "as_designed"), ("p0", "kv_aligned"), ("p0", "as_designed")):
        make_trace.write(tmp_path, prompt, mode)
    keys = [(t.header.mode, t.header.prompt) for t in load_traces(tmp_path)]
    assert keys == [("as_designed", "p0"), ("as_designed", "p6"), ("kv_aligned", "p0")]


def test_a_folder_of_artifacts_is_read_through_its_traces(tmp_path):
    make_trace.write(tmp_path / "traces")
    assert load_traces(tmp_path) == load_traces(tmp_path / "traces")
    assert traces_folder(tmp_path) == tmp_path / "traces"


def test_an_empty_traces_folder_does_not_hide_the_traces_beside_it(tmp_path):
    make_trace.write(tmp_path)
    (tmp_path / "traces").mkdir()
    assert traces_folder(tmp_path) == tmp_path


def test_our_own_trace_that_lacks_its_end_is_loaded_with_its_damage(tmp_path):
    path = make_trace.write(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    assert "is cut" in only(tmp_path).damage


def test_our_own_trace_of_a_header_alone_is_incomplete(tmp_path):
    path = make_trace.write(tmp_path)
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert only(tmp_path).damage
    assert only(tmp_path).records == ()


# ---- strangers'


def test_a_decode_file_is_not_taken_for_a_prefill_file(tmp_path):
    """The predecessor's bug: its pattern for prefill files, *_trace.jsonl, also matched the decode files."""
    make_trace.put(tmp_path / "p0_short_trace.jsonl", loose(digest="aa"), loose(1, digest="bb"))
    make_trace.put(tmp_path / "p0_short_decode_trace.jsonl", loose(digest="aa"), loose(1, digest="cc"))
    found = only(tmp_path)
    assert [(r.arm, r.phase, r.layer, r.hash) for r in found.records] == [
        ("D", "decode0", 0, "aa"),
        ("D", "decode0", 1, "cc"),
        ("P", "prefill_last", 0, "aa"),
        ("P", "prefill_last", 1, "bb"),
    ]
    assert found.foreign
    assert found.damage == ""


def test_the_phase_of_a_record_wins_over_the_name_of_its_file(tmp_path):
    make_trace.put(tmp_path / "x_decode_trace.jsonl", loose(phase="prefill_last"), loose(phase="decode"))
    assert [(r.arm, r.phase) for r in only(tmp_path).records] == [("P", "prefill_last"), ("D", "decode0")]


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("prefill", ("P", "prefill_last", 0)),
        ("prefill_last", ("P", "prefill_last", 0)),
        ("decode", ("D", "decode0", 0)),
        ("decode0", ("D", "decode0", 0)),
        ("decode12", ("D", "decode12", 12)),
    ],
)
def test_phases_are_normalised(tmp_path, phase, expected):
    make_trace.put(tmp_path / "any.jsonl", loose(phase=phase))
    (record,) = only(tmp_path).records
    assert (record.arm, record.phase, record.step) == expected


def test_a_prompt_without_a_name_takes_the_name_of_its_file(tmp_path):
    body = {name: value for name, value in loose().items() if name != "prompt"}
    make_trace.put(tmp_path / "p6_len_16_trace.jsonl", body)
    make_trace.put(tmp_path / "p6_len_16_decode_trace.jsonl", body)
    make_trace.put(tmp_path / "p0_kv_aligned_trace.jsonl", body | {"prompt": None})
    found = [(t.header.mode, t.header.prompt, len(t.records)) for t in load_traces(tmp_path)]
    assert found == [("as_designed", "p6_len_16", 2), ("kv_aligned", "p0", 1)]


def test_prefill_rows_go_with_the_decode_step_of_their_position(tmp_path):
    rows = [loose(logical_tok_idx=p, digest=f"r{p}") for p in range(7)]
    make_trace.put(tmp_path / "p0_trace.jsonl", *rows)
    make_trace.put(tmp_path / "p0_decode_trace.jsonl", loose(logical_tok_idx=5), loose(logical_tok_idx=4))
    found = only(tmp_path)
    assert [(r.phase, r.step, r.logical_tok_idx) for r in by_arm(found, "D")] == [
        ("decode1", 1, 5),
        ("decode0", 0, 4),
    ]
    assert [(r.phase, r.step, r.hash) for r in by_arm(found, "P") if r.phase != "prefill_row"] == [
        ("prefill_last", 0, "r4"),
        ("prefill_last", 1, "r5"),
    ]
    assert {(r.step, r.hash) for r in by_arm(found, "P") if r.phase == "prefill_row"} == {
        (0, f"r{p}") for p in (0, 1, 2, 3, 6)
    }
    assert found.header.steps == 2


def test_steps_that_records_say_are_kept_where_they_are_one_to_one(tmp_path):
    decodes = [loose(phase="decode2", logical_tok_idx=12), loose(phase="decode5", logical_tok_idx=15)]
    make_trace.put(tmp_path / "t.jsonl", *decodes, loose(phase="prefill", logical_tok_idx=15))
    assert [(r.phase, r.step) for r in only(tmp_path).records] == [
        ("decode2", 2),
        ("decode5", 5),
        ("prefill_last", 5),
    ]


def test_steps_that_records_say_give_way_to_positions_where_they_are_not_one_to_one(tmp_path):
    decodes = [loose(phase="decode0", logical_tok_idx=p) for p in (12, 15)]
    make_trace.put(tmp_path / "t.jsonl", *decodes)
    assert [(r.phase, r.step) for r in only(tmp_path).records] == [("decode0", 0), ("decode1", 1)]


def test_a_decode_at_another_position_leaves_the_prefill_row_alone(tmp_path):
    """Prefill's last prompt token and decode's first new one are two tokens: nothing may be compared."""
    prefill = loose(phase="prefill_last", logical_tok_idx=15)
    make_trace.put(tmp_path / "t.jsonl", prefill, loose(phase="decode0", logical_tok_idx=16))
    assert [r.phase for r in only(tmp_path).records] == ["prefill_row", "decode0"]


def test_without_decode_positions_the_last_prefill_row_is_the_one_to_compare(tmp_path):
    prefills = [loose(phase="prefill", logical_tok_idx=p) for p in (0, 2, 1)]
    make_trace.put(tmp_path / "t.jsonl", *prefills, loose(phase="decode"))
    assert [r.phase for r in only(tmp_path).records] == [
        "prefill_row",
        "prefill_last",
        "prefill_row",
        "decode0",
    ]


@pytest.mark.parametrize(
    ("layer", "tensor", "expected"),
    [
        (3, "q_proj", 3),
        ("3", "q_proj", 3),
        (-1, "q_proj", None),
        (None, "q_proj", None),
        ("-1", "embed", None),
        (0, "embed", None),
        (12, "final_norm", None),
        ("12", "logits", None),
        (4, "my_tensor", 4),
    ],
)
def test_layers_are_normalised(tmp_path, layer, tensor, expected):
    make_trace.put(tmp_path / "p0_trace.jsonl", loose(layer, tensor))
    (record,) = only(tmp_path).records
    assert (record.layer, record.tensor) == (expected, tensor)


def test_a_missing_layer_is_none(tmp_path):
    make_trace.put(tmp_path / "p0_trace.jsonl", {"prompt": "p0", "tensor": "embed", "hash": "x"})
    assert only(tmp_path).records[0].layer is None


def test_the_fields_that_a_stranger_may_have_are_kept_and_others_are_not(tmp_path):
    known = {"token_id": 5, "logical_tok_idx": 9, "pos_id": 9, "nz_count": 3, "abs_sum": 1.5}
    strange = {"l2": "n/a", "dtype": "BF16", "step": -7, "arm": "X", "time": [1]}
    make_trace.put(tmp_path / "p0_trace.jsonl", loose(**known, **strange))
    (record,) = only(tmp_path).records
    assert {name: getattr(record, name) for name in known} == known
    assert (record.l2, record.dtype, record.step, record.arm) == (None, None, 0, "P")


@pytest.mark.parametrize(
    ("folder", "name", "expected"),
    [
        ("run", "p0_trace.jsonl", "as_designed"),
        ("kv_aligned", "p0_trace.jsonl", "kv_aligned"),
        ("kv_aligned/traces", "p0_trace.jsonl", "kv_aligned"),
        ("run", "p0_kv_aligned_trace.jsonl", "kv_aligned"),
        ("kv_aligned", "p0_as_designed_trace.jsonl", "as_designed"),
    ],
)
def test_the_mode_of_a_strangers_trace(tmp_path, folder, name, expected):
    make_trace.put(tmp_path / folder / name, loose())
    assert only(tmp_path / folder).header.mode == expected
    (told,) = load_traces(tmp_path / folder, mode="other")
    assert told.header.mode == "other"


def test_a_mode_that_is_asked_for_does_not_change_our_own(tmp_path):
    make_trace.write(tmp_path, mode="kv_aligned")
    assert [t.header.mode for t in load_traces(tmp_path, mode="as_designed")] == ["kv_aligned"]


def test_blank_lines_and_a_missing_last_newline_are_forgiven_to_strangers(tmp_path):
    make_trace.put(tmp_path / "p0_trace.jsonl", "", loose(), "  ", loose(1))
    path = make_trace.put(tmp_path / "p1_trace.jsonl", loose(prompt="p1"))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert [len(t.records) for t in load_traces(tmp_path)] == [2, 1]


def test_one_file_may_hold_many_prompts(tmp_path):
    make_trace.put(tmp_path / "all.jsonl", *(loose(prompt=p, phase="decode") for p in ("b", "a")))
    assert [t.header.prompt for t in load_traces(tmp_path)] == ["a", "b"]


# ---- what is wrong


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "no such folder", "nowhere", "nothing there")
    make_trace.put(tmp_path / "file.jsonl", loose())
    refused(tmp_path / "file.jsonl", "no such folder", "file.jsonl", "a file")


def test_a_folder_without_traces_is_refused(tmp_path):
    refused(tmp_path, "no trace in the folder", tmp_path.name, "0 entries")
    (tmp_path / "report.json").write_text("{}")
    refused(tmp_path, "no trace in the folder", tmp_path.name, "1 entries")


@pytest.mark.parametrize("text", ["", "\n\n", " "])
def test_a_file_without_a_record_is_refused(tmp_path, text):
    (tmp_path / "p0_trace.jsonl").write_text(text)
    refused(tmp_path, "nothing in the file is a record", "p0_trace.jsonl")


def test_a_finished_trace_without_a_record_is_refused(tmp_path):
    with trace_file.TraceWriter(tmp_path / "t.jsonl", make_trace.header()):
        pass
    refused(tmp_path, "nothing in the file is a record", "t.jsonl")


def test_two_traces_of_the_same_prompt_and_mode_are_refused(tmp_path):
    path = make_trace.write(tmp_path)
    (tmp_path / "again.jsonl").write_bytes(path.read_bytes())
    refused(tmp_path, "two traces of the same prompt and mode", path.name, "again.jsonl")


def test_ours_and_a_strangers_trace_of_the_same_prompt_are_refused(tmp_path):
    make_trace.write(tmp_path)
    make_trace.put(tmp_path / "p0_trace.jsonl", loose())
    refused(tmp_path, "two traces of the same prompt and mode", "p0_trace.jsonl")


def test_a_strangers_key_twice_in_one_file_is_refused(tmp_path):
    make_trace.put(tmp_path / "p0_trace.jsonl", loose(), loose(1), loose("0", digest="b"))
    refused(tmp_path, "duplicated key", "p0_trace.jsonl, line 3", "line 1")


def test_a_strangers_key_twice_in_two_files_is_refused(tmp_path):
    make_trace.put(tmp_path / "p0_decode_trace.jsonl", loose())
    make_trace.put(tmp_path / "p0_more.jsonl", loose(phase="decode0"))
    refused(tmp_path, "duplicated key", "p0_more.jsonl, line 1", "p0_decode_trace.jsonl on line 1")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (loose(phase="warmup"), "unknown phase"),
        (loose(phase="decode-1"), "unknown phase"),
        (loose(phase=3), "unknown phase"),
        (loose(layer=1.5), "record does not fit"),
        (loose(layer="one"), "record does not fit"),
        (loose(layer=-2), "record does not fit"),
        (loose(layer=True), "record does not fit"),
        (loose(tensor=["q"]), "record does not fit"),
        (loose(digest=""), "empty name"),
        (loose(hash=17), "record does not fit"),
        ({"prompt": "p0", "layer": 0, "tensor": "q_proj"}, "record does not fit"),
        (loose(prompt="../../etc/p"), "prompt cannot name a file"),
        (loose(prompt=""), "prompt cannot name a file"),
        (loose(nz_count=-1), "negative statistic"),
        (loose(abs_sum="1.0"), "record does not fit"),
        (loose(logical_tok_idx=-4), "negative statistic"),
        ('{"prompt": "p0", "layer": 0, "tensor": "q_proj", "hash": "a", "abs_sum": NaN}', "invalid JSON"),
        ('{"prompt": "p0", "layer": 0, "tensor": "q_proj", "hash": "a", "abs_sum": 1e999}', "invalid JSON"),
        ('{"prompt": "p0", "layer": 0, "layer": 1, "tensor": "q_proj", "hash": "a"}', "invalid JSON"),
        ("{'prompt': 'p0'}", "invalid JSON"),
        ("[]", "invalid JSON"),
        ("import os", "invalid JSON"),
    ],
    ids=str,
)
def test_a_strangers_record_that_is_wrong_is_refused(tmp_path, body, what):
    make_trace.put(tmp_path / "p0_trace.jsonl", loose(9), body)
    refused(tmp_path, what, "p0_trace.jsonl, line 2")


def test_a_strangers_record_of_no_phase_is_refused(tmp_path):
    make_trace.put(tmp_path / "p0.jsonl", loose())
    refused(tmp_path, "unknown phase", "p0.jsonl, line 1", "no phase")


def test_a_strangers_trace_that_is_cut_is_refused(tmp_path):
    path = make_trace.put(tmp_path / "p0_trace.jsonl", loose(), loose(1))
    path.write_bytes(path.read_bytes()[:-9])
    refused(tmp_path, "the last line is cut", "p0_trace.jsonl, line 2")


@pytest.mark.parametrize("name", ["p0_trace.jsonl", "p0_as_designed.jsonl"])
def test_a_line_of_endless_length_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trace_file, "MAX_LINE", 200)
    first = loose() if "trace" in name else {"type": "header"} | json.loads('{"prompt": "p0"}')
    make_trace.put(tmp_path / name, first, loose(note="x" * 300))
    with pytest.raises(TraceError):
        load_traces(tmp_path)
    assert any(p.what == "line too long" and p.line == 2 for p in survey(tmp_path).problems)


@pytest.mark.parametrize("name", ["p0_trace.jsonl", "p0_as_designed.jsonl"])
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04\x95K\x00\x00\x00cposix\nsystem\n")
    refused(tmp_path, "invalid JSON", f"{name}, line 1", "utf-8")


def test_a_folder_with_a_traces_name_is_refused(tmp_path):
    (tmp_path / "p0_trace.jsonl").mkdir()
    refused(tmp_path, "not a file", "p0_trace.jsonl")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p0_trace.jsonl")
    refused(tmp_path, "not a file", "p0_trace.jsonl")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    outside = make_trace.put(tmp_path / "outside.jsonl", loose())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "p0_trace.jsonl").symlink_to(outside)
    refused(tmp_path / "in", "leads out of the folder", "p0_trace.jsonl")


def test_a_traces_folder_that_is_a_link_out_is_refused(tmp_path):
    make_trace.put(tmp_path / "outside" / "p0_trace.jsonl", loose())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "traces").symlink_to(tmp_path / "outside")
    refused(tmp_path / "in", "leads out of the folder", "p0_trace.jsonl")


def test_links_inside_the_folder_are_followed_and_loops_are_refused(tmp_path):
    make_trace.put(tmp_path / "store" / "x", loose())
    (tmp_path / "p0_trace.jsonl").symlink_to("store/x")
    assert len(only(tmp_path).records) == 1
    (tmp_path / "q_trace.jsonl").symlink_to("q_trace.jsonl")
    with pytest.raises(TraceError, match=r"not a file|cannot be read"):
        load_traces(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_refused(tmp_path):
    make_trace.put(tmp_path / "p0_trace.jsonl", loose()).chmod(0)
    refused(tmp_path, "the file cannot be read", "p0_trace.jsonl")
