"""Payloads: whole tensors come back as they were, and nothing else comes in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import make_trace
from driftprobe.errors import OutputError, TraceError
from driftprobe.fingerprint import DTYPES, Array
from driftprobe.payload import Payloads, write_payloads
from driftprobe.trace import Record

FILE = "payloads/x.safetensors"


def stored(folder: Path, array: Array, name: str = "t") -> Record:
    """A record whose tensor lies in a payload file."""
    write_payloads(folder / FILE, {name: array})
    return make_trace.record("P", None, "embed", array, payload=f"{FILE}#{name}")


def refused(folder: Path, record: Record, what: str, measured: str = "") -> None:
    with pytest.raises(TraceError) as caught:
        Payloads(folder).get(record)
    where = (record.payload or "").split("#")[0]
    make_trace.assert_five_parts(caught.value, what=what, where=where, measured=measured)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (), (1, 1, 6)], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_round_trip(tmp_path, name, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(DTYPES[name])
    found = Payloads(tmp_path).get(stored(tmp_path, array))
    assert found is not None
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize("name", [name for name in DTYPES if "float" in name])
def test_non_finite_values_and_signed_zero_survive(tmp_path, name):
    array = np.array([np.nan, np.inf, -np.inf, -0.0, 1.0]).astype(DTYPES[name])
    found = Payloads(tmp_path).get(stored(tmp_path, array))
    assert found is not None
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "spoiled", [np.arange(12.0).reshape(3, 4).T, np.arange(24.0)[::2], np.arange(5.0).astype(">f8")]
)
def test_layout_does_not_matter(tmp_path, spoiled):
    found = Payloads(tmp_path).get(stored(tmp_path, spoiled))
    assert np.array_equal(found, spoiled)


def test_a_record_without_a_payload_has_none(tmp_path):
    assert Payloads(tmp_path).get(make_trace.record("P", None, "embed")) is None


@pytest.mark.parametrize(
    "place", ["../x.safetensors", "a/../../x.safetensors", "{root}/x.safetensors", "~/x.safetensors"]
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, place):
    """Payloads checks for itself: a Record may come from elsewhere than a checked trace."""
    array = np.arange(4.0)
    write_payloads(tmp_path / "x.safetensors", {"t": array})
    place = place.format(root=tmp_path)
    refused(tmp_path / "in", make_trace.record("P", None, "embed", array, payload=f"{place}#t"), "cannot be read")


def test_a_link_that_leaves_the_folder_is_refused(tmp_path):
    record = stored(tmp_path, np.arange(4.0))
    (tmp_path / "in" / "payloads").mkdir(parents=True)
    (tmp_path / "in" / FILE).symlink_to(tmp_path / FILE)
    refused(tmp_path / "in", record, "cannot be read")


def test_a_folder_link_that_leaves_the_folder_is_refused(tmp_path):
    record = stored(tmp_path, np.arange(4.0))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "payloads").symlink_to(tmp_path / "payloads")
    refused(tmp_path / "in", record, "cannot be read")


@pytest.mark.parametrize("reference", ["payloads/none.safetensors#t", "payloads#t", "#t", "a\0b#t", "x" * 5000 + "#t"])
def test_a_missing_file_is_refused(tmp_path, reference):
    stored(tmp_path, np.arange(4.0))
    record = make_trace.record("P", None, "embed", np.arange(4.0), payload=reference)
    with pytest.raises(TraceError, match="payload file cannot be read"):
        Payloads(tmp_path).get(record)


def test_a_missing_tensor_is_refused(tmp_path):
    record = stored(tmp_path, np.arange(4.0))
    refused(tmp_path, replace(record, payload=f"{FILE}#other"), "no such tensor")


def test_a_wrong_hash_is_refused(tmp_path):
    record = stored(tmp_path, np.arange(4.0))
    write_payloads(tmp_path / FILE, {"t": np.arange(4.0) + 1e-9})
    refused(tmp_path, record, "payload does not hash to its record", "0x")


@pytest.mark.parametrize("changes", [{"dtype": "int64"}, {"shape": (2, 2)}, {"shape": None}])
def test_another_dtype_or_shape_is_refused(tmp_path, changes):
    record = stored(tmp_path, np.arange(4.0))
    refused(tmp_path, replace(record, **changes), "payload of another dtype or shape", "float64 [4]")


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    record = stored(tmp_path, np.arange(4.0))
    data = (tmp_path / FILE).read_bytes()
    for size in range(len(data)):
        (tmp_path / FILE).write_bytes(data[:size])
        refused(tmp_path, record, "cannot be read")


@pytest.mark.parametrize("data", [b"\x80\x04\x95cposix\nsystem\n", b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}"])
def test_a_file_of_another_kind_is_refused(tmp_path, data):
    record = stored(tmp_path, np.arange(4.0))
    (tmp_path / FILE).write_bytes(data)
    refused(tmp_path, record, "cannot be read")


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "payloads").write_text("")
    with pytest.raises(OutputError) as caught:
        write_payloads(tmp_path / FILE, {"t": np.arange(4.0)})
    make_trace.assert_five_parts(caught.value, what="cannot write payloads", where="x.safetensors")


def test_writing_leaves_no_half_file_behind(tmp_path):
    stored(tmp_path, np.arange(4.0))
    assert [path.name for path in (tmp_path / "payloads").iterdir()] == ["x.safetensors"]
