"""driftprobe.probe and driftprobe.analyze: the same result object from a model object, a folder, or traces."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import driftprobe  # noqa: E402
from driftprobe import Verdict  # noqa: E402
from driftprobe.errors import EngineError, ModelError, OutputError, UsageError  # noqa: E402

IDS = {"a": [5, 7, 11]}


@pytest.fixture(scope="module")
def model() -> object:
    """A random Llama of three layers, without a tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def result(model: object) -> driftprobe.Result:
    return driftprobe.probe(model, IDS)


def test_a_model_object_and_token_ids_give_a_verdict(result: driftprobe.Result) -> None:
    assert result.verdict in {Verdict.NO_DRIFT, Verdict.STRUCTURAL_DRIFT}, result.reason
    assert result.first_failure is None
    assert set(result.judgement.modes) == {"as_designed", "kv_aligned"}


def test_write_then_analyze_gives_the_same_reports(result: driftprobe.Result, tmp_path: Path) -> None:
    final = result.write(tmp_path / "kept")
    assert final.is_file()
    again = driftprobe.analyze(tmp_path / "kept")
    assert again.verdict is result.verdict
    assert again.reports() == result.reports()


def test_write_refuses_a_folder_of_somebody_else(result: driftprobe.Result, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match=r"mine\.txt"):
        result.write(tmp_path)


def test_a_list_of_prompts_is_named_in_order(model: object) -> None:
    found = driftprobe.probe(model, [[1, 2], [3]], mode="as_designed", ladder="off")
    assert [p.prompt for p in found.judgement.modes["as_designed"].prompts] == ["p0", "p1"]


def test_built_in_prompts_have_exact_token_counts() -> None:
    found = driftprobe.probe("builtin:tiny", mode="as_designed", ladder="off")
    lengths = {p.prompt: p.prompt_len for p in found.judgement.modes["as_designed"].prompts}
    assert lengths == {"p0_short": 2, "p6_len_16": 16, "p6_len_32": 32}


def test_a_verdict_is_never_tested_for_truth(result: driftprobe.Result) -> None:
    with pytest.raises(TypeError):
        bool(result.verdict)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [({"a": []}, "empty prompt"), ({"a": [64]}, "not a token"), ({"a": [1] * 64}, "too long"), ({"../a": [1]}, "name")],
)
def test_bad_prompts(model: object, prompts: dict[str, list[int]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        driftprobe.probe(model, prompts)


def test_the_longest_prompt_that_fits_runs_without_longer_prefills(model: object) -> None:
    found = driftprobe.probe(model, {"a": [1] * 63}, mode="as_designed", ladder="off")
    controls = found.judgement.modes["as_designed"].prompts[0].controls
    assert found.verdict in {Verdict.NO_DRIFT, Verdict.STRUCTURAL_DRIFT}
    assert not any(arm.startswith("E") for arm in controls) and "N1" in controls


def test_text_without_a_tokenizer(model: object) -> None:
    with pytest.raises(ModelError, match="tokenizer missing"):
        driftprobe.probe(model, {"a": "text"})


def test_dtype_of_a_model_object_is_its_own(model: object) -> None:
    with pytest.raises(UsageError, match="keeps its own dtype"):
        driftprobe.probe(model, IDS, dtype="bfloat16")


def test_nan_weights_are_a_finding_not_a_crash(model: object, tmp_path: Path) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    found = driftprobe.probe(broken, IDS, out=tmp_path / "run")
    assert found.verdict is Verdict.NOT_AVAILABLE
    assert "NaN" in found.reason and "layer 1 mlp_out" in found.reason
    json.loads((tmp_path / "run" / "verdict.json").read_text(), parse_constant=pytest.fail)


def test_a_model_that_fails_is_an_engine_error(model: object, tmp_path: Path) -> None:
    broken = copy.deepcopy(model)
    engine_sees = broken.model.layers[2].mlp
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError("kernel fell over")

    engine_sees.register_forward_pre_hook(fail)
    with pytest.raises(EngineError, match="kernel fell over"):
        driftprobe.probe(broken, IDS, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_limits_what_is_recorded(model: object) -> None:
    found = driftprobe.probe(model, IDS, mode="kv_aligned", layers=[1], ladder="off")
    assert {c.layer for c in found.judgement.modes["kv_aligned"].cells} == {None, 1}
    assert found.verdict in {Verdict.NO_DRIFT, Verdict.STRUCTURAL_DRIFT}, found.reason


def test_several_steps_are_compared_each(model: object) -> None:
    found = driftprobe.probe(model, IDS, mode="kv_aligned", steps=3, ladder="off")
    assert {c.step for c in found.judgement.modes["kv_aligned"].cells} == {0, 1, 2}


@pytest.mark.parametrize("payload", ["none", "failing", "all"])
def test_the_verdict_does_not_depend_on_payloads(model: object, payload: str, tmp_path: Path) -> None:
    found = driftprobe.probe(model, IDS, mode="kv_aligned", fault="k_rows_swapped", payload=payload, out=tmp_path / "r")
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None and (found.first_failure.layer, found.first_failure.tensor) == (1, "k_cache")
    kept = list((tmp_path / "r").rglob("*.safetensors"))
    assert bool(kept) is (payload != "none")


@pytest.mark.parametrize("steps", [1, 4])
def test_a_prefill_that_depends_on_its_length_is_found_at_any_number_of_steps(model: object, steps: int) -> None:
    """Scores 5 % too large in prefills of exactly four tokens, P's own at step 0: decode is right, prefill is not."""
    broken = copy.deepcopy(model)
    scale = broken.model.layers[0].self_attn.scaling

    def before(_model: object, _args: object, call: dict[str, object]) -> None:
        for layer in broken.model.layers:
            layer.self_attn.scaling = scale * (1.05 if call["input_ids"].shape[1] == 4 else 1.0)

    broken.register_forward_pre_hook(before, with_kwargs=True)
    found = driftprobe.probe(broken, IDS, mode="kv_aligned", steps=steps, ladder="off")
    assert found.verdict is Verdict.MISMATCH, found.reason
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.tensor) == (0, "attn_scores")


def test_one_text_is_not_a_list_of_prompts(model: object) -> None:
    with pytest.raises(UsageError, match="not a list"):
        driftprobe.probe(model, "hello")


def test_the_other_modes_command_plants_the_same_fault_as_strongly():
    result = driftprobe.probe(
        "builtin:tiny", {"a": [72, 105, 33]}, mode="kv_aligned", fault="attn_scale", strength=1.01, ladder="off"
    )
    assert "--fault attn_scale --fault-strength 1.01" in result.reports()["B3_66_V2_FINAL_REPORT.md"]
