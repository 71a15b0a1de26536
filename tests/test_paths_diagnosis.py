"""What two paths alone show of a fault: its cause with its parameter, its side, and the calls that have it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from driftprobe import probe_paths  # noqa: E402
from driftprobe.causes import agree  # noqa: E402
from path_models import Recurrent, Toy  # noqa: E402

IDS = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7]
CUTS = (0, 3, 4, 8, 9, 11)
NAME = "blocks.1.mixer.inward"
Path = Callable[[Any], None]


def whole(model: Any) -> None:
    model(torch.tensor([IDS]))


def chunked(model: Any) -> None:
    state = None
    for start, stop in pairwise(CUTS):
        _, state = model(torch.tensor([IDS[start:stop]]), state)


def scaling(single: bool | None) -> Path:
    """Chunks, with a projection 1 % too large in calls of one token, or in the others, or in all."""

    def hook(_module: Any, args: Any, output: Any) -> Any:
        return output if single is not None and (args[0].shape[1] == 1) is not single else output * 1.01

    def run(model: Any) -> None:
        handle = model.get_submodule(NAME).register_forward_hook(hook)
        try:
            chunked(model)
        finally:
            handle.remove()

    return run


@contextmanager
def changed(model: Any, change: Callable[[Any], Any]) -> Any:
    weight = model.get_submodule(NAME).weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(change(before))
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def other_weights(change: Callable[[Any], Any]) -> Path:
    def run(model: Any) -> None:
        with changed(model, change):
            chunked(model)

    return run


def toy() -> Any:
    torch.manual_seed(0)
    return Toy(Recurrent, "tuple").eval()


def diagnosed(path: Path, turned: bool = False) -> tuple[str, dict[str, Any], str]:
    reference, candidate = (path, whole) if turned else (whole, path)
    result = probe_paths(toy(), reference=reference, candidate=candidate, ladder="off")
    first = result.first_failure
    assert first is not None and (first.layer, first.tensor) == (1, "mixer.inward"), result.reason
    assert first.diagnosis is not None, first.root_cause
    return first.diagnosis.cause, dict(first.diagnosis.parameters), first.root_cause


@pytest.mark.parametrize(("single", "calls"), [(True, "of one token"), (False, "of several tokens"), (None, None)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_projection_of_any_module_is_named_with_size_side_and_calls(
    single: bool | None, calls: str | None, turned: bool
) -> None:
    cause, parameters, words = diagnosed(scaling(single), turned)
    assert cause == "projection_scale"
    assert parameters.pop("error") == pytest.approx(0.01, rel=1e-3)
    side = "reference" if turned else "candidate"
    assert parameters == {"side": side, **({} if calls is None else {"calls": calls})}
    assert f"{side} is the wrong side" in words
    assert (f"in calls {calls} alone" in words) is (calls is not None)


def test_calls_are_not_named_where_a_fault_from_a_position_on_looks_alike() -> None:
    def late(model: Any) -> None:
        """Wrong from position 9 on, where the calls of one token begin."""
        state = None
        for start, stop in pairwise((0, 5, 9, 10, 11)):
            factor = 1.01 if start >= 9 else 1.0
            handle = model.get_submodule(NAME).register_forward_hook(lambda _m, _a, out, by=factor: out * by)
            _, state = model(torch.tensor([IDS[start:stop]]), state)
            handle.remove()

    cause, parameters, words = diagnosed(late)
    assert cause == "projection_scale" and parameters["side"] == "candidate"
    assert "calls" not in parameters and "in calls" not in words


def test_calls_that_are_named_where_there_are_none_are_no_agreement() -> None:
    found = {"error": 0.01, "side": "candidate", "calls": "of one token"}
    expected = {"error": 0.01, "side": "candidate"}
    assert agree("projection_scale", found, found) and agree("projection_scale", expected, expected)
    assert not agree("projection_scale", expected, found) and not agree("projection_scale", found, expected)


@pytest.mark.parametrize("size", [0.02, 0.2])
def test_other_weights_are_named_with_their_relative_error(size: float) -> None:
    noise = torch.randn(24, 24, generator=torch.Generator().manual_seed(5))
    cause, parameters, _ = diagnosed(other_weights(lambda weight: weight * (1 + size * noise)))
    assert cause == "weights_other"
    assert parameters["error"] == pytest.approx(size, rel=0.15)


def test_a_change_of_low_rank_is_an_adapter() -> None:
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(24, 2, generator=generator) for _ in range(2))
    cause, parameters, _ = diagnosed(other_weights(lambda w: w + 0.1 * left @ right.T))
    assert (cause, parameters["rank"]) == ("adapter", 2)


class Placed(torch.nn.Module):
    """Tokens, and the rows of a second table that a path asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = torch.nn.Embedding(50, 16), torch.nn.Embedding(64, 16)
        self.head = torch.nn.Linear(16, 50)

    def forward(self, ids: Any, rows: Any) -> Any:
        return self.head(self.tokens(ids) + self.places(rows))


def asking(rows: list[int]) -> Path:
    """Two calls, each token with its row of the table."""

    def run(model: Any) -> None:
        for part in (slice(0, 5), slice(5, None)):
            model(torch.tensor([IDS[part]]), torch.tensor([rows[part]]))

    return run


COUNT = list(range(len(IDS)))


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_a_learned_position_that_is_off_is_named_by_its_position_whatever_rows_its_table_keeps(
    offset: int, turned: bool
) -> None:
    right = [offset + at for at in COUNT]
    paths = [asking(right), asking([*right[:5], *(at + 3 for at in right[5:])])]
    torch.manual_seed(0)
    reference, candidate = paths[::-1] if turned else paths
    first = probe_paths(Placed(), reference=reference, candidate=candidate, ladder="off").first_failure
    assert first is not None and first.diagnosis is not None
    assert (first.tensor, first.position, first.diagnosis.cause) == ("places", 5, "learned_position")
    side = "reference" if turned else "candidate"
    assert first.diagnosis.parameters == {"used": 8, "expected": 5, "offset": 3, "side": side}
    assert f"{side} is the wrong side" in first.root_cause


def test_an_offset_that_one_side_forgets_is_that_sides_fault() -> None:
    right = [2 + at for at in COUNT]
    torch.manual_seed(0)
    found = probe_paths(Placed(), reference=asking(right), candidate=asking([*right[:5], *COUNT[5:]]), ladder="off")
    first = found.first_failure
    assert first is not None and first.diagnosis is not None
    assert first.diagnosis.parameters == {"used": 3, "expected": 5, "offset": -2, "side": "candidate"}


@pytest.mark.parametrize("passed", [5, 1, 0], ids=["other kinds", "one row", "no row that passes"])
def test_an_embedding_that_does_not_count_positions_is_no_table_of_them(passed: int) -> None:
    torch.manual_seed(0)
    kinds = [0] * len(IDS)
    other = [*kinds[:passed], *(1 for _ in kinds[passed:])]
    first = probe_paths(Placed(), reference=asking(kinds), candidate=asking(other), ladder="off").first_failure
    assert first is not None and (first.tensor, first.position) == ("places", passed)
    assert first.diagnosis is None and "wrong side" not in first.root_cause


def hooked(change: Callable[[Any, int], Any]) -> Path:
    """Chunks, with a projection's result changed: `change(output, position of the call's first token)`."""

    def run(model: Any) -> None:
        at = 0

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            nonlocal at
            start, at = at, at + output.shape[1]
            return change(output, start)

        handle = model.get_submodule(NAME).register_forward_hook(hook)
        try:
            chunked(model)
        finally:
            handle.remove()

    return run


def cause_of(path: Path) -> tuple[str, dict[str, Any]]:
    first = probe_paths(toy(), reference=whole, candidate=path, ladder="off").first_failure
    assert first is not None
    return ("", {}) if first.diagnosis is None else (first.diagnosis.cause, dict(first.diagnosis.parameters))


def drawn(*shape: int, seed: int = 5) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channel_zero(output: Any, _start: int) -> Any:
    changed_ = output.clone()
    changed_[..., 7] = 0.0
    return changed_


def at_one_position(output: Any, start: int) -> Any:
    return output + 0.3 * drawn(*output.shape) if start == 9 else output


def test_another_bias_is_a_bias_and_no_adapter() -> None:
    vector = 0.1 * drawn(24)
    cause, parameters = cause_of(hooked(lambda output, _: output + vector))
    assert cause == "bias_other"
    assert 0.0 < parameters["error"] < 1.0


def test_an_output_that_is_zero_is_named_and_no_adapter() -> None:
    cause, parameters = cause_of(hooked(channel_zero))
    assert (cause, parameters["outputs"]) == ("outputs_other", (7,))


@pytest.mark.parametrize(
    "change",
    [
        at_one_position,
        lambda output, start: output + 0.1 * drawn(*output.shape, seed=start),
        lambda output, _: output.clamp(-0.1, 0.1),
    ],
    ids=["noise at one position", "noise of each call", "clipped"],
)
def test_what_no_weights_do_is_not_said_of_weights(change: Callable[[Any, int], Any]) -> None:
    cause, _ = cause_of(hooked(change))
    assert cause not in {"weights_other", "adapter", "bias_other"}


def test_nan_at_one_position_does_not_silence_the_others() -> None:
    noise = drawn(24, 24)

    def spoiled(model: Any) -> None:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            changed_ = output.clone()
            changed_[0, 0, 0] = float("nan") if output.shape[1] == 1 else changed_[0, 0, 0]
            return changed_

        with changed(model, lambda weight: weight * (1 + 0.2 * noise)):
            handle = model.get_submodule(NAME).register_forward_hook(hook)
            chunked(model)
            handle.remove()

    assert cause_of(spoiled)[0] == "weights_other"
