"""The knob `batch`: a sequence beside another one in the batch, heard as it is alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models  # noqa: E402
from driftprobe.api import run  # noqa: E402
from driftprobe.compare import pair  # noqa: E402
from driftprobe.engines.hf import HFEngine  # noqa: E402
from driftprobe.judgement import Verdict  # noqa: E402
from driftprobe.options import RunOptions  # noqa: E402
from driftprobe.payload import Payloads  # noqa: E402
from driftprobe.plan import Mode, Prompt  # noqa: E402

PROMPT = [Prompt("p", tuple(models.tokens(20)))]
AS_DESIGNED = RunOptions(modes=(Mode.AS_DESIGNED,), ladder="off", payload="all")


def known(name: str) -> Any:
    """Return an architecture as a parameter, skipped where this transformers does not know it."""
    architecture = models.ARCHITECTURES[name]
    lacks = not hasattr(transformers, architecture.config or f"{architecture.prefix}Config")
    return pytest.param(name, marks=pytest.mark.skipif(lacks, reason="not in this transformers"))


@pytest.mark.parametrize("name", [known(n) for n in ("llama", "gpt2", "gpt_neox", "bloom", "mixtral", "deepseek_v3")])
def test_of_a_batch_our_own_row_is_heard(name, tmp_path):
    engine = HFEngine(models.build(name))
    assert "batch" in engine.knobs
    trace = run(engine, PROMPT, AS_DESIGNED, tmp_path / "run").traces[0]
    for alone, batched in (("P", "P@batch"), ("D", "D@batch")):
        found = pair(trace, alone, batched, Payloads(tmp_path / "run" / "traces"))
        assert len(found.matched) > 20
        assert not found.unpaired
        assert max(item.drift.value for item in found.matched) < 1e-5


def test_rows_of_a_batch_that_are_mixed_up_are_found(tmp_path):
    """A projection takes a tenth of the other sequence's result: alone nothing is wrong."""
    model = models.build("llama")

    def mixed(_module: object, _args: object, output: Any) -> Any:
        return output + 0.1 * output.flip(0) if len(output) == 2 else output

    model.model.layers[1].self_attn.o_proj.register_forward_hook(mixed)
    found = run(HFEngine(model), PROMPT, AS_DESIGNED, tmp_path / "run").judgement
    first = found.modes["as_designed"].first_failure
    assert found.verdict is Verdict.MISMATCH
    assert first is not None
    assert (first.arm, first.layer, first.tensor) in {("P@batch", 1, "attn_out"), ("D@batch", 1, "attn_out")}
    assert "a second sequence beside it in the batch" in first.root_cause


def test_a_batch_that_fails_is_a_control_less_and_no_run_lost(tmp_path):
    """Code of the user's own that knows one sequence, from some length on: the trial did not show it."""
    model = models.build("llama")

    def hook(_module: object, _args: object, call: dict[str, Any]) -> None:
        if len(call["input_ids"]) == 2 and call["input_ids"].shape[1] > 18:
            raise IndexError("index 1 is out of bounds")

    model.register_forward_pre_hook(hook, with_kwargs=True)
    found = run(HFEngine(model), PROMPT, AS_DESIGNED, tmp_path / "run")
    (judged,) = found.judgement.modes["as_designed"].prompts
    assert found.judgement.verdict in {Verdict.NO_DRIFT, Verdict.STRUCTURAL_DRIFT}, found.judgement.reason
    (fired,) = [gate for gate in judged.gates if gate.name == "fired"]
    assert fired.detail.endswith("but D@batch, P@batch, which failed")
    (log,) = (tmp_path / "run" / "run").glob("*.log")
    assert "arm P@batch 21 tokens, left out: the model failed while it ran: IndexError" in log.read_text()


def test_a_planted_fault_has_no_batch(tmp_path):
    """Some faults know one sequence: a batch of two would end the run."""
    planted = replace(AS_DESIGNED, fault="rope_plus_one")
    trace = run(HFEngine(models.build("llama")), PROMPT, planted, tmp_path / "run").traces[0]
    assert not [record for record in trace.records if record.arm.endswith("@batch")]


def test_a_model_that_takes_no_batch_has_no_such_knob():
    model = models.build("llama")

    def refuses(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs["input_ids"]
        if len(tokens) != 1:
            raise RuntimeError("one sequence at a time")

    model.register_forward_pre_hook(refuses, with_kwargs=True)
    assert "batch" not in HFEngine(model).knobs
    assert "chunks" in HFEngine(model).knobs
