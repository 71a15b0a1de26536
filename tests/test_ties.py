"""A choice of experts that rounding turns is no bug; one that it cannot turn is, and so is a bug behind a flip."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from driftprobe.compare import NoPayloads
from driftprobe.fingerprint import Array
from driftprobe.judgement import Judgement, TraceJudgement, Verdict
from driftprobe.ties import _numbers
from driftprobe.verdict import judge
from make_trace import LAYER_TAPS, LENGTH, Change, Site, both, both_payloads, drifting, record, toy, unchanged

TAPS = (*LAYER_TAPS, "router_logits", "expert_ids")
CLOSE, FAR = 1e-6, 0.5
"""Margins between the second and third expert: what rounding moves, and what it does not."""


def router(margin: float, drift: float = 1e-7) -> Change:
    """Layer 1 routes to two of four experts, the second and third `margin` apart; decode's logits drift."""

    def change(site: Site, array: Array) -> Array:
        decodes = site.arm[0] in "DA"
        if site.tensor == "router_logits":
            logits = np.array([[2.0, 1.0 + margin, 1.0, -1.0]])
            off = drift * np.array([1.0, -1.0, 1.0, -1.0]) if decodes or site.arm == "T" else 0.0
            return (logits + off).astype(np.float32)
        if site.tensor == "expert_ids":
            return np.array([[0, 2 if decodes and site.layer == 1 else 1]])
        return array

    return change


BEHIND = drifting(0.5, start=(1, "mlp_out"), caches=False)
"""Everything behind the choice of layer 1 differs, but in arm T."""


def judged(
    *changes: Change, whole: bool = True, arms: tuple[str, ...] = ("E1", "T"), steps: int = 1
) -> tuple[Judgement, TraceJudgement]:
    trace, arrays = toy(both(*changes), taps=TAPS, arms=arms, mode="kv_aligned", steps=steps)
    found = judge([trace], arrays if whole else NoPayloads())
    return found, found.modes["kv_aligned"].prompts[0]


@pytest.mark.parametrize("whole", [True, False])
def test_a_near_tie_is_structural_and_said_with_layer_experts_and_margin(whole):
    found, item = judged(router(CLOSE), BEHIND, whole=whole)
    assert found.verdict is Verdict.STRUCTURAL_DRIFT, found.reason
    (flip,) = item.flips
    assert (flip.layer, flip.left, flip.came) == (1, (1,), (2,))
    assert flip.margin == pytest.approx(CLOSE, rel=0.2) and flip.margin <= flip.allowed
    assert "near tie" in found.reason and "layer 1" in found.reason
    assert {c.candidate.arm for c in item.cells if (c.layer, c.tensor) == (1, "mlp_out")} == {"T"}
    assert {c.candidate.arm for c in item.cells if (c.layer, c.tensor) == (1, "router_logits")} == {"D"}


def test_a_wide_margin_is_a_mismatch_at_the_choice():
    found, item = judged(router(FAR), BEHIND)
    assert found.verdict is Verdict.MISMATCH and item.flips == ()
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.tensor) == (1, "expert_ids")


@pytest.mark.parametrize("whole", [True, False])
def test_experts_that_prefill_takes_against_its_own_logits_are_a_mismatch_at_the_choice(whole):
    def chosen(site: Site, array: Array) -> Array:
        wrong = site.tensor == "expert_ids" and site.layer == 1 and site.arm[0] not in "DA"
        return np.array([[2, 3]]) if wrong else unflipped(site, array)

    found, item = judged(router(FAR), chosen, BEHIND, whole=whole)
    assert found.verdict is Verdict.MISMATCH and item.flips == (), found.reason
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.tensor) == (1, "expert_ids")


def test_logits_beyond_their_floor_are_a_mismatch_and_no_tie():
    found, item = judged(router(CLOSE, drift=1e-3), BEHIND)
    assert found.verdict is Verdict.MISMATCH and item.flips == ()
    assert found.first_failure is not None and found.first_failure.tensor == "router_logits"


def test_without_arm_t_nothing_behind_a_flip_is_told():
    found, item = judged(router(CLOSE), BEHIND, arms=("E1",))
    assert found.verdict is Verdict.NOT_AVAILABLE
    assert item.flips and "arm T" in found.reason


def test_a_bug_behind_a_flip_is_found_with_routing_aligned():
    found, item = judged(router(CLOSE), BEHIND, drifting(0.01, arms=("T",), start=(1, "x_out"), caches=False))
    assert found.verdict is Verdict.MISMATCH and item.flips
    first = found.first_failure
    assert first is not None and (first.layer, first.tensor, first.arm) == (1, "x_out", "T")


def test_a_bug_before_a_flip_is_found_where_it_is():
    found, _ = judged(router(CLOSE), BEHIND, drifting(0.01, start=(0, "attn_ctx"), caches=False), router(CLOSE))
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.tensor) == (0, "attn_ctx")


def test_a_longer_prefill_that_flips_is_no_guilty_control():
    def flipped(site: Site, array: Array) -> Array:
        ids = site.tensor == "expert_ids" and site.arm == "E1" and site.layer == 1
        return np.array([[0, 2]]) if ids else array

    clean = router(CLOSE, drift=0.0)
    alike: Change = lambda site, array: np.array([[0, 1]]) if site.tensor == "expert_ids" else array  # noqa: E731
    behind = drifting(0.5, arms=("E1",), start=(1, "mlp_out"), caches=False)
    found, _ = judged(clean, alike, flipped, behind)
    assert found.verdict is Verdict.NO_DRIFT, found.reason


def test_a_sketch_of_few_elements_holds_them_all():
    array = np.random.default_rng(0).standard_normal((1, 40))
    assert np.array_equal(_numbers(record("P", 0, "router_logits", array), NoPayloads()), array[0])  # type: ignore[arg-type]
    assert _numbers(record("P", 0, "router_logits", np.ones((1, 65))), NoPayloads()) is None


# ---- models


def near_tie(seed: int) -> Any:
    """A mixture of two experts, one chosen, whose router rows are one ulp apart in one element."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from models import build

    model = build("mixtral", seed=seed, num_local_experts=2, num_experts_per_tok=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gate.weight"):
                weight[1] = weight[0]
                weight[1, 0] = torch.nextafter(weight[1, 0], torch.tensor(9.0))
    return model


@contextmanager
def in_calls(module: Any, change: Callable[[Any], Any], *, of_one: bool) -> Any:
    """Change a module's output in one-token calls, or in all others."""

    def hook(_module: object, args: tuple[Any, ...], output: Any) -> Any:
        return change(output) if (args[0].reshape(-1, args[0].shape[-1]).shape[0] == 1) is of_one else None

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def has_choice(model: Any) -> bool:
    from driftprobe.engines.hf import HFEngine

    return "expert_ids" in HFEngine(model).taps


def test_a_model_with_near_ties_is_healthy_and_a_bug_in_it_is_found():
    import driftprobe
    from models import tokens

    flips = 0
    for seed in range(3):
        model = near_tie(seed)
        if not has_choice(model):
            pytest.skip("this transformers chooses experts outside the router")
        prompts = {"a": tokens(20, seed)}
        found = driftprobe.probe(model, prompts, mode="as_designed", ladder="off")
        assert found.verdict is Verdict.STRUCTURAL_DRIFT, found.reason
        here = found.judgement.modes["as_designed"].prompts[0].flips
        flips += len(here)
        with in_calls(model.model.layers[2].self_attn.o_proj, lambda output: output * 1.01, of_one=True):
            broken = driftprobe.probe(model, prompts, mode="as_designed", ladder="off")
        assert broken.verdict is Verdict.MISMATCH
        assert broken.first_failure is not None
        assert (broken.first_failure.layer, broken.first_failure.tensor) == (2, "attn_out")
    assert flips


@pytest.mark.parametrize("of_one", [True, False], ids=["decode", "prefill"])
def test_a_router_that_chooses_wrongly_on_one_side_is_a_mismatch(of_one):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import driftprobe
    from models import build, tokens

    model = build("mixtral")
    if not has_choice(model):
        pytest.skip("this transformers chooses experts outside the router")

    def wrong(output: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple((4 - 1 - part) if not part.is_floating_point() else part for part in output)

    with in_calls(model.model.layers[1].mlp.gate, wrong, of_one=of_one):
        found = driftprobe.probe(model, {"a": tokens(20)}, mode="as_designed")
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.tensor) == (1, "expert_ids")


def earlier(site: Site, array: Array) -> Array:
    """Decode's cache rows of layer 1 are others, as where an earlier token went to other experts; not in arm T."""
    if site.arm in {"D", "D'"} and site.layer == 1 and site.tensor == "k_cache":
        array = array.copy()
        array[0] *= 1.5
    return array


def test_an_earlier_tokens_flip_shows_in_the_cache_and_not_in_arm_t():
    found, item = judged(router(CLOSE, drift=0.0), unflipped, earlier)
    assert found.verdict is Verdict.NOT_AVAILABLE, found.reason  # of a prompt's token nobody recorded the choice
    (flip,) = item.flips
    assert flip.earlier and flip.layer == 1 and not flip.told
    assert "an earlier token's experts" in found.reason and "--ladder on" in found.reason


def test_without_arm_t_or_with_rows_that_fail_there_too_the_cache_is_a_mismatch():
    found, _ = judged(router(CLOSE, drift=0.0), unflipped, earlier, arms=("E1",))
    assert found.verdict is Verdict.MISMATCH

    def in_t(site: Site, array: Array) -> Array:
        return (
            earlier(Site("D", *[getattr(site, f) for f in ("step", "layer", "tensor")]), array)
            if site.arm == "T"
            else array
        )

    found, item = judged(router(CLOSE, drift=0.0), unflipped, earlier, in_t)
    assert found.verdict is Verdict.MISMATCH and not item.flips


def unflipped(site: Site, array: Array) -> Array:
    """The step's own token goes to the same experts in all arms."""
    return np.array([[0, 1]]) if site.tensor == "expert_ids" else array


# ---- the choice of a token that an earlier step decoded


DECODED = LENGTH
"""Where step 0's token stands: a row of step 1's cache."""


def row_off(row: int, layer: int = 1, arms: tuple[str, ...] = ("D", "D'"), size: float = 0.5) -> Change:
    """Step 1's K row of one position is off in one layer."""

    def change(site: Site, array: Array) -> Array:
        if site.arm in arms and (site.step, site.layer, site.tensor) == (1, layer, "k_cache"):
            array = array.copy()
            array[row] *= 1 + size
        return array

    return change


def tied(margin: float) -> Change:
    return both(router(margin, drift=0.0), unflipped)


@pytest.mark.parametrize("whole", [True, False])
def test_a_decoded_tokens_near_tie_explains_its_row_in_a_later_step(whole):
    found, item = judged(tied(CLOSE), row_off(DECODED), whole=whole, steps=2)
    assert found.verdict is Verdict.STRUCTURAL_DRIFT, found.reason
    (flip,) = item.flips
    assert (flip.step, flip.layer, flip.position) == (1, 1, DECODED)
    assert flip.margin == pytest.approx(CLOSE, rel=0.2) and flip.margin <= flip.allowed
    assert f"at position {DECODED}, margin" in found.reason
    assert {c.candidate.arm for c in item.cells if (c.step, c.layer, c.tensor) == (1, 1, "k_cache")} == {"T"}
    assert {c.candidate.arm for c in item.cells if c.step == 0} == {"D"}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        (tied(FAR), row_off(DECODED)),
        (tied(-FAR), row_off(DECODED)),
        (tied(CLOSE), row_off(DECODED), row_off(DECODED, arms=("T",))),
        (tied(CLOSE), row_off(DECODED, layer=0)),
        (tied(CLOSE), row_off(DECODED + 1)),
    ],
    ids=[
        "a wide margin",
        "a choice against the logits",
        "arm T has it too",
        "no router before it",
        "the step's own row",
    ],
)
def test_a_row_that_no_near_tie_explains_is_a_mismatch(changes, whole):
    found, item = judged(*changes, whole=whole, steps=2)
    assert found.verdict is Verdict.MISMATCH and not item.flips, found.reason


def test_an_unrecorded_choice_explains_its_own_row_and_not_a_decoded_tokens():
    found, item = judged(tied(FAR), row_off(0), steps=2)
    assert found.verdict is Verdict.NOT_AVAILABLE and not item.flips[0].told, found.reason
    found, item = judged(tied(CLOSE), row_off(0), row_off(DECODED), steps=2)
    assert found.verdict is Verdict.NOT_AVAILABLE and not item.flips[0].told, found.reason
    found, _ = judged(tied(FAR), row_off(0), row_off(DECODED), steps=2)
    assert found.verdict is Verdict.MISMATCH
    first = found.first_failure
    assert first is not None and (first.step, first.layer, first.tensor) == (1, 1, "k_cache")


@pytest.mark.parametrize("at_rung", [unchanged, drifting(0.5, start=(1, "k_cache"))], ids=["clean", "off there too"])
def test_the_ladder_tells_whether_a_prompt_tokens_unrecorded_choice_was_a_tie(at_rung):
    below, arrays = toy(both(tied(FAR), row_off(0)), taps=TAPS, arms=("E1", "T"), mode="kv_aligned", steps=2)
    above, more = toy(both(tied(FAR), at_rung), taps=TAPS, arms=("E1", "T"), mode="kv_aligned", steps=2,
                      dtype=np.float64)  # fmt: skip
    above = replace(above, header=replace(above.header, rung="float64"), path="p0_kv_aligned_float64.jsonl")
    found = judge([below, above], both_payloads((below, arrays), (above, more)))
    item = found.modes["kv_aligned"].prompts[0]
    assert item.ladder is not None and item.ladder.base_verdict is Verdict.NOT_AVAILABLE
    if at_rung is unchanged:
        assert found.verdict is Verdict.STRUCTURAL_DRIFT and "near tie" in found.reason, found.reason
    else:
        assert found.verdict is Verdict.MISMATCH, found.reason


@pytest.mark.parametrize("ladder", ["off", "on"])
def test_a_router_that_depends_on_the_prompts_length_is_no_near_tie(ladder):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import driftprobe
    from models import build, tokens

    model = build("mixtral")
    if not has_choice(model):
        pytest.skip("this transformers chooses experts outside the router")

    def rerouted(_module: object, args: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
        if args[0].reshape(-1, args[0].shape[-1]).shape[0] != 20:
            return None
        at = torch.arange(20)[:, None] == 5
        return tuple(part if part.is_floating_point() else torch.where(at, 3 - part, part) for part in output)

    handle = model.model.layers[0].mlp.gate.register_forward_hook(rerouted)
    try:
        found = driftprobe.probe(model, {"a": tokens(20)}, mode="as_designed", ladder=ladder)
    finally:
        handle.remove()
    assert found.verdict is (Verdict.NOT_AVAILABLE if ladder == "off" else Verdict.MISMATCH), found.reason


def test_what_depends_on_such_a_row_is_compared_with_arm_t():
    """Alone among many rows it may stay within the limit of all of them, while the scores that read it do not."""
    limit = next(c for c in judged(tied(CLOSE), steps=2)[1].cells if (c.layer, c.tensor) == (1, "k_cache")).floor.limit
    small = row_off(DECODED, size=1.5 * limit)
    later = drifting(0.5, arms=("D", "D'"), start=(1, "attn_scores"), step=1, caches=False)
    found, item = judged(tied(CLOSE), small, later, steps=2)
    assert found.verdict is Verdict.STRUCTURAL_DRIFT and item.flips[0].position == DECODED, found.reason
    assert judged(tied(FAR), small, later, steps=2)[0].verdict is Verdict.MISMATCH
    bug = drifting(0.01, arms=("T",), start=(1, "mlp_out"), step=1, caches=False)
    found, _ = judged(tied(CLOSE), small, later, bug, steps=2)
    first = found.first_failure
    assert first is not None and (first.step, first.layer, first.tensor, first.arm) == (1, 1, "mlp_out", "T")


def test_of_a_row_and_a_later_flip_the_earlier_counts():
    found, item = judged(router(CLOSE), flips_late, row_off(DECODED), steps=2)
    assert found.verdict is Verdict.STRUCTURAL_DRIFT, found.reason
    assert item.flips[0].earlier and item.flips[0].position == DECODED
    assert (item.flips[0].step, item.flips[0].layer) == (1, 1)


def flips_late(site: Site, array: Array) -> Array:
    """Decode's own other choice is step 1's alone."""
    return unflipped(site, array) if site.step == 0 else array


@contextmanager
def decoded_rows_spoiled(model: Any, layer: int) -> Any:
    """Change the row that a decode step leaves in the cache, once that step has used it."""

    def hook(_model: object, _args: object, given: dict[str, Any], _output: object) -> None:
        if given["input_ids"].shape[1] == 1:
            keys = given["past_key_values"].layers[layer].keys
            keys[..., -1, :] *= 1.5

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_of_a_decoded_row_is_found_in_a_model_full_of_near_ties(dtype):
    torch = pytest.importorskip("torch")
    import driftprobe
    from models import tokens

    model = near_tie(0).to(getattr(torch, dtype))
    if not has_choice(model) or not hasattr(pytest.importorskip("transformers").DynamicCache(), "layers"):
        pytest.skip("another transformers")
    prompts = {"a": tokens(20)}
    clean = driftprobe.probe(model, prompts, mode="as_designed", steps=3, ladder="off")
    assert clean.verdict in {Verdict.STRUCTURAL_DRIFT, Verdict.NO_DRIFT}, clean.reason
    with decoded_rows_spoiled(model, 1):
        broken = driftprobe.probe(model, prompts, mode="as_designed", steps=3, ladder="off")
    first = broken.first_failure
    assert broken.verdict is Verdict.MISMATCH and first is not None
    assert (first.step, first.layer, first.tensor) == (1, 1, "k_cache")
