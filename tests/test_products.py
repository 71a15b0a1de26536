"""Matrix products whose inputs differ: what is asked for, and what the matrix tells once it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from benchmarks.accuracy import models
from driftprobe.api import run
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
    quantised: bool = False,
) -> tuple[Bench, Any]:  # fmt: skip
    """Return a bench with one product, its input off by `noise` on the other side and its result changed there."""
    layer = None if tensor == "logits" else 0
    x, other = X.astype(BF16), (X + noise).astype(BF16)
    y, moved = (both(grid(v.astype(np.float64), quantised) @ W.T) for v in (x, other))
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


def grid(x: Float64, quantised: bool) -> Float64:
    step = float(np.abs(x).max()) / 127
    return np.rint(x / step) * step if quantised else x


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


@pytest.mark.parametrize("more", [np.tanh, lambda y: y + 0.01], ids=["activation", "branch"])
def test_an_op_that_is_more_than_its_matrix_is_not_judged_by_it(more):
    on, pair = laid_out(both=more)
    assert replayed(pair, on) is None


def test_a_product_that_quantises_what_it_is_given_is_not_judged_by_it():
    """Activations on a grid of 255 steps, as W8A8 kernels have them: each side rounds its own, within two per cent."""
    on, pair = laid_out(quantised=True)
    assert replayed(pair, on) is None


def test_a_soft_cap_rounds_three_times_more():
    def capped(y: Float64) -> Float64:
        for step in (lambda v: v / 30.0, np.tanh, lambda v: v * 30.0):
            y = step(y).astype(BF16).astype(np.float64)
        return y

    on, pair = laid_out(tensor="logits", source="final_norm", both=lambda y: capped(y.astype(BF16).astype(np.float64)))
    cap = SimpleNamespace()
    capping = Bench(on.facts, on.pairs, _With(on.payloads, cap, 30.0), {**on.constants, (None, "logits.softcap"): cap})  # type: ignore[dict-item]
    found = replayed(pair, capping)
    assert found is not None
    assert found.excess < LOCAL_LIMIT / 2


class _With:
    """Payloads with one number more."""

    def __init__(self, payloads: Any, record: object, number: float) -> None:
        self._payloads, self._record, self._number = payloads, record, number

    def get(self, record: object) -> Any:
        return np.array([self._number]) if record is self._record else self._payloads.get(record)


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


@pytest.mark.parametrize(
    ("fault", "strength", "cause"),
    [("logit_scale", 1.05, "logit_scale"), ("rope_base", 1.01, "rope_base"), ("rope_scaling", 1.001, "rope_scaling")],
)
def test_a_run_asks_for_matrices_itself_and_a_pruned_trace_says_what_the_whole_does(fault, strength, cause, tmp_path):
    """Under the floor, behind ops that round otherwise in decode."""
    engine = models.engine("mistral", "bfloat16", "sdpa", 0)
    options = RunOptions(modes=(Mode.KV_ALIGNED,), fault=fault, strength=strength, ladder="off", payload="all")
    prompt = [Prompt("p", models.tokens(64, 0))]
    whole = run(engine, prompt, options, tmp_path / "whole").judgement
    pruned = run(engine, prompt, replace(options, payload="failing"), tmp_path / "pruned").judgement
    first = whole.modes["kv_aligned"].first_failure
    assert whole.verdict is Verdict.MISMATCH
    assert first is not None and first.diagnosis is not None
    assert first.diagnosis.cause == cause
    assert (pruned.verdict, pruned.reason) == (whole.verdict, whole.reason)
    assert pruned.modes["kv_aligned"].first_failure == first
