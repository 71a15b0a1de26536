"""What two paths alone show of a fault: its cause with its parameter, its side, and the calls that have it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from driftprobe import probe_paths  # noqa: E402
from path_models import Recurrent, Toy  # noqa: E402

IDS = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7]
CUTS = (0, 5, 9, 10, 11)
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


def test_a_learned_position_that_is_off_is_named_by_its_row() -> None:
    class Placed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = torch.nn.Embedding(50, 16), torch.nn.Embedding(64, 16)
            self.head = torch.nn.Linear(16, 50)

        def forward(self, ids: Any, start: int = 0) -> Any:
            return self.head(self.tokens(ids) + self.places(start + torch.arange(ids.shape[1])[None]))

    def late(model: Any) -> None:
        model(torch.tensor([IDS[:5]]))
        model(torch.tensor([IDS[5:]]), 8)

    torch.manual_seed(0)
    first = probe_paths(Placed(), reference=whole, candidate=late, ladder="off").first_failure
    assert first is not None and first.diagnosis is not None
    assert (first.tensor, first.position, first.diagnosis.cause) == ("places", 5, "learned_position")
    assert first.diagnosis.parameters == {"used": 8, "expected": 5, "offset": 3, "side": "candidate"}
