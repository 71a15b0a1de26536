"""Capture stands out of the model's way, and the trace is byte for byte the same whichever way it is written."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import models  # noqa: E402
from driftprobe import probe  # noqa: E402
from driftprobe.capture import CaptureOptions, capture, choose_tokens  # noqa: E402
from driftprobe.engines.hf import HFEngine, attention, cutting, engine, host  # noqa: E402
from driftprobe.engines.hf.heard import Heard, Rows  # noqa: E402
from driftprobe.errors import EngineError, ModelError, OutputError, UsageError  # noqa: E402
from driftprobe.plan import Mode, Plan, Prompt, make_plan  # noqa: E402
from driftprobe.trace import Trace  # noqa: E402
from driftprobe.trace_file import TraceWriter, read_trace  # noqa: E402

WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item")
"""Ops whose result, or its size, the host must know: on an accelerator it waits for the device."""


def planned(subject: HFEngine, *, steps: int = 2, scores: bool = True) -> tuple[Plan, tuple[int, ...]]:
    prompt = Prompt("p", tuple(models.tokens(17)))
    plan = make_plan(Mode.KV_ALIGNED, prompt, steps=steps, seed=0, max_positions=256, arms=subject.arms,
                     knobs=subject.knobs, scores=scores)  # fmt: skip
    return plan, choose_tokens(plan, subject)


def captured(subject: HFEngine, folder: Path, payload: str = "all", **asked: Any) -> Path:
    plan, tokens = planned(subject, **asked)
    return capture(plan, subject, tokens, folder, CaptureOptions(payload=payload), lambda _line: None)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at_once(self: HFEngine, plan: Plan, ahead: object = None) -> None:
    """Take a plan as an engine does that gives nothing ahead of its turn."""
    self._scores, self._ahead = plan.scores, None


@pytest.mark.parametrize(("name", "kernel"), [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa")])
def test_a_trace_is_the_same_ahead_or_at_once_and_with_rows_shared_or_copied(
    name: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = HFEngine(models.build(name, attn=kernel))
    notes: list[Rows] = []
    of = Rows.of

    def noted(*rows: Any, shared: bool) -> Rows:
        notes.append(of(*rows, shared=shared))
        return notes[-1]

    monkeypatch.setattr(Rows, "of", noted)
    captured(subject, tmp_path / "ahead")
    assert any(rows.versions for rows in notes)
    monkeypatch.setattr(HFEngine, "begin", at_once)
    monkeypatch.setattr(engine, "appends", lambda _cache, _layer: False)
    notes.clear()
    captured(subject, tmp_path / "copied")
    assert notes and not any(rows.versions for rows in notes)
    assert everything(tmp_path / "ahead") == everything(tmp_path / "copied")


class Waits(TorchDispatchMode):
    """Counts the ops that would wait for a device, and copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Counting(host.Transfer):
    """An accelerator's way to the host, on a CPU: nothing may be read before it was waited for."""

    def __init__(self) -> None:
        super().__init__(immediate=False)
        self.log: list[str] = []

    def send(self, tensor: Any) -> Any:
        self.log.append("send")
        return tensor.clone()

    def wait(self) -> None:
        self.log.append("wait")


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_nothing_waits_for_the_device_inside_a_call(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.build("llama", attn=kernel)
    subject, way = HFEngine(model), Counting()
    expected = everything(captured(subject, tmp_path / "cpu").parent)
    monkeypatch.setattr(engine, "transfer_for", lambda _device: way)
    monkeypatch.setattr(cutting, "ends_on_host", cutting.ends_on_device)
    counted: list[Counter[str]] = []
    forward = model.forward

    def watched(*args: Any, **kw: Any) -> Any:
        way.log.append("call")
        with Waits() as waits:
            output = forward(*args, **kw)
        counted.append(waits.seen)
        return output

    model.forward = watched
    assert everything(captured(subject, tmp_path / "device").parent) == expected
    traced = list(counted)
    counted.clear()
    tokens, cache = planned(subject)[1], subject._cache()
    with torch.no_grad():
        subject._forward(tokens[:17], 0, cache)
        subject._forward(tokens[17:18], 17, cache)
    allowed = counted[-2] | counted[-1]
    assert all(seen <= allowed for seen in traced), (traced, allowed)
    calls = "".join({"call": "c", "send": "s", "wait": "w"}[what] for what in way.log).split("c")
    listened = [call for call in calls if call]
    assert listened and all(call.strip("s") == "w" and call.endswith("w") for call in listened)


def test_rows_that_the_model_writes_into_are_copied() -> None:
    """A trial sees that the attention changes what the cache handed out, and copies are taken from then on."""
    model = models.build("llama", attn="sdpa")
    plain = HFEngine(model)
    own = type(model.model.layers[1].self_attn).forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    function = own["sdpa"]

    def scaling(module: Any, query: Any, key: Any, value: Any, *args: Any, **kw: Any) -> Any:
        return function(module, query, key.mul_(1.0) if module.layer_idx == 1 else key, value, *args, **kw)

    with attention.replaced(own, "sdpa", scaling):
        subject = HFEngine(model)
        assert subject._learned.rewritten == {1} and not plain._learned.rewritten
        plan, tokens = planned(subject)
        assert len(list(subject.run(plan.arms[0], tokens, frozenset(range(3))))) > 20


def test_rows_that_a_hook_writes_into_behind_a_call_are_refused() -> None:
    model = models.build("llama", attn="sdpa")
    subject = HFEngine(model)
    plan, tokens = planned(subject)

    def spoil(_model: Any, _args: Any, _kw: Any, output: Any) -> None:
        output.past_key_values.layers[2].keys.zero_()

    hook = model.register_forward_hook(spoil, with_kwargs=True)
    with pytest.raises(EngineError, match="cache rows changed while they were read") as caught:
        list(subject.run(plan.arms[0], tokens, frozenset(range(3))))
    hook.remove()
    assert "layer 2" in str(caught.value)


def trace_of(folder: Path) -> Trace:
    return read_trace(next(folder.glob("*.jsonl")))


def test_scores_are_not_computed_where_they_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = HFEngine(models.build("llama", attn="sdpa"))
    captured(subject, tmp_path / "on")
    monkeypatch.setattr(attention, "_recompute", lambda *_: pytest.fail("computed"))
    captured(subject, tmp_path / "off", scores=False)
    on, off = trace_of(tmp_path / "on"), trace_of(tmp_path / "off")
    assert set(on.header.taps) - set(off.header.taps) == {"attn_scores", "attn_probs"}
    kept = [replace(r, payload=None) for r in on.records if r.tensor not in ("attn_scores", "attn_probs")]
    assert [replace(r, payload=None) for r in off.records] == kept


def test_a_run_without_scores_has_a_verdict(tmp_path: Path) -> None:
    prompts = {"a": models.tokens(17)}
    result = probe(models.build("llama"), prompts, scores="off", ladder="off", out=tmp_path / "off")
    assert result.verdict.value in ("NO_DRIFT", "STRUCTURAL_DRIFT"), result.reason
    with pytest.raises(UsageError, match="unknown choice of scores"):
        probe(models.build("llama"), prompts, scores="some", ladder="off")


def test_a_disk_that_is_full_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = HFEngine(models.build("llama"))
    write, lines = TraceWriter._write, 0

    def full(self: TraceWriter, line: bytes) -> None:
        nonlocal lines
        lines += line.count(b"\n")
        if lines > 300:
            raise OutputError("cannot write the output", where="t", measured="full", allowed="room", next_step="free")
        write(self, line)

    monkeypatch.setattr(TraceWriter, "_write", full)
    with pytest.raises(OutputError, match="cannot write"):
        captured(subject, tmp_path)
    assert "footer" in trace_of(tmp_path).damage


COMPILED = {
    "the object": torch.compile,
    "in place": lambda model: model.compile() or model,
    "its forward": lambda model: setattr(model, "forward", torch.compile(model.forward)) or model,
    "a part of it": lambda model: model.model.layers[1].mlp.compile() or model,
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_is_refused_in_words(how: str) -> None:
    with pytest.raises(ModelError, match="a compiled model cannot be listened to") as caught:
        HFEngine(COMPILED[how](models.build("llama")))
    assert "torch.compile on" in str(caught.value)


def test_a_tensor_that_is_written_to_behind_its_tap_is_refused_or_known_from_the_trial(tmp_path: Path) -> None:
    """What fires in a one-token call is lent, not copied; a trial tells which taps that cannot be."""
    model = models.build("llama", attn="eager")
    subject = HFEngine(model)
    plain = captured(subject, tmp_path / "plain").read_bytes()
    assert not subject._learned.spent

    def spoil(_module: Any, args: Any) -> None:
        args[0].mul_(1.0)  # what the norm before the MLP had handed out

    model.model.layers[1].mlp.register_forward_pre_hook(spoil)
    with pytest.raises(EngineError, match="a tensor changed while it was read") as caught:
        captured(subject, tmp_path / "refused")
    assert "layer 1 ffn_norm" in str(caught.value)
    knowing = HFEngine(model)
    assert (1, "ffn_norm") in knowing._learned.spent
    assert captured(knowing, tmp_path / "known").read_bytes() == plain


def test_a_decode_step_runs_no_copy_for_what_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = HFEngine(models.build("llama"))
    plan, tokens = planned(subject, scores=False)
    copies = Counter[str]()
    own = torch.Tensor.narrow_copy
    monkeypatch.setattr(torch.Tensor, "narrow_copy", lambda *args: copies.update(["copy"]) or own(*args))
    arm = next(arm for arm in plan.arms if arm.name == "D")
    assert len(list(subject.run(arm, tokens, frozenset(range(3))))) > 5
    assert not copies["copy"]


def test_what_was_heard_goes_when_its_call_is_handed_out(tmp_path: Path) -> None:
    """Cache rows of a long prompt must not wait for a collection: the command line collects seldom."""
    subject = HFEngine(models.build("llama"))
    plan, tokens = planned(subject)
    gc.collect()
    gc.disable()
    try:
        capture(plan, subject, tokens, tmp_path, CaptureOptions(payload="none"), lambda _line: None)
        left = [each for each in gc.get_objects() if type(each) is Heard]
    finally:
        gc.enable()
    assert left == []
