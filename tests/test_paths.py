"""probe_paths: two callables on one model, faults planted on either side, clean versions that must pass."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from driftprobe import Verdict, probe_paths  # noqa: E402
from driftprobe.errors import EngineError, UsageError  # noqa: E402
from driftprobe.result import Result  # noqa: E402
from path_models import MIXERS, Convolution, Experts, Gru, InPlace, Recurrent, Toy, toy  # noqa: E402

IDS = [7, 3, 11, 3, 29, 17, 41, 5, 2, 3, 19]
CHUNKS = (0, 5, 9, 10, 11)
"""Where the chunked path cuts the text: some tokens, some more, then one at a time."""
PASSED = {Verdict.NO_DRIFT, Verdict.STRUCTURAL_DRIFT}


def whole(model: Any) -> None:
    """One call."""
    model(torch.tensor([IDS]))


def chunked(model: Any) -> None:
    """Several calls, the state handed on."""
    state = None
    for start, stop in pairwise(CHUNKS):
        model(torch.tensor([IDS[start:stop]]), state)
        state = model.state


def state_off(model: Any) -> None:
    """The whole text again for each of the last tokens."""
    for stop in range(8, len(IDS) + 1):
        model(torch.tensor([IDS[:stop]]))


def batched(model: Any) -> None:
    """The text as the second of a batch."""
    model(torch.tensor([IDS[::-1], IDS]))


def breaking(attribute: str, value: Any = True) -> Callable[[Any], None]:
    """The chunked path with every mixer (or scale) that has the attribute broken."""

    def run(model: Any) -> None:
        broken = [module for module in model.modules() if hasattr(module, attribute)]
        assert broken
        before = [getattr(module, attribute) for module in broken]
        for module in broken:
            setattr(module, attribute, value)
        try:
            chunked(model)
        finally:
            for module, old in zip(broken, before, strict=True):
                setattr(module, attribute, old)

    return run


def left_out(result: Result) -> dict[str, set[str]]:
    """Reason -> taps."""
    return {e.event: set(e.measured) for e in result.traces[0].events if e.event.startswith("not compared: ")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: m.__name__)
def test_equal_paths_of_any_module_pass(mixer: type[Any], dtype: str) -> None:
    result = probe_paths(toy(mixer, dtype=dtype), reference=whole, candidate=chunked)
    assert result.verdict in PASSED, result.reason
    cells = result.judgement.modes["paths"].cells
    assert {cell.candidate.logical_tok_idx for cell in cells} == set(range(len(IDS)))
    assert {"embed", "x_in", "mixer", "x_out", "logits"} <= {cell.tensor for cell in cells}


@pytest.mark.parametrize("candidate", [state_off, batched], ids=lambda f: f.__name__)
def test_other_paths_pass(candidate: Callable[[Any], None]) -> None:
    result = probe_paths(toy(Recurrent), reference=whole, candidate=candidate)
    assert result.verdict in PASSED, result.reason
    assert result.traces[0].events[0].measured["common"] == len(IDS)


FAULTS = [
    (Recurrent, "forgets", True, (0, "mixer"), 5),
    (Recurrent, "one_token_bug", True, (0, "mixer"), 9),
    (Gru, "forgets", True, (0, "mixer"), 5),
    (Convolution, "late", True, (0, "mixer.conv1d"), 5),
    (Experts, "drops", True, (0, "mixer"), 5),
    (InPlace, "one_token_factor", 1.5, (0, "scale"), 9),
]


@pytest.mark.parametrize("side", ["candidate", "reference"])
@pytest.mark.parametrize(("mixer", "attribute", "value", "place", "position"), FAULTS,
                         ids=[f"{m.__name__}-{a}" for m, a, *_ in FAULTS])  # fmt: skip
def test_a_fault_on_either_side_is_found_at_its_tap_and_position(
    mixer: type[Any], attribute: str, value: Any, place: tuple[int, str], position: int, side: str
) -> None:
    paths = [whole, breaking(attribute, value)]
    reference, candidate = paths if side == "candidate" else paths[::-1]
    result = probe_paths(toy(mixer), reference=reference, candidate=candidate)
    assert result.verdict is Verdict.MISMATCH, result.reason
    failure = result.first_failure
    assert failure is not None
    assert ((failure.layer, failure.tensor), failure.position) == (place, position), result.reason
    assert f"position {position}" in result.reason
    text = result.reports()["B3_66_V2_FINAL_REPORT.md"]
    assert f"position {position}" in text


def test_a_fault_that_is_gone_from_the_last_row_is_found_where_it_began() -> None:
    """The state is lost at position 5, and its trace at the last position is found only further down."""
    result = probe_paths(toy(Convolution), reference=whole, candidate=breaking("late"), positions=len(IDS))
    failing = [cell for cell in result.judgement.modes["paths"].cells if cell.status.value == "fail"]
    assert (failing[0].layer, failing[0].tensor, failing[0].reference.logical_tok_idx) == (0, "mixer.conv1d", 5)


def test_routed_and_reordered_rows_are_named_and_not_paired() -> None:
    result = probe_paths(toy(Experts), reference=whole, candidate=chunked, ladder="off")
    tensors = {cell.tensor for cell in result.judgement.modes["paths"].cells}
    assert "mixer.router" in tensors and not any(t.startswith(("mixer.experts", "mixer.sorted")) for t in tensors)
    named = set.union(*left_out(result).values())
    assert {"layer 0 mixer.sorted_in", "layer 0 mixer.experts.0"} <= named


def test_channel_first_rows_are_paired_along_their_token_axis() -> None:
    result = probe_paths(toy(Convolution), reference=whole, candidate=chunked, ladder="off")
    found = [c for c in result.judgement.modes["paths"].cells if c.tensor == "mixer.conv1d"]
    assert len(found) == 3 * len(IDS)
    assert all(c.reference.shape == (1, 24) for c in found)


def test_a_module_called_once_a_token_has_no_token_axis() -> None:
    result = probe_paths(toy(Gru), reference=whole, candidate=chunked, ladder="off")
    assert any(name.startswith("layer 0 mixer.cell") for names in left_out(result).values() for name in names)


class Skipping(Toy):
    """Has a module that calls of one token skip."""

    def __init__(self) -> None:
        super().__init__(Recurrent, "tuple")
        self.extra = torch.nn.Identity()

    def forward(self, ids: Any, state: Any = None) -> Any:
        logits, after = super().forward(ids, state)
        return (logits if ids.shape[1] == 1 else self.extra(logits)), after


def test_a_module_that_some_calls_skip_is_compared_where_both_run_it() -> None:
    torch.manual_seed(0)
    result = probe_paths(Skipping().eval(), reference=whole, candidate=chunked, ladder="off")
    assert result.verdict in PASSED, result.reason
    found = [c.reference.logical_tok_idx for c in result.judgement.modes["paths"].cells if c.tensor == "extra"]
    assert found == list(range(9))
    alone = next(e for e in result.traces[0].events if "at some positions" in e.event)
    assert alone.measured == {"extra": 2}


@pytest.mark.parametrize("returns", ["tensor", "tuple", "object"])
def test_logits_come_back_in_any_form(returns: str) -> None:
    result = probe_paths(toy(Recurrent, returns=returns), reference=whole, candidate=chunked, ladder="off")
    assert result.verdict in PASSED
    assert sum(c.tensor == "logits" for c in result.judgement.modes["paths"].cells) == len(IDS)


def test_another_token_is_no_pass() -> None:
    def other(model: Any) -> None:
        model(torch.tensor([[*IDS[:6], 1, *IDS[7:]]]))

    result = probe_paths(toy(Recurrent), reference=whole, candidate=other)
    assert result.verdict is Verdict.NOT_AVAILABLE
    assert "same token" in result.reason and "position 6" in result.reason


def test_nothing_in_common_is_no_pass() -> None:
    result = probe_paths(toy(Recurrent), reference=whole, candidate=lambda model: model(torch.tensor([[1, 2, 4]])))
    assert result.verdict is Verdict.NOT_AVAILABLE


class Leaking(Toy):
    """Keeps a count of its calls and adds it to its logits: state that outlives a run."""

    def __init__(self) -> None:
        super().__init__(Recurrent, "tensor")
        self.calls = 0

    def forward(self, ids: Any, state: Any = None) -> Any:
        self.calls += 1
        return super().forward(ids, state) + self.calls


def leaking() -> Leaking:
    torch.manual_seed(0)
    return Leaking().eval()


def test_a_factory_keeps_state_from_leaking_between_runs() -> None:
    left_behind = probe_paths(leaking(), reference=whole, candidate=whole)
    assert left_behind.verdict is Verdict.NOT_AVAILABLE and "deterministic" in left_behind.reason
    anew = probe_paths(leaking, reference=whole, candidate=whole)
    assert anew.verdict is Verdict.NO_DRIFT, anew.reason


def test_positions_are_bounded_and_keep_the_edges_of_calls() -> None:
    result = probe_paths(toy(Recurrent), reference=whole, candidate=chunked, positions=5, ladder="off")
    cells = result.judgement.modes["paths"].cells
    positions = {cell.candidate.logical_tok_idx for cell in cells}
    assert len(positions) == 5 and {0, len(IDS) - 1} <= positions
    assert result.traces[0].events[0].measured["common"] == len(IDS)


def test_a_path_that_fails_or_never_calls_the_model_says_so() -> None:
    def broken(model: Any) -> None:
        raise ValueError("no such thing")

    with pytest.raises(EngineError, match="no such thing"):
        probe_paths(toy(Recurrent), reference=whole, candidate=broken)
    with pytest.raises(EngineError, match="no forward call"):
        probe_paths(toy(Recurrent), reference=whole, candidate=lambda model: None)
    with pytest.raises(UsageError, match="not a model"):
        probe_paths(lambda: 3, reference=whole, candidate=whole)
    with pytest.raises(UsageError, match="too few positions"):
        probe_paths(toy(Recurrent), reference=whole, candidate=whole, positions=0)


def test_the_model_is_left_as_it_was() -> None:
    model = toy(Recurrent).train()
    probe_paths(model, reference=whole, candidate=chunked)
    assert model.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_it_is_written_and_judged_again_from_the_trace(tmp_path: Any) -> None:
    import driftprobe

    out = tmp_path / "run"
    first = probe_paths(toy(Convolution), reference=whole, candidate=breaking("late"), out=out, name="conv")
    again = driftprobe.analyze(out)
    assert again.verdict is first.verdict is Verdict.MISMATCH
    assert again.first_failure == first.first_failure
    assert (out / "B3_66_V2_FINAL_REPORT.md").is_file() and (out / "traces" / "conv_paths.jsonl").is_file()
