"""Matrix products whose inputs differ: what is asked for, and what the matrix tells once it is there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from benchmarks.accuracy import models
from driftprobe.api import analyze, run
from driftprobe.fingerprint import Array, Float64
from driftprobe.judgement import Verdict
from driftprobe.local import LOCAL_LIMIT, Bench, Ground
from driftprobe.options import RunOptions
from driftprobe.plan import Mode, Prompt
from driftprobe.products import LOOKS, replayed, unlike, wanted_matrices
from driftprobe.trace import EngineFacts

BF16 = np.dtype(ml_dtypes.bfloat16)
OUT = 96
X = np.random.default_rng(1).standard_normal((1, 64))
W = np.random.default_rng(2).standard_normal((OUT, 64)) / 8
NOISE = np.random.default_rng(3).standard_normal((1, 64)) * 0.02


def laid_out(
    change: Callable[[Float64], Float64] = lambda y: y, *, noise: Float64 = NOISE, weight: bool = True,
    tensor: str = "attn_out", source: str = "attn_ctx", both: Callable[[Float64], Float64] = lambda y: y,
) -> tuple[Bench, Any]:  # fmt: skip
    """Return a bench with one product, its input off by `noise` on the other side and its result changed there."""
    layer = None if tensor == "logits" else 0
    x, other = X.astype(BF16), (X + noise).astype(BF16)
    y, moved = (both(np.asarray(v, dtype=np.float64) @ W.T) for v in (x, other))
    arrays: dict[int, Array] = {}
    pairs = {}
    for name, p, d in ((source, x, other), (tensor, y.astype(BF16), change(moved).astype(BF16))):
        records = [SimpleNamespace(step=0, layer=layer, tensor=name, dtype="bfloat16", source="") for _ in range(2)]
        arrays |= {id(record): array for record, array in zip(records, (p, d), strict=True)}
        equal = bool((p == d).all())
        pairs[(0, layer, name)] = SimpleNamespace(
            reference=records[0], candidate=records[1], drift=SimpleNamespace(equal=equal)
        )
    matrix = SimpleNamespace()
    arrays[id(matrix)] = W.astype(np.float32)
    facts = EngineFacts(name="toy", dtype="bfloat16", accumulate="float32")
    payloads = SimpleNamespace(get=lambda record: arrays[id(record)])
    constants = {(layer, f"{tensor}.weight"): matrix} if weight else {}
    return Bench(facts, pairs, payloads, constants), pairs[(0, layer, tensor)]  # type: ignore[arg-type]


def rows_stale(y: Float64) -> Float64:
    """Two of many outputs are of other weights."""
    y = y.copy()
    y[:, [5, 40]] += 0.5
    return y


@pytest.mark.parametrize("change", [lambda y: y * 1.03, rows_stale], ids=["scaled", "stale"])
def test_a_fault_behind_inputs_that_differ_is_asked_for_and_found(change):
    on, pair = laid_out(change, weight=False)
    assert replayed(pair, on) is None
    assert unlike(pair, on) is not None
    on, pair = laid_out(change)
    found = replayed(pair, on)
    assert found is not None
    assert found.ground is Ground.PRODUCT
    assert found.inputs == ("attn_ctx",)
    assert found.excess > LOCAL_LIMIT


def test_what_a_matrix_makes_of_its_inputs_is_neither_asked_for_nor_found():
    on, pair = laid_out(weight=False)
    assert unlike(pair, on) is None
    on, pair = laid_out()
    found = replayed(pair, on)
    assert found is not None
    assert 0 < found.excess < LOCAL_LIMIT


def test_an_element_that_grows_with_the_inputs_is_rounded_as_it_is_then():
    """`benign:softmax_own/qwen3_moe/bfloat16/sdpa/n11/k2/s0`: a router's logit of 0.002 here, of 0.02 there."""
    smallest = int(np.abs(X.astype(BF16).astype(np.float64) @ W.T).argmin())
    on, pair = laid_out(noise=1.0 * W[[smallest]] / np.square(W[smallest]).sum())
    found = replayed(pair, on)
    assert found is not None
    assert found.excess < LOCAL_LIMIT


def test_equal_inputs_are_left_to_the_local_test():
    on, pair = laid_out(lambda y: y * 1.03, noise=0 * NOISE)
    assert replayed(pair, on) is None
    assert unlike(pair, on) is None


def test_an_op_that_is_more_than_its_matrix_is_not_judged_by_it():
    on, pair = laid_out(both=np.tanh)
    assert replayed(pair, on) is None


def test_other_ops_are_not_asked_for():
    on, pair = laid_out(lambda y: y * 1.03, tensor="mlp_out", source="ffn_norm", weight=False)
    assert unlike(pair, on) is None


def test_logits_are_given_by_the_last_norm():
    on, pair = laid_out(rows_stale, tensor="logits", source="final_norm")
    found = replayed(pair, on)
    assert found is not None
    assert found.excess > LOCAL_LIMIT


def test_of_many_ops_those_are_asked_for_that_are_most_unlike():
    record = SimpleNamespace(order=None)
    cells = [SimpleNamespace(layer=i, tensor="attn_out", unlike=float(1 + i), reference=record) for i in range(20)]
    judged = SimpleNamespace(first_failure=None, failures=(), cells=cells, file="a.jsonl")
    modes = {"as_designed": SimpleNamespace(prompts=[judged])}
    wanted = wanted_matrices(SimpleNamespace(modes=modes))  # type: ignore[arg-type]
    assert wanted == {"a.jsonl": [(i, "attn_out") for i in range(19, 19 - LOOKS, -1)]}


def test_a_run_asks_for_the_matrices_itself_and_its_pruned_traces_say_the_same(tmp_path):
    """Logits × 1.05 in decode alone, behind a last norm that rounds otherwise there: 1.6 × the floor, limit 4."""
    engine = models.engine("mistral", "bfloat16", "sdpa", 0)
    options = RunOptions(modes=(Mode.KV_ALIGNED,), fault="logit_scale", strength=1.05, ladder="off", payload="failing")
    found = run(engine, [Prompt("p", models.tokens(64, 0))], options, tmp_path / "run")
    first = found.judgement.modes["kv_aligned"].first_failure
    assert found.judgement.verdict is Verdict.MISMATCH
    assert first is not None
    assert first.tensor == "logits"
    assert first.diagnosis is not None
    assert first.diagnosis.cause == "logit_scale"
    again = analyze(tmp_path / "run").judgement
    assert (again.verdict, again.reason) == (found.judgement.verdict, found.judgement.reason)
