"""The noise arms of the Hugging Face engine: a declared cast acts where it is declared, and nowhere before."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from driftprobe.compare import exact_drift, without_shift  # noqa: E402
from driftprobe.engines.hf import HFEngine  # noqa: E402
from driftprobe.engines.hf.attention import attention_functions  # noqa: E402
from driftprobe.fingerprint import CAST_ROUNDOFF, UNIT_ROUNDOFF  # noqa: E402
from driftprobe.judgement import Verdict  # noqa: E402
from test_cache_faults import planted  # noqa: E402
from test_engine_hf import KNOWN, run_arms  # noqa: E402

FINE = 100 * UNIT_ROUNDOFF["float32"]
"""More than float32 does in the first layer of these models, and far less than any cast here."""
KERNELS = ["eager", "sdpa"]


def noise(casts: dict[str, str], attn: str = "eager", name: str = "llama") -> dict[tuple[int | None, str], float]:
    """Return what arm N1 drifts by, tap by tap, in a float32 model with these casts declared."""
    if name not in KNOWN:
        pytest.skip(f"no {name} in this transformers")
    found = run_arms(HFEngine(models.build(name, attn=attn), casts=casts), 16, "P", "N1")
    drifts = {}
    for p, n in zip(found["P"], found["N1"], strict=True):
        other = without_shift(p.array, n.array) if p.tensor == "attn_scores" else n.array
        drifts[(p.layer, p.tensor)] = exact_drift(p.array, other).value or 0.0
    return drifts


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("cast", ["float16", "bfloat16", "int8"])
def test_a_cast_of_queries_and_keys_is_felt_behind_the_scores_and_not_before(cast: str, name: str) -> None:
    found = noise({"attn_scores": cast}, name=name)
    assert found[(0, "attn_ctx")] > CAST_ROUNDOFF[cast] / 20
    assert found[(1, "attn_norm")] > CAST_ROUNDOFF[cast] / 50
    assert max(found[(0, tap)] for tap in ("q_rope", "k_rope", "k_cache", "v_cache")) < FINE


@pytest.mark.parametrize("attn", KERNELS)
def test_every_kernel_that_is_called_feels_it(attn: str) -> None:
    found = noise({"attn_scores": "float16"}, attn)
    assert found[(0, "attn_ctx")] > UNIT_ROUNDOFF["float16"] / 20 > 2 * FINE
    assert found[(0, "q_rope")] < FINE


def test_a_cast_of_values_is_felt_in_what_they_are_weighted_to_alone() -> None:
    found = noise({"attn_ctx": "bfloat16"})
    assert found[(0, "attn_ctx")] > UNIT_ROUNDOFF["bfloat16"] / 20
    assert found[(0, "attn_probs")] < FINE and found[(0, "v_cache")] < FINE


@pytest.mark.parametrize("attn", KERNELS)
def test_without_a_cast_noise_stays_that_of_the_models_dtype(attn: str) -> None:
    found = noise({}, attn)
    assert 0.0 < found[(0, "attn_ctx")] < FINE


@pytest.mark.parametrize("attn", KERNELS)
def test_attention_is_afterwards_what_it_was(attn: str) -> None:
    model = models.build("llama", attn=attn)
    before = [mapping[name] for mapping, name in attention_functions(model.modules())]
    run_arms(HFEngine(model, casts={"attn_scores": "float16"}), 5, "N1")
    assert before and [mapping[name] for mapping, name in attention_functions(model.modules())] == before


@pytest.mark.parametrize(("fault", "strength"), [("attn_scale", 1.05), ("rope_plus_one", 1.0), ("k_rows_swapped", 1.0)])
def test_a_fault_beside_a_declared_cast_is_still_found_where_it_is(fault: str, strength: float, tmp_path: Path) -> None:
    engine = HFEngine(models.build("llama"), casts={"attn_scores": "float16"})
    expected, result = planted(engine, fault, strength, 19, tmp_path / "run", ladder="off")
    first = result.first_failure
    assert result.verdict is Verdict.MISMATCH, result.reason
    assert first is not None and (first.layer, first.tensor) == (expected.layer, expected.tensor)
