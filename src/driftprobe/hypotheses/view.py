"""One side of a scene: the tensors of one arm, whichever of the two sides is the one at fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from driftprobe.causes import Parameters
from driftprobe.fingerprint import Float64
from driftprobe.scene import Scene


@dataclass(frozen=True)
class View:
    """What an op of one arm was given and what it gave; `other` is the arm that it is compared with."""

    scene: Scene
    arm: str
    other: str

    @property
    def layer(self) -> int | None:
        """The failing layer."""
        return self.scene.failure.layer

    @property
    def tensor(self) -> str:
        """The failing tap."""
        return self.scene.failure.tensor

    def tap(self, tensor: str, layer: int | None = -1, step: int | None = None) -> Float64 | None:
        """Return this arm's tensor at a tap of the failing layer, or of another one."""
        return self.scene.tensor(self.arm, self.layer if layer == -1 else layer, tensor, step)

    def first(self, *tensors: str) -> Float64 | None:
        """Return this arm's tensor at the first of these taps that the trace holds, in the failing layer."""
        found = (self.tap(tensor) for tensor in tensors)
        return next((array for array in found if array is not None), None)

    def result(self, step: int | None = None) -> Float64 | None:
        """Return this arm's tensor at the failing tap."""
        return self.tap(self.tensor, step=step)

    def rows(self, tensor: str) -> dict[int, Float64]:
        """Return this arm's tensors at a tap of the failing layer by position (mode `paths`)."""
        return self.scene.rows(self.arm, self.layer, tensor)

    def of_other(self) -> Float64 | None:
        """Return the other arm's tensor at the failing tap."""
        return self.scene.tensor(self.other, self.layer, self.tensor)

    def constant(self, name: str) -> Float64 | None:
        """Return a constant of the failing layer."""
        return self.scene.constant(self.layer, name)

    def number(self, name: str, layer: int | None = -1) -> float | None:
        """Return a constant that is one number."""
        found = self.scene.constant(self.layer if layer == -1 else layer, name)
        return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None

    def at(self, step: int) -> View:
        """Return the view of the same place one step on or back."""
        return _AtStep(self.scene, self.arm, self.other, step)


@dataclass(frozen=True)
class _AtStep(View):
    step: int = 0

    def tap(self, tensor: str, layer: int | None = -1, step: int | None = None) -> Float64 | None:
        return super().tap(tensor, layer, self.step if step is None else step)


@dataclass(frozen=True)
class Guess:
    """What the failing tensor of the viewed arm would be under one cause."""

    cause: str
    parameters: Parameters
    predicted: Float64
    fitted: int = 0


Guesses = Iterator[Guess]
