"""The llama.cpp engine: real llama.cpp on the built-in model, its taps, arms, faults and refusals."""

# ruff: noqa: E402 (what is imported below cannot be without llama.cpp)
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

for library in ("llama_cpp", "gguf"):
    pytest.importorskip(library, reason="llama.cpp is not installed: pip install -e '.[llamacpp]'")

import llama_cpp

from driftprobe.api import RunOptions, run
from driftprobe.causes import agree
from driftprobe.engines import open_engine
from driftprobe.engines.base import Tapped
from driftprobe.engines.llamacpp import LlamaCppEngine, context, ggml
from driftprobe.engines.llamacpp.nodes import Heard
from driftprobe.engines.llamacpp.planting import PLANTERS
from driftprobe.errors import ModelError, UsageError
from driftprobe.faults import find_fault
from driftprobe.plan import CHUNK, Mode, Prompt, make_plan
from driftprobe.trace import Event
from tools.gguf_model import random, tiny, write_gguf

SETUPS = [
    ("f32", "f32", "off"),
    ("f32", "f32", "on"),
    ("f32", "f16", "on"),
    ("f16", "f16", "off"),
    ("bf16", "f16", "on"),
    ("q8_0", "q8_0", "on"),
    ("q4_0", "q4_0", "on"),
    ("q4_k", "f16", "off"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


def file_of(folder: Path, weights: str) -> str:
    path = folder / f"{weights}.gguf"
    if not path.exists():
        write_gguf(*(random() if weights == "q4_k" else tiny()), path, weights)
    return str(path)


def opened(folder: Path, weights: str = "f32", cache: str = "f32", flash: str = "off", threads: int = 1):
    engine = open_engine("llamacpp", model=file_of(folder, weights), cache_type=cache, flash_attn=flash,
                         threads=threads)  # fmt: skip
    assert isinstance(engine, LlamaCppEngine)
    return engine


@pytest.fixture(scope="module")
def engine(folder):
    made = opened(folder)
    yield made
    made.close()


def prompt(length: int) -> Prompt:
    return Prompt(f"len_{length}", tuple((7 * i * i + 13 * i + 40 + length) % 256 for i in range(length)))


def judged(engine, prompts, place, **options):
    return run(engine, prompts, RunOptions(modes=(Mode.KV_ALIGNED,), **options), place / "run")


def tapped(engine, arm: str, length: int = 12) -> list[Tapped | Event]:
    plan = make_plan(Mode.KV_ALIGNED, prompt(length), steps=1, seed=0, max_positions=2048, noise=False)
    tokens = (*prompt(length).token_ids, *engine.greedy(prompt(length).token_ids, 1), *range(40))
    engine.begin(plan)
    layers = frozenset(range(engine.facts.layers))
    found: list[Tapped | Event] = []
    for each in plan.arms:
        if each.name in {"P", arm}:
            found += [item for item in engine.run(each, tokens, layers) if each.name == arm]
    return found


def by_place(items) -> dict[tuple[int | None, str], np.ndarray]:
    return {(item.layer, item.tensor): item.array for item in items if isinstance(item, Tapped)}


@pytest.mark.parametrize(("weights", "cache", "flash"), SETUPS)
def test_a_healthy_engine_is_no_mismatch(folder, tmp_path, weights, cache, flash):
    engine = opened(folder, weights, cache, flash)
    result = judged(engine, [prompt(length) for length in (2, 37, 64)], tmp_path, payload="none")
    engine.close()
    assert result.verdict.value in {"NO_DRIFT", "STRUCTURAL_DRIFT"}, result.reason
    (mode,) = result.judgement.modes.values()
    assert {p.reading.value for p in mode.prompts} == {"H0"}
    assert all(p.determinism.checked and p.determinism.equal for p in mode.prompts)


@pytest.mark.parametrize("flash", ["on", "off"])
def test_every_tap_of_a_plain_decoder_is_there(folder, flash):
    engine = opened(folder, flash=flash)
    everywhere = {"embed", "final_norm", "logits"}
    in_layers = {"x_in", "attn_norm", "q_proj", "k_proj", "v_proj", "q_rope", "k_rope", "k_cache", "v_cache",
                 "attn_scores", "attn_probs", "attn_ctx", "attn_out", "x_mid", "ffn_norm", "mlp_out",
                 "x_out"}  # fmt: skip
    assert set(engine.taps) == everywhere | in_layers
    assert {engine.taps[tap] for tap in in_layers} == {(0, 1, 2, 3)}
    shapes = {place: array.shape for place, array in by_place(tapped(engine, "P")).items()}
    assert shapes[(0, "q_rope")] == (1, 6, 32)
    assert shapes[(0, "k_cache")] == (13, 2, 32)
    assert shapes[(3, "attn_probs")] == (1, 6, 13)
    assert shapes[(None, "logits")] == (1, 257)
    recomputed = {i.tensor for i in tapped(engine, "D") if isinstance(i, Tapped) and i.source == "recomputed"}
    assert recomputed == ({"attn_scores", "attn_probs"} if flash == "on" else {"attn_scores"})
    engine.close()


@pytest.mark.parametrize("flash", ["on", "off"])
def test_recomputed_scores_give_the_engines_own_context(folder, flash):
    engine = opened(folder, flash=flash)
    found = by_place(tapped(engine, "D"))
    engine.close()
    scores, probs, values = (found[(1, tap)] for tap in ("attn_scores", "attn_probs", "v_cache"))
    weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
    np.testing.assert_allclose(weight / weight.sum(axis=-1, keepdims=True), probs, rtol=1e-4, atol=1e-6)
    context_HD = np.einsum("hs,shd->hd", probs[0], np.repeat(values, 3, axis=1))
    np.testing.assert_allclose(context_HD, found[(1, "attn_ctx")][0], rtol=0, atol=2e-3 if flash == "on" else 1e-5)


def test_the_same_weights_in_transformers_give_the_same_logits(engine):
    pytest.importorskip("torch", reason="transformers are not installed: pip install -e '.[hf]'")
    from driftprobe.engines.hf.engine import HFEngine
    from driftprobe.engines.hf.loading import load

    model, tokenizer = load("builtin:tiny", dtype="float32", attn="eager")
    other = HFEngine(model, tokenizer)
    here, there = by_place(tapped(engine, "P")), by_place(tapped(other, "P"))
    places = [(0, tap) for tap in ("q_proj", "k_proj", "q_rope", "k_rope", "k_cache", "v_cache")]
    for place in ((None, "embed"), *places, (2, "attn_scores"), (3, "x_out"), (None, "logits")):
        np.testing.assert_allclose(here[place], there[place], rtol=1e-3, atol=1e-4, err_msg=str(place))
    text = "A décodeur\n\t{}"
    assert engine.tokenize(text) == other.tokenize(text)
    assert engine.detokenize(engine.tokenize(text)) == text


def test_capture_changes_no_bit(engine):
    tokens = list(prompt(40).token_ids)
    made = engine._context
    made.clear()
    bare = made.decode(tokens, 0)
    made.clear()
    heard = made.decode(tokens, 0, made.listener([39], frozenset(range(4))))
    assert (bare == heard).all()


def test_a_call_that_is_cut_into_several_graphs_is_read_at_the_right_rows(folder, monkeypatch):
    whole = opened(folder)
    expected = by_place(tapped(whole, "E7", 30))
    monkeypatch.setattr(context, "UBATCH", 8)
    cut = opened(folder)
    found = by_place(tapped(cut, "E7", 30))
    assert found.keys() == expected.keys()
    for place, array in expected.items():
        if place[1] not in {"k_cache", "v_cache", "attn_scores", "attn_probs"}:
            np.testing.assert_allclose(found[place], array, rtol=1e-3, atol=1e-4, err_msg=str(place))
    assert found[(0, "k_cache")].shape == (31, 2, 32)
    whole.close()
    cut.close()


@pytest.mark.parametrize(("cache", "flash"), [("f32", "off"), ("f16", "off"), ("f16", "on"), ("q8_0", "on")])
def test_arm_a_is_given_prefills_rows_bit_for_bit(folder, cache, flash):
    engine = opened(folder, cache=cache, flash=flash)
    events = [item for item in tapped(engine, "A") if isinstance(item, Event)]
    prefill, aligned = by_place(tapped(engine, "P")), by_place(tapped(engine, "A"))
    engine.close()
    assert [event.measured for event in events] == [{"rows": 12 * 2 * 4, "different": 0}]
    for layer in range(4):
        for tap in ("k_cache", "v_cache"):
            assert (prefill[(layer, tap)][:12] == aligned[(layer, tap)][:12]).all()


def test_an_alignment_that_was_not_written_is_seen(engine, monkeypatch):
    with engine.plant("cache_shift"):
        write = engine._context.write
        calls = []

        def only_the_fault(cache):
            calls.append(1)
            if len(calls) == 1:
                write(cache)

        monkeypatch.setattr(engine._context, "write", only_the_fault)
        (event,) = [item for item in tapped(engine, "A") if isinstance(item, Event)]
    assert event.measured["different"] > 0


@pytest.mark.parametrize("name", sorted(PLANTERS))
def test_a_planted_fault_is_found_with_its_cause(engine, tmp_path, name):
    length = max(16, find_fault(name).min_prompt)
    result = judged(engine, [prompt(length)], tmp_path, fault=name)
    first, expected = result.first_failure, result.expected
    assert first is not None and expected is not None, result.reason
    assert (first.layer, first.tensor) == (expected.layer, expected.tensor)
    assert result.judgement.modes["kv_aligned"].prompts[0].reading.value == expected.reading
    assert first.diagnosis is not None
    assert first.diagnosis.cause == expected.cause
    assert agree(expected.cause, expected.parameters, first.diagnosis.parameters)


@pytest.mark.parametrize(("cache", "rounding"), [("f16", 1e-3), ("q8_0", 0.02), ("q4_0", 0.2)])
def test_heads_that_are_turned_before_a_quantised_cache_are_recorded_as_they_were(folder, cache, rounding):
    """Heads of 64 are: what is in the cache, and what attention gives, is of other numbers than the taps are about."""
    engine = opened(folder, "q4_k", cache, "on")
    found = by_place(tapped(engine, "D"))
    engine.close()
    for layer in range(2):
        keys, values = (found[(layer, tap)].astype(np.float64) for tap in ("k_cache", "v_cache"))
        for rows, tap in ((keys, "k_rope"), (values, "v_proj")):
            own = found[(layer, tap)][0]
            assert np.linalg.norm(rows[-1] - own) < rounding * np.linalg.norm(own), tap
        query, probs = found[(layer, "q_rope")][0], found[(layer, "attn_probs")][0]
        groups = len(query) // keys.shape[1]
        scores = np.einsum("hd,shd->hs", query, np.repeat(keys, groups, axis=1)) / 8
        np.testing.assert_allclose(scores, found[(layer, "attn_scores")][0], rtol=1e-3, atol=1e-4)
        given = np.einsum("hs,shd->hd", probs, np.repeat(values, groups, axis=1))
        gap = np.linalg.norm(found[(layer, "attn_ctx")][0] - given)
        assert gap < 0.02 * np.linalg.norm(given)


def assert_told(engine, tmp_path, name):
    """A planted fault is found at its tap, and named with its parameters."""
    result = judged(engine, [prompt(16)], tmp_path, fault=name)
    engine.close()
    first, expected = result.first_failure, result.expected
    assert first is not None and expected is not None and first.diagnosis is not None
    assert (first.layer, first.tensor) == (expected.layer, expected.tensor)
    assert first.diagnosis.cause == expected.cause
    assert agree(expected.cause, expected.parameters, first.diagnosis.parameters)


@pytest.mark.parametrize("name", ["oldest_key_masked", "kv_exchanged", "stale_row"])
def test_a_fault_behind_turned_heads_is_named(folder, tmp_path, name):
    assert_told(opened(folder, "q4_k", "q8_0", "on"), tmp_path, name)


@pytest.mark.parametrize(("name", "weights", "cache"), [
    ("rope_plus_one", "bf16", "f16"), ("rope_minus_one", "q4_0", "q4_0"), ("stale_row", "q8_0", "q8_0"),
    ("stale_row", "f32", "q4_0"), ("kv_exchanged", "bf16", "q4_0"),
])  # fmt: skip
def test_a_fault_behind_coarse_casts_is_found_at_its_tap(folder, tmp_path, name, weights, cache):
    """A drift under the limit of what the casts round, told by the distances of a rotation or by V's rows."""
    assert_told(opened(folder, weights, cache, "on"), tmp_path, name)


def test_a_fault_leaves_no_trace_behind(engine, tmp_path):
    before = by_place(tapped(engine, "D"))
    for name in ("rope_plus_one", "oldest_key_masked", "overwrite_previous", "cache_shift"):
        with engine.plant(name):
            tapped(engine, "D")
    after = by_place(tapped(engine, "D"))
    assert all((before[place] == after[place]).all() for place in before)


@pytest.mark.parametrize(("name", "length"), [("rope_base", 16), ("blocks_exchanged", 16), ("sink_tokens_lost", 3)])
def test_a_fault_that_cannot_act_is_refused(engine, tmp_path, name, length):
    with pytest.raises(UsageError, match="cannot act here"):
        judged(engine, [prompt(length)], tmp_path, fault=name)


def test_threads_and_chunks_are_controls(engine, tmp_path):
    result = judged(engine, [prompt(37)], tmp_path, payload="none")
    controls = result.judgement.modes["kv_aligned"].prompts[0].controls
    assert {"P@threads", "D@threads", "P@chunks", "E1", "E7", "E31", "P'", "D'"} <= controls.keys()


@pytest.mark.parametrize("flash", ["off", "on"])
def test_a_prefill_in_chunks_computes_what_another_n_ubatch_does(folder, flash):
    """The knob `n_ubatch` needs no arm of its own: P@chunks is the same graphs on the same cache, bit for bit."""
    model = context.Model(Path(file_of(folder, "f32")))
    settings = context.Settings(flash, "f32", 1)
    whole = context.Context(model, settings, 128, ubatch=CHUNK)
    pieces = context.Context(model, settings, 128)
    tokens = list(prompt(100).token_ids)
    logits = whole.decode(tokens, 0)
    for start in range(0, len(tokens), CHUNK):
        last = pieces.decode(tokens[start : start + CHUNK], start)
    assert (logits == last).all()
    mine, other = whole.read(len(tokens)), pieces.read(len(tokens))
    assert all((a == b).all() for layer in mine for a, b in zip(mine[layer].both, other[layer].both, strict=True))
    one_piece = context.Context(model, settings, 128)
    assert (one_piece.decode(tokens, 0) != logits).any() or flash == "off", "from 64 rows up flash is another kernel"
    for made in (whole, pieces, one_piece):
        made.close()
    model.close()


def test_casts_are_those_of_weights_cache_and_kernel(folder):
    casts = {}
    for weights, cache, flash in (("f32", "f32", "off"), ("f32", "f32", "on"), ("q4_0", "q8_0", "on")):
        engine = opened(folder, weights, cache, flash)
        casts[weights, cache, flash] = engine.facts.casts
        engine.close()
    assert list(casts.values()) == [
        {},
        {"attn_ctx": "float16"},
        {"q_proj": "int8", "k_cache": "int8", "v_cache": "int8", "attn_ctx": "float16"},
    ]


def test_the_default_parameters_of_another_layout_are_refused():
    defaults = llama_cpp.llama_context_default_params()
    context.check_defaults(defaults)
    defaults.n_ubatch = 0
    with pytest.raises(ModelError, match="n_ubatch is read as 0"):
        context.check_defaults(defaults)


def test_a_tensor_of_another_layout_is_refused(folder, monkeypatch):
    monkeypatch.setattr(ggml.library(), "elements", lambda _address: -1)
    with pytest.raises(ModelError, match="another layout"):
        opened(folder)


def test_what_the_callback_raises_is_raised_after_the_call(engine, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("in the callback")

    monkeypatch.setattr(Heard, "take", fails)
    with pytest.raises(ZeroDivisionError, match="in the callback"):
        tapped(engine, "P")


def test_files_and_options_that_cannot_be_used_are_refused(folder, tmp_path):
    rubbish = tmp_path / "rubbish.gguf"
    rubbish.write_bytes(b"GGUF" + bytes(64))
    model = file_of(folder, "f32")
    for options, words in (
        ({"model": "builtin:tiny"}, "no such GGUF file"),
        ({"model": str(rubbish)}, "not a GGUF file"),
        ({"model": model, "cache_type": "q5_0"}, "unknown cache type"),
        ({"model": model, "flash_attn": "maybe"}, "unknown flash attn"),
        ({"model": model, "threads": 0}, "too few threads"),
        ({"model": model, "cache_type": "q8_0", "flash_attn": "off"}, "refuses this context"),
        ({"model": model, "dtype": "float16"}, "does not have"),
    ):
        with pytest.raises(UsageError, match=words):
            open_engine("llamacpp", **options)
    with pytest.raises(UsageError, match="no precision ladder"):
        opened(folder).at("float64")
