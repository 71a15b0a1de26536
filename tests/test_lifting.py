"""A lifted model computes in float64, whatever casts its code has; and is afterwards what it was, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from driftprobe.compare import without_shift  # noqa: E402
from driftprobe.engines.hf import HFEngine  # noqa: E402
from driftprobe.engines.hf.lifting import Narrowings, lifted  # noqa: E402
from driftprobe.errors import UsageError  # noqa: E402
from driftprobe.plan import Mode, Prompt, make_plan  # noqa: E402
from driftprobe.taps import STATE_TAPS  # noqa: E402
from models import ARCHITECTURES, build, tokens  # noqa: E402

ROUNDOFF = 2.0**-53


class Casting(torch.nn.Module):
    """Casts in every way that models have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8, dtype=torch.bfloat16))
        self.tied = self.weight
        self.register_buffer("frequencies", torch.rand(8))
        self.plain = torch.rand(8)

    def forward(self, x: Any) -> Any:
        made = [
            x.float(), x.half(), x.bfloat16(), x.to(torch.float32), x.to("cpu", torch.bfloat16), x.to(dtype=torch.half),
            x.type(torch.float32), x.type("torch.FloatTensor"), torch.zeros(8, dtype=torch.float32),
            torch.full((8,), 0.5), torch.arange(8) / 3, torch.softmax(x, -1, dtype=torch.float32),
            torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32), x.new_zeros(8, dtype=torch.float32),
            x.float() * self.frequencies, x.float() * self.plain, torch.polar(x, x).real, x.mean(-1, dtype=torch.half),
            x.to(torch.float32).to(torch.bfloat16) @ self.weight,
        ]  # fmt: skip
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made.append(torch.nn.functional.linear(x, self.weight))
        return made


def test_every_kind_of_cast_is_lifted():
    model, narrowings = Casting(), Narrowings()
    with lifted(model), narrowings:
        made = model(torch.randn(8, dtype=torch.float64))
        assert [t.dtype for t in made] == [torch.float64] * len(made)
        assert model.tied is model.weight
    assert narrowings.coarsest is None


def test_narrowings_names_the_coarsest_float_that_is_left():
    with Narrowings() as found:
        x = torch.randn(4, dtype=torch.float64)
        assert found.coarsest is None
        x.float()
        assert found.coarsest == "float32"
        x.to(torch.bfloat16)
    assert found.coarsest == "bfloat16"


def test_integers_and_rounding_through_float8_are_left():
    x = torch.rand(64, dtype=torch.float64)
    with lifted(Casting()):
        through = x.to(torch.float8_e4m3fn).to(torch.float32)
        assert torch.arange(3).dtype == torch.int64
        assert x.to(torch.int8).dtype == torch.int8
        assert x.float().view(torch.int64).dtype == torch.int64
    assert through.dtype == torch.float64
    assert (through != x).any()


def test_a_coarser_constant_in_a_closure_is_widened_and_written_to_in_place():
    kept = torch.ones(4, 4)
    with lifted(Casting()):
        assert (kept @ torch.ones(4, dtype=torch.float64)).dtype == torch.float64
        kept[0] = torch.zeros(4, dtype=torch.float64)
        kept += torch.ones(4, dtype=torch.float64)
    assert kept[0].tolist() == [1.0] * 4
    assert kept.dtype == torch.float32


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back_bit_for_bit(fails):
    model = build("gemma2", dtype="bfloat16")
    named = [*model.named_parameters(), *model.named_buffers()]
    before = [(name, t, t.data_ptr(), t.dtype, t.clone()) for name, t in named]
    settings = (torch.get_default_dtype(), model.config._experts_implementation)
    try:
        with lifted(model):
            assert all(t.dtype == torch.float64 for t in model.parameters())
            assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
            model.model.rotary_emb.register_buffer("inv_freq", torch.zeros(3))
            if fails:
                raise RuntimeError("in the middle")
    except RuntimeError:
        assert fails
    after = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor, pointer, dtype, copy in before:
        assert after[name] is tensor and tensor.data_ptr() == pointer and tensor.dtype == dtype, name
        assert torch.equal(tensor, copy), name
    assert settings == (torch.get_default_dtype(), model.config._experts_implementation)
    assert torch.zeros(1).dtype == torch.float32


def largest_drift(engine: HFEngine) -> float:
    """Return the largest relative distance of decode's and an extension's tensors from prefill's, over all taps."""
    prompt = tuple(tokens(24))
    plan = make_plan(Mode.AS_DESIGNED, Prompt("p", prompt), steps=1, seed=0, max_positions=256)
    layers, sequence = frozenset(range(engine.facts.layers)), prompt * 3
    found = {
        arm.name: {(t.layer, t.tensor): t.array.astype(np.float64) for t in engine.run(arm, sequence, layers)}
        for arm in plan.arms
        if arm.name in {"P", "D", "E31"}
    }
    largest = 0.0
    for arm in ("D", "E31"):
        kept = {
            where for where in found["P"] if arm == "D" or where[1] not in STATE_TAPS
        }  # E's state is a later token's
        assert found[arm].keys() == kept
        for where, p in ((where, found["P"][where]) for where in kept):
            d = without_shift(p, found[arm][where]) if where[1] == "attn_scores" else found[arm][where]
            finite = np.isfinite(p)
            largest = max(largest, float(np.linalg.norm((d - p)[finite]) / np.linalg.norm(p[finite])))
    return largest


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_healthy_model_drifts_by_float64s_roundoff_alone(name):
    try:
        model = build(name, dtype="bfloat16", attn=ARCHITECTURES[name].kernels[-1])
    except AttributeError:
        pytest.skip("not in this transformers")
    engine = HFEngine(model)
    before = largest_drift(engine)
    with engine.at("float64"):
        assert engine.facts.dtype == "float64"
        assert engine.facts.casts == {}
        assert largest_drift(engine) < 200 * ROUNDOFF
    assert engine.facts.dtype == "bfloat16"
    assert largest_drift(engine) == before


def test_a_float64_model_keeps_float32s_roundoff_until_its_casts_are_lifted():
    engine = HFEngine(build("gemma2", dtype="float64"))
    assert engine.facts.casts == {"inside ops": "float32"}
    assert largest_drift(engine) > 1e-8
    with engine.at("float64"):
        assert engine.facts.casts == {}
        assert largest_drift(engine) < 200 * ROUNDOFF
    assert engine.facts.casts == {"inside ops": "float32"}


def test_a_rung_that_there_is_not():
    engine = HFEngine(build("llama"))
    assert engine.rungs == ("float64",)
    assert engine.parameters == sum(p.numel() for p in engine.model.parameters())
    with pytest.raises(UsageError, match="no such rung"), engine.at("float128"):
        pass
