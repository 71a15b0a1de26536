"""What an engine is: something that feeds tokens in passes and hands out the tensors at its taps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from driftprobe.background import Begun
from driftprobe.faults import Expected
from driftprobe.fingerprint import Array
from driftprobe.plan import Arm, Plan, Read
from driftprobe.trace import EngineFacts, Event, Record

BUILTIN = {"builtin:tiny": Path(__file__).resolve().parents[1] / "models" / "tiny"}
"""Model names that need no folder of the user's: each is a folder of the package."""


class Tapped(NamedTuple):
    """One tensor of one read, in the format's axes order (`taps.Tap.axes`), on the host."""

    read: Read
    layer: int | None
    tensor: str
    array: Array
    pos_id: int
    """The position that the engine was told for this token."""
    row_start: int = 0
    """K/V cache taps: absolute position of the first row."""
    source: str = "captured"


@dataclass(frozen=True, slots=True)
class Recorded:
    """One record that the engine has fingerprinted itself, and its tensor where it kept that whole."""

    record: Record
    array: Array | None


@dataclass(frozen=True, slots=True)
class Constant:
    """A number or tensor that the model computes with and does not change: a weight, an epsilon, a scale."""

    layer: int | None
    name: str
    """`<tap>.<what>` (`q_proj.bias`, `attn_norm.eps`), or `rope.inv_freq` and its like; docs/trace-format.md."""
    array: Array
    """In the dtype in which the model keeps it; float64 for a plain number."""


Ahead = Callable[[Sequence[Tapped], int], Begun[Any]]
"""Takes tensors, and how many bytes they have, while a call still runs. An engine hands out what it
returns in the place of all, or `one` of it in the place of each."""
Handed = Tapped | Recorded | Event | Begun[Any]


class Engine(Protocol):
    """One file in this folder and one line in its table make an engine."""

    knobs: tuple[str, ...]
    """Which of `plan.KNOBS` can be turned without changing what the engine computes."""
    arms: tuple[str, ...]
    """Which of `plan.ARMS` it can run."""
    perturbs: bool
    """Whether the engine can run arms N: its own ops with a rounding error added to each result."""
    alike_in_modes: bool
    """Whether an arm is the same whatever the mode of its plan: one run of it then stands in the traces of both."""

    @property
    def rungs(self) -> tuple[str, ...]:
        """The higher precisions at which this engine can run everything again; empty where it cannot."""
        ...

    @property
    def parameters(self) -> int:
        """How many numbers its parameters hold: what a rung costs."""
        ...

    @property
    def facts(self) -> EngineFacts:
        """What the engine declares of itself and its model."""
        ...

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Tap -> layers where this model has it; an empty tuple for taps outside the layers."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Return the text's token ids, with whatever the model's own tokenizer adds."""
        ...

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, for people to read."""
        ...

    def greedy(self, token_ids: Sequence[int], steps: int) -> list[int]:
        """Return the engine's own next `steps` tokens, each the arg-max of the logits."""
        ...

    def begin(self, plan: Plan, ahead: Ahead | None = None) -> None:
        """Take note of the plan whose arms are run next; an engine that can give tensors `ahead` of their turn may."""
        ...

    def said(self) -> list[str]:
        """Return lines for the run's log, those since it was last asked: what a program of the engine's printed."""
        ...

    def run(self, arm: Arm, token_ids: Sequence[int], layers: frozenset[int]) -> Iterator[Handed]:
        """Run one arm on a fresh cache and hand out what its reads ask for, in order of execution."""
        ...

    def constants(self, layers: frozenset[int]) -> Iterator[Constant]:
        """Return the model's small constants: numbers and vectors, of these layers and outside the layers."""
        ...

    def weights(self, layer: int | None, tensor: str) -> Iterator[Constant]:
        """Return the matrices of the op behind a tap; nothing where they are not known."""

    def at(self, rung: str) -> AbstractContextManager[None]:
        """Run at a rung while the context lasts: `facts` then tell the dtype and the casts that are left there.

        A planted fault stays planted. Raises UsageError for a rung that is not one of `rungs`.
        """
        ...

    def plant(self, fault: str, strength: float | None = None) -> AbstractContextManager[Expected]:
        """Plant a fault of `driftprobe faults` while the context lasts and say what must be found.

        Raises UsageError where it cannot act here.
        """
        ...
