"""Faults of what the cache holds: verdict, tap, reading, cause, parameters; and lossy caches that are declared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from driftprobe import analyze  # noqa: E402
from driftprobe.api import run  # noqa: E402
from driftprobe.causes import agree  # noqa: E402
from driftprobe.compare import NoPayloads  # noqa: E402
from driftprobe.diagnose import diagnose  # noqa: E402
from driftprobe.engines.hf import HFEngine, open_engine  # noqa: E402
from driftprobe.engines.hf.planting.cache import PLANTERS, Written, _shift, _swap  # noqa: E402
from driftprobe.errors import UsageError  # noqa: E402
from driftprobe.faults import FAULTS, Expected  # noqa: E402
from driftprobe.faults.cache import FAULTS as MINE  # noqa: E402
from driftprobe.hypotheses.rounding import rounded  # noqa: E402
from driftprobe.judgement import Diagnosis, RowCheck, Verdict  # noqa: E402
from driftprobe.options import RunOptions  # noqa: E402
from driftprobe.plan import Mode  # noqa: E402
from driftprobe.prompts import make_prompts  # noqa: E402
from driftprobe.result import Result  # noqa: E402
from driftprobe.row_causes import cause_of_rows  # noqa: E402
from driftprobe.verdict import judge  # noqa: E402
from make_trace import LENGTH, Site, toy, toy_values  # noqa: E402
from test_engine_hf import KNOWN, OLD  # noqa: E402

CASES = [(fault.name, strength) for fault in MINE for strength in fault.strengths]
SHORT, LONG = 11, 37
OTHERS = [name for name in ("qwen3", "gemma2", "mistral", "gpt2", "phi3") if name in KNOWN and not OLD]
CANNOT = {
    ("gpt2", "k_cached_unrotated"): "no rotary embedding",
    ("gemma2", "layer_offset"): "layer 0 holds",
    ("gemma2", "blocks_exchanged"): "a prefill of 11 tokens",
    ("mistral", "blocks_exchanged"): "a prefill of 11 tokens",
}


def planted(
    engine: HFEngine, fault: str, strength: float, count: int, folder: Path, **options: object
) -> tuple[Expected, Result]:
    prompts = make_prompts({"a": models.tokens(count)}, engine)
    with engine.plant(fault, strength) as expected:
        return expected, run(engine, prompts, RunOptions(modes=(Mode.KV_ALIGNED,), **options), folder)  # type: ignore[arg-type]


def check(expected: Expected, result: Result) -> None:
    (judged,) = result.judgement.modes["kv_aligned"].prompts
    first = judged.first_failure
    assert judged.verdict is Verdict.MISMATCH, judged.reason
    assert first is not None
    assert (first.layer, first.tensor, judged.reading.value) == (expected.layer, expected.tensor, expected.reading)
    found = first.diagnosis
    assert found is not None, first.root_cause
    assert found.cause == expected.cause, first.root_cause
    assert agree(expected.cause, expected.parameters, found.parameters), (expected.parameters, found.parameters)


def test_every_fault_of_the_family_has_a_planter():
    assert {fault.name for fault in MINE} == PLANTERS.keys()


@pytest.mark.parametrize(("fault", "strength"), CASES)
def test_the_builtin_model_tells_every_fault_and_its_parameters(fault, strength, tmp_path):
    expected, result = planted(open_engine(attn="sdpa"), fault, strength, LONG, tmp_path / "r")
    declared = FAULTS[fault]
    assert (expected.layer, expected.tensor, expected.reading, expected.cause) == (
        declared.layer, declared.tensor, declared.reading, declared.cause,
    )  # fmt: skip
    check(expected, result)


def test_a_prefill_in_chunks_on_the_same_wrong_cache_does_not_vouch_for_its_rows(tmp_path):
    """With 16 tokens the rows of P@chunks have been shifted once as well: decode's rows hash as theirs."""
    check(*planted(open_engine(attn="sdpa"), "cache_shift", 1.0, 16, tmp_path / "r"))


@pytest.mark.parametrize("fault", [fault.name for fault in MINE])
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_tell_every_fault(name, fault, tmp_path):
    engine = HFEngine(models.build(name, attn="eager" if name == "gemma2" else "sdpa"))
    beyond = fault == "blocks_exchanged" or (name, fault) == (
        "gemma2",
        "layer_offset",
    )  # in the window layers are alike
    count = LONG if beyond else SHORT
    if (name, fault) in CANNOT:
        with pytest.raises(UsageError, match=CANNOT[(name, fault)]):
            planted(engine, fault, FAULTS[fault].strengths[0], count, tmp_path / "r")
        return
    check(*planted(engine, fault, FAULTS[fault].strengths[0], count, tmp_path / "r"))


@pytest.mark.parametrize("name", ["mistral", "gpt_neox", "cohere"])
def test_unrotated_keys_are_known_in_a_window_in_part_of_the_dimensions_and_in_other_pairs(name, tmp_path):
    if name not in KNOWN or OLD:
        pytest.skip(f"no {name} with a rotary embedding of its own in this transformers")
    check(*planted(HFEngine(models.build(name)), "k_cached_unrotated", 1.0, LONG, tmp_path / "r"))


@pytest.mark.parametrize("fault", ["cache_shift", "stale_row", "rows_int8", "k_cached_unrotated", "axes_exchanged"])
def test_float64_tells_them_as_well(fault, tmp_path):
    check(*planted(HFEngine(models.build("llama", dtype="float64")), fault, 1.0, SHORT, tmp_path / "r"))


@pytest.mark.parametrize("fault", ["cache_shift_back", "stale_row", "last_row_twice", "overwrite_previous"])
def test_a_prompt_of_two_tokens_is_enough(fault, tmp_path):
    check(*planted(HFEngine(models.build("llama")), fault, 1.0, 2, tmp_path / "r"))


@pytest.mark.parametrize("fault", ["k_rows_swapped", "k_row_zero", "rows_fp8", "kv_exchanged", "overwrite_previous"])
def test_a_cache_of_latents_says_that_a_fault_of_k_and_v_cannot_act(fault, tmp_path):
    if "deepseek_v3" not in KNOWN:
        pytest.skip("no deepseek_v3 in this transformers")
    with pytest.raises(UsageError, match="latents"):
        planted(HFEngine(models.build("deepseek_v3")), fault, 1.0, SHORT, tmp_path / "r")


def test_a_fault_of_the_decode_step_leaves_nothing_behind():
    update = transformers.DynamicCache.update
    engine = HFEngine(models.build("llama"))
    with engine.plant("overwrite_previous"):
        assert transformers.DynamicCache.update is not update
    assert transformers.DynamicCache.update is update


def test_lists_of_keys_and_values_are_changed_too():
    """DynamicCache before transformers 4.56 keeps `key_cache` and `value_cache`."""
    rows = torch.arange(24.0).reshape(1, 2, 3, 4) + 1
    lists = SimpleNamespace(key_cache=[rows.clone(), rows.clone()], value_cache=[rows.clone(), rows.clone()],
                            get_seq_length=lambda: 5)  # fmt: skip
    assert _shift(1)(Written("cache_shift", None, lists, 1.0)) == {"offset": 1}  # type: ignore[arg-type]
    assert torch.equal(lists.value_cache[1][:, :, 1:], rows[:, :, :-1])
    assert not lists.key_cache[0][:, :, 0].any()
    assert _swap(0)(Written("k_rows_swapped", None, lists, 1.0)) == {"rows": (2, 4)}  # type: ignore[arg-type]


# ---- what a kept run still tells


KEPT = ["kv_exchanged", "stale_row", "other_layer_cache", "rows_int8", "axes_exchanged", "v_quant_scale", "cache_shift"]


@pytest.mark.parametrize("fault", KEPT)
def test_a_run_that_kept_failing_tensors_alone_is_diagnosed_as_one_that_kept_all(fault, tmp_path):
    engine, strength = HFEngine(models.build("llama")), FAULTS[fault].strengths[-1]
    expected, whole = planted(engine, fault, strength, SHORT, tmp_path / "all", payload="all")
    _, kept = planted(engine, fault, strength, SHORT, tmp_path / "failing", payload="failing")
    check(expected, kept)
    again = analyze(tmp_path / "failing").first_failure
    assert again is not None
    assert again == kept.first_failure == whole.first_failure


# ---- hashes alone


def rows_changed(change, tensor="k_cache"):
    def changed(site: Site, array: np.ndarray) -> np.ndarray:
        mine = site.arm in ("D", "D'") and (site.layer, site.tensor) == (1, tensor)
        return change(array.copy()) if mine else array

    return changed


def shifted(rows: np.ndarray) -> np.ndarray:
    rows[1:LENGTH] = rows[: LENGTH - 1].copy()
    rows[0] = 0
    return rows


def overwritten(rows: np.ndarray) -> np.ndarray:
    rows[LENGTH - 1] = rows[LENGTH]
    return rows


def swapped(rows: np.ndarray) -> np.ndarray:
    rows[[0, 3]] = rows[[3, 0]]
    return rows


def doubled(rows: np.ndarray) -> np.ndarray:
    rows[1] = rows[2]
    return rows


def emptied(rows: np.ndarray) -> np.ndarray:
    rows[2] = 0
    return rows


def in_blocks(rows: np.ndarray) -> np.ndarray:
    rows[:4] = rows[[2, 3, 0, 1]]
    return rows


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("change", "cause", "parameters"),
    [
        (shifted, "cache_shift", {"offset": 1}),
        (overwritten, "cache_overwritten", {"row": LENGTH - 1, "source": LENGTH}),
        (swapped, "cache_swapped", {"rows": (0, 3)}),
        (doubled, "cache_duplicated", {"row": 1, "source": 2}),
        (emptied, "cache_zero", {"rows": (2,)}),
        (in_blocks, "cache_blocks", {"block": 2}),
    ],
)
def test_hashes_alone_tell_the_same_cause_as_whole_tensors(change, cause, parameters, whole):
    trace, arrays = toy(rows_changed(change))
    payloads = arrays if whole else NoPayloads()
    found = diagnose(judge([trace], payloads), [trace], payloads).first_failure
    assert found is not None
    assert found.diagnosis == Diagnosis(cause, parameters, 1, "k_cache", 0.0, 1.0)


def checked(**more: object) -> RowCheck:
    body: dict[str, object] = {"prompt": "a", "step": 0, "layer": 1, "tensor": "k_cache", "compared": 32, "equal": 0}
    return RowCheck(**(body | more))  # type: ignore[arg-type]


def test_rows_that_match_nothing_prove_no_cause():
    assert cause_of_rows(checked(changed=(3,), zero=(2,)), 32) is None
    assert cause_of_rows(checked(), 32) is None
    assert cause_of_rows(checked(other_layer=((0, 0), (1, 2))), 32) is None


def test_a_roll_is_a_shift_and_no_block_table():
    rolled = tuple(((i + 1) % 32, i) for i in range(32))
    assert cause_of_rows(checked(moved=rolled), 32) == ("cache_shift", {"offset": 1})


def test_rows_equal_in_both_blocks_do_not_hide_the_blocks():
    moved = tuple((i, i ^ 16) for i in range(32) if i not in (3, 19, 20, 4))
    assert cause_of_rows(checked(moved=moved), 32) == ("cache_blocks", {"block": 16})


# ---- rounding


def test_a_value_between_two_codes_may_go_either_way():
    middle = np.array(
        [[[1.0, 0.5 / 127 * (1 + 1e-9)]]]
    )  # an int8 grid of step 1/127 has its first middle at half of it
    lower, upper = next(both for dtype, both in rounded(middle, 1, 1e-6) if dtype == "int8")
    assert (lower[0, 0, 1], upper[0, 0, 1]) == (0.0, pytest.approx(1 / 127))
    lower, upper = next(both for dtype, both in rounded(middle, 1, 1e-12) if dtype == "int8")
    assert lower[0, 0, 1] == upper[0, 0, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("fault", "cast"), [("rows_fp8", "float8_e4m3fn"), ("rows_int8", "int8")])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_coarser_cache_that_is_declared_is_no_mismatch(name, fault, cast, dtype, tmp_path):
    if name not in KNOWN:
        pytest.skip(f"no {name} in this transformers")
    casts = {"k_cache": cast, "v_cache": cast}
    _, result = planted(HFEngine(models.build(name, dtype=dtype), casts=casts), fault, 1.0, SHORT, tmp_path / "r")
    assert result.verdict is Verdict.STRUCTURAL_DRIFT, result.reason
    assert result.judgement.modes["kv_aligned"].cells[0].reference.tensor == "embed"


@pytest.mark.parametrize("fault", ["cache_shift", "kv_exchanged", "other_batch_row"])
def test_a_gross_fault_of_a_declared_coarser_cache_is_still_found(fault, tmp_path):
    casts = {"k_cache": "int8", "v_cache": "int8"}
    expected, result = planted(HFEngine(models.build("llama"), casts=casts), fault, 1.0, SHORT, tmp_path / "r")
    check(expected, result)


@pytest.mark.parametrize("tensor", ["k_cache", "v_cache"])
def test_k_and_v_are_exchanged_in_an_engine_that_keeps_its_keys_in_another_order(tensor):
    """It rotates neighbouring dimensions: what is recorded as i and i + 32 stands side by side in its cache."""
    order = np.concatenate([np.arange(0, 64, 2), np.arange(1, 64, 2)])
    other = {"k_cache": "v_cache", "v_cache": "k_cache"}[tensor]

    def changed(site: Site, array: np.ndarray) -> np.ndarray:
        if (site.layer, site.tensor) != (1, tensor) or site.arm not in {"D", "D'"}:
            return array
        theirs = toy_values(replace(site, tensor=other), np.dtype(np.float32))
        reordered = theirs[..., order if tensor == "k_cache" else np.argsort(order)]
        return np.concatenate([reordered[:LENGTH], array[LENGTH:]])

    trace, arrays = toy(changed)
    found = diagnose(judge([trace], arrays), [trace], arrays).first_failure
    assert found is not None
    assert found.diagnosis == Diagnosis("cache_kv_exchanged", {}, 1, tensor, 0.0, 1.0)
