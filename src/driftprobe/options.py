"""What a run is asked to do: the options, checked, and the plans that they make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from driftprobe.engines.base import Constant, Engine
from driftprobe.errors import UsageError
from driftprobe.faults import find_fault
from driftprobe.plan import Mode, Plan, Prompt, make_plan
from driftprobe.trace import EngineFacts

PAYLOADS = ("none", "failing", "all")
LADDERS = ("auto", "on", "off")
SCORES = ("on", "off")
LADDER_BYTES = 4 << 30
"""Size in float64 up to which a model is run there by itself: it stands in memory beside the model as it is, and a
machine that holds a model of half a billion parameters has room for four GiB more. A rung takes about as long as the
run did, twice where float64 is computed at half the speed; on graphics cards with few float64 units, far longer."""
MAX_SEED = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What to run, beside model and prompts."""

    modes: tuple[Mode, ...] = (Mode.AS_DESIGNED, Mode.KV_ALIGNED)
    steps: int = 1
    seed: int = 0
    layers: tuple[int, ...] | None = None
    payload: str = "failing"
    fault: str | None = None
    strength: float | None = None
    """How strong the fault is planted; None is its own default."""
    ladder: str = "auto"
    """Whether all is run again in float64: `auto` where the model is small enough, `on`, `off`."""
    scores: str = "on"
    """Whether attention's scores are recorded, before and after the softmax: `on`, `off`."""
    date: str = ""
    output: str = ""
    """The artifacts folder as reports name it."""


class Weighed(Protocol):
    """What a run of any kind is judged with; see Engine."""

    @property
    def facts(self) -> EngineFacts:
        """What is known of the model."""
        ...

    @property
    def parameters(self) -> int:
        """How many numbers the model's parameters hold."""
        ...

    @property
    def rungs(self) -> tuple[str, ...]:
        """The rungs of the precision ladder that can be climbed."""
        ...

    def weights(self, layer: int | None, tensor: str) -> Iterator[Constant]:
        """Return the matrices of the op behind a tap."""
        ...


def make_plans(engine: Engine, prompts: Sequence[Prompt], options: RunOptions) -> list[Plan]:
    """Return all plans of a run, every option checked. Raises UsageError for the first that cannot be used."""
    _check_options(engine, options)
    if not prompts:
        raise UsageError("no prompts", where="--prompts", measured="0", allowed="1 or more", next_step="give a prompt")
    return [plan_for(engine, mode, prompt, options) for mode in options.modes for prompt in prompts]


def plan_for(engine: Engine, mode: Mode, prompt: Prompt, options: RunOptions) -> Plan:
    """Return the plan of one prompt in one mode, with all the controls that the engine has.

    A planted fault is written for one sequence, and has no batch.
    """
    return make_plan(
        mode,
        prompt,
        steps=options.steps,
        seed=options.seed,
        max_positions=engine.facts.max_positions,
        layers=options.layers,
        arms=engine.arms,
        noise=engine.perturbs,
        knobs=[knob for knob in engine.knobs if options.fault is None or knob != "batch"],
        routed="expert_ids" in engine.taps,
        scores=options.scores == "on",
    )


def _check_options(engine: Engine, options: RunOptions) -> None:
    if options.fault is not None:
        find_fault(options.fault)
    if options.strength is not None:
        _check_strength(options.fault, options.strength)
    if options.payload not in PAYLOADS:
        raise UsageError("unknown payload choice", where="--payload", measured=options.payload,
                         allowed=", ".join(PAYLOADS), next_step="choose one of them")  # fmt: skip
    if options.ladder not in LADDERS:
        raise UsageError("unknown ladder choice", where="--ladder", measured=options.ladder,
                         allowed=", ".join(LADDERS), next_step="choose one of them")  # fmt: skip
    if options.scores not in SCORES:
        raise UsageError("unknown choice of scores", where="--scores", measured=options.scores,
                         allowed=", ".join(SCORES), next_step="choose one of them")  # fmt: skip
    rung_of(engine, options.ladder)
    if options.steps < 1:
        raise UsageError("too few steps", where="--steps", measured=str(options.steps), allowed="1 or more",
                         next_step="ask for at least one decode step")  # fmt: skip
    if not 0 <= options.seed < MAX_SEED:
        raise UsageError("seed out of range", where="--seed", measured=str(options.seed)[:40],
                         allowed=f"0 to {MAX_SEED - 1}", next_step="choose a smaller seed")  # fmt: skip
    count = engine.facts.layers
    wrong = [layer for layer in options.layers or () if not 0 <= layer < count]
    if wrong or options.layers == ():
        raise UsageError("unknown layer", where="--layers", measured=", ".join(map(str, wrong)) or "none",
                         allowed=f"0 to {count - 1}, or all", next_step="choose layers that the model has")  # fmt: skip


def _check_strength(fault: str | None, strength: float) -> None:
    if fault is None:
        raise UsageError("a strength of no fault", where="--fault-strength", measured=str(strength),
                         allowed="only with --fault", next_step="name the fault with --fault")  # fmt: skip
    if not find_fault(fault).unit:
        raise UsageError("this fault has no strength", where=f"--fault {fault}",
                         measured=f"--fault-strength {strength:g}", allowed="it is there or it is not",
                         next_step="leave --fault-strength out")  # fmt: skip
    if not math.isfinite(strength):
        raise UsageError("a strength that is no finite number", where="--fault-strength", measured=str(strength),
                         allowed="a finite number",
                         next_step="choose one of those that `driftprobe faults` lists")  # fmt: skip


def rung_of(engine: Weighed, ladder: str) -> str:
    """Return the rung at which an engine runs everything again, or an empty name for none.

    `auto` climbs where the model in float64 takes no more than LADDER_BYTES. Raises UsageError where `on` cannot be.
    """
    if ladder == "off":
        return ""
    small = 8 * engine.parameters <= LADDER_BYTES
    exact = engine.facts.dtype in engine.rungs and not engine.facts.casts
    if engine.rungs and (ladder == "on" or (small and not exact)):
        return engine.rungs[0]
    if ladder == "on":
        raise UsageError("no precision ladder here", where="--ladder", measured="on",
                         allowed="an engine, device and weights that can be run in float64",
                         next_step="use --ladder auto or off")  # fmt: skip
    return ""
