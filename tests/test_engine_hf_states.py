"""Layers that keep states in place of rows: state-space, short convolutions, gated delta nets, and hybrids of them."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from driftprobe import probe  # noqa: E402
from driftprobe.api import run  # noqa: E402
from driftprobe.engines.hf import HFEngine  # noqa: E402
from driftprobe.engines.hf.cache import new_cache, past_of, row_layers  # noqa: E402
from driftprobe.engines.hf.host import to_array  # noqa: E402
from driftprobe.engines.hf.states import stored_states  # noqa: E402
from driftprobe.errors import ModelError, UsageError  # noqa: E402
from driftprobe.judgement import Reading, Verdict  # noqa: E402
from driftprobe.options import RunOptions  # noqa: E402
from driftprobe.plan import Mode, Prompt  # noqa: E402
from test_engine_hf import CLEAN, run_arms, tap  # noqa: E402

DRIVEN = hasattr(transformers.DynamicCache, "update_conv_state")
needs_states = pytest.mark.skipif(not DRIVEN, reason="this transformers keeps states in caches of their own")
MIXERS = {"mamba": (0, 1, 2), "mamba2": (0, 1, 2), "falcon_mamba": (0, 1, 2), "lfm2": (0, 2), "jamba": (0, 2),
          "bamba": (0, 2), "falcon_h1": (0, 1, 2), "qwen3_next": (0, 2), "zamba2": (0, 1, 2)}  # fmt: skip
ATTENTION = {"lfm2": (1,), "jamba": (1,), "bamba": (1,), "falcon_h1": (0, 1, 2), "qwen3_next": (1,), "zamba2": (1,)}
PROMPTS = {f"n{length}": models.tokens(length) for length in (1, 3, 33)}
"""Shorter than the convolution, and on both sides of a chunk of 16."""


@needs_states
@pytest.mark.parametrize("name", models.STATEFUL)
def test_taps_of_mixers(name: str) -> None:
    taps = HFEngine(models.build(name)).taps
    states = ("conv_state",) if name == "lfm2" else ("conv_state", "ssm_state")
    assert {tensor: taps[tensor] for tensor in (*states, "mixer_out")} == dict.fromkeys(
        (*states, "mixer_out"), MIXERS[name]
    )
    assert ("ssm_state" in taps) == ("ssm_state" in states)
    assert taps.get("k_cache", ()) == ATTENTION.get(name, ())
    assert {"embed", "x_in", "attn_norm", "x_out", "final_norm", "logits"} <= set(taps)


@needs_states
@pytest.mark.parametrize("name", models.STATEFUL)
def test_clean_runs_of_mixers(name: str) -> None:
    result = probe(models.build(name), PROMPTS, mode="kv_aligned", steps=2, payload="none", ladder="off")
    assert result.verdict in CLEAN, result.reason
    events = [event for trace in result.traces for event in trace.events if event.event == "cache_readback"]
    assert all(event.measured["states"] > 0 and event.measured["different"] == 0 for event in events)
    assert all((event.measured["rows"] > 0) == (name in ATTENTION) for event in events)


@needs_states
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["mamba2", "lfm2"])
def test_clean_runs_of_mixers_in_other_dtypes(name: str, dtype: str) -> None:
    model = models.build(name, dtype=dtype, seed=1)
    result = probe(model, {"n33": PROMPTS["n33"]}, mode="kv_aligned", steps=2, payload="none")
    assert result.verdict in CLEAN, result.reason


def bare(model: Any, count: int) -> tuple[Any, Any]:
    """Return the logits of a decode step after a prefill of `count` tokens, and its cache, without the probe."""
    parameters = inspect.signature(model.forward).parameters
    word = "cache_params" if "cache_params" in parameters else "past_key_values"
    tokens = [*models.tokens(count), *HFEngine(model).greedy(models.tokens(count), 1)]
    cache: Any = None
    for start, stop in ((0, count), (count, count + 1)):
        call: dict[str, Any] = {word: cache} if cache is not None else {}
        if "position_ids" in parameters:  # Bamba takes a decode step without them for position 0 (transformers 5.23)
            call["position_ids"] = torch.arange(start, stop)[None]
        with torch.no_grad():
            output = model(torch.tensor([tokens[start:stop]]), use_cache=True, **call)
        cache = past_of(output)
    return output.logits[0, -1:], cache


@needs_states
@pytest.mark.parametrize("name", models.STATEFUL)
def test_states_are_those_that_the_token_leaves(name: str) -> None:
    model = models.build(name)
    items = run_arms(HFEngine(model), 9, "P", "D", "E7", "N1")
    logits, cache = bare(model, 9)
    assert tap(items["D"], "logits").array.tobytes() == to_array(logits).tobytes()
    for layer in MIXERS[name]:
        held = stored_states(cache, layer)
        for tensor, states in (("conv_state", held.conv), ("ssm_state", held.recurrent)):
            if not states:
                continue
            found = tap(items["D"], tensor, layer).array
            assert found.tobytes() == to_array(states[0][0]).tobytes()
            np.testing.assert_allclose(tap(items["P"], tensor, layer).array, found, rtol=1e-3, atol=1e-4)
            assert tap(items["N1"], tensor, layer).array.shape == found.shape
            assert not any((item.tensor, item.layer) == (tensor, layer) for item in items["E7"])
    assert row_layers(cache) == list(ATTENTION.get(name, ()))


def after_each_prefill(model: Any, change: Any) -> Any:
    """Hook a change of the cache in behind every prefill, as a fault of what is carried over would."""

    def hook(_model: object, _args: object, call: Any, output: Any) -> None:
        if call["input_ids"].shape[1] > 1:
            change(past_of(output))

    return model.register_forward_hook(hook, with_kwargs=True)


@needs_states
@pytest.mark.parametrize("name", ["mamba2", "lfm2"])
def test_a_state_that_is_lost_between_calls_is_a_matter_of_contents(name: str) -> None:
    """Arm A is given the state that the prefill's mixer left, and agrees."""
    model = models.build(name)
    after_each_prefill(model, lambda cache: [state.zero_() for state in stored_states(cache, 0).all])
    result = probe(model, {"a": models.tokens(16)}, mode="kv_aligned", payload="none", ladder="off")
    assert result.verdict is Verdict.MISMATCH
    assert result.first_failure is not None
    assert (result.first_failure.layer, result.first_failure.tensor) == (0, "conv_state")
    assert result.judgement.modes["kv_aligned"].prompts[0].reading is Reading.CONTENTS


@needs_states
def test_a_state_that_does_not_keep_what_it_is_given_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    from driftprobe.engines.hf import engine

    model = models.build("mamba2")
    after_each_prefill(model, lambda cache: [state.zero_() for state in stored_states(cache, 0).all])
    monkeypatch.setattr(engine, "stored_states", lambda cache, layer: stored_states(cache, layer).copy())
    result = probe(model, {"a": models.tokens(16)}, mode="kv_aligned", payload="none", ladder="off")
    assert result.verdict is Verdict.NOT_AVAILABLE
    assert "states differ" in result.reason


@needs_states
@pytest.mark.parametrize(
    ("name", "fault", "strength", "cause", "parameters"),
    [
        *(
            (name, "conv_window_short", lost, "conv_window", {"lost": lost})
            for name in models.STATEFUL
            for lost in (1,)
        ),
        ("mamba2", "conv_window_short", 2, "conv_window", {"lost": 2}),
        *((name, "state_not_carried", None, "state_lost", {}) for name in models.STATEFUL if name != "lfm2"),
        *((name, "state_faded", 0.9, "state_scaled", {"factor": 0.9}) for name in models.STATEFUL if name != "lfm2"),
    ],
)
def test_faults_of_states(
    name: str, fault: str, strength: float | None, cause: str, parameters: dict[str, float]
) -> None:
    engine = HFEngine(models.build(name))
    prompt = Prompt("p", tuple(models.tokens(9)))
    with tempfile.TemporaryDirectory() as folder, engine.plant(fault, strength) as expected:
        result = run(engine, [prompt], RunOptions(modes=(Mode.KV_ALIGNED,)), Path(folder) / "run")
    judged = result.judgement.modes["kv_aligned"].prompts[0]
    first = judged.first_failure
    assert judged.verdict is Verdict.MISMATCH, judged.reason
    assert first is not None
    assert (first.layer, first.tensor, judged.reading.value) == (expected.layer, expected.tensor, expected.reading)
    assert first.diagnosis is not None, first.root_cause
    assert first.diagnosis.cause == cause
    assert first.diagnosis.parameters == pytest.approx(parameters, rel=1e-4)


@needs_states
@pytest.mark.parametrize(("name", "fault"), [("lfm2", "state_not_carried"), ("llama", "conv_window_short")])
def test_faults_of_states_that_a_model_does_not_keep(name: str, fault: str) -> None:
    with pytest.raises(UsageError, match="no layer with"), HFEngine(models.build(name)).plant(fault):
        pass


@pytest.mark.skipif(DRIVEN, reason="driven here")
def test_states_in_caches_of_their_own_are_refused() -> None:
    with pytest.raises(ModelError, match="update_conv_state"):
        new_cache(models.build("mamba"))


def test_a_step_that_adds_something_else_to_the_state_is_not_carried_over_times_one() -> None:
    """What the step adds is of rank one: the state itself came over whole."""
    from types import SimpleNamespace

    import numpy as np

    from driftprobe.hypotheses.statespace import recurrent

    rng = np.random.default_rng(0)
    state, column, row = (rng.normal(size=shape) for shape in ((2, 8, 6), (2, 8, 1), (2, 1, 6)))
    reference, candidate = state + column * row, state + 1.05 * column * row
    scene = SimpleNamespace(failure=SimpleNamespace(layer=0), candidate=lambda *_: candidate,
                            reference=lambda *_: reference)  # fmt: skip
    assert [p.cause for p in recurrent(scene)] == ["state_lost"]
    faded = 0.9 * state + column * row
    scene.candidate = lambda *_: faded
    found = [p for p in recurrent(scene) if p.cause == "state_scaled"]
    assert found[0].parameters["factor"] == pytest.approx(0.9)
