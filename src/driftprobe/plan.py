"""Prompt, Mode, Arm, Plan: what is to be run, as pure data.

A plan is a list of arms. An arm is one sequence on one fresh cache, fed in calls ("passes"); some positions of some
passes are read. Modes are plans: `as_designed` runs the engine as it is, `kv_aligned` adds arm A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise

from driftprobe.errors import UsageError

EXTENSIONS: tuple[int, ...] = (1, 7, 31)
"""How many tokens longer the control prefills E1..Em are: one, an odd few, and past a 16- or 32-row kernel tile."""


CHUNK = 16
"""Tokens of a chunk of control P@chunks: a prefill fed in several calls on one cache."""
BATCH_LONGEST = 1024
"""Tokens up to which a batch of two is a control: it doubles what a call holds."""
ARMS: tuple[str, ...] = ("P", "D", "P'", "D'", "E", "A")
"""Arms that an engine may know; the first two every engine must. E stands for all extensions."""
KNOBS = ("threads", "chunks", "batch")
"""What an engine may let us turn without changing what it computes; each makes controls of its own, `P@chunks`…"""
NOISE_ARMS = 2
"""How many prefills with rounding noise, N1 and N2, an engine runs that can perturb itself."""


class Mode(str, Enum):
    """The two experiments (docs/how-it-decides.md)."""

    AS_DESIGNED = "as_designed"
    KV_ALIGNED = "kv_aligned"


def parse_mode(word: str) -> tuple[Mode, ...]:
    """Return the modes of a word: `as_designed`, `kv_aligned` or `both`. Raises UsageError for another."""
    if word == "both":
        return tuple(Mode)
    try:
        return (Mode(word),)
    except ValueError:
        raise UsageError(
            "unknown mode", where="--mode", measured=str(word), allowed="as_designed, kv_aligned, both",
            next_step="choose one of them",
        ) from None  # fmt: skip


class Phase(str, Enum):
    """How a token was computed. `DECODE` is written with its step: `decode0`, `decode1`…"""

    PREFILL_LAST = "prefill_last"
    PREFILL_EXT = "prefill_ext"
    PREFILL_NOISE = "prefill_noise"
    PREFILL_CHUNKED = "prefill_chunked"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A named prompt as token ids, with the text they stand for where it is known."""

    name: str
    token_ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Read:
    """One position to record in one pass: its arm, phase, step and absolute position."""

    arm: str
    phase: Phase
    step: int
    position: int

    @property
    def phase_name(self) -> str:
        """The phase as a record carries it: `prefill_last`, `prefill_ext`, `decode0`…"""
        return f"decode{self.step}" if self.phase is Phase.DECODE else self.phase.value


@dataclass(frozen=True, slots=True)
class Pass:
    """One call of the engine: tokens [start, stop) go in after the rows that the cache already holds."""

    start: int
    stop: int
    reads: tuple[Read, ...] = ()
    aligned_to: int | None = None
    """The step whose P rows replace this arm's cache rows [0, start) just before the call (arm A)."""
    routed_to: int | None = None
    """The step whose P chose the experts of this call's tokens (arms T and N)."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One sequence on one fresh cache."""

    name: str
    passes: tuple[Pass, ...]
    keeps_rows_for: int | None = None
    """The step under which the engine keeps this arm's K/V rows, to align another arm with."""
    noise_seed: int | None = None
    """Arm N: every op's result is perturbed by a rounding error, drawn from this seed."""
    threads: bool = False
    """Run with another number of threads than the engine's own."""
    batch: bool = False
    """Run as the first row of a batch of two, beside a sequence of other tokens."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All that one trace file holds: one prompt, one mode, its arms in the order in which they run."""

    mode: Mode
    prompt: Prompt
    steps: int
    seed: int
    arms: tuple[Arm, ...]
    layers: tuple[int, ...] | None = None
    """Layers to record; None is all."""
    rung: str = ""
    """The rung of the precision ladder at which it runs; empty for the model as it is."""
    scores: bool = True
    """Whether scores before and after the softmax are recorded: where a kernel hides them they cost a second product
    of query and keys."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """Every position that the plan asks for, in order."""
        return tuple(read for arm in self.arms for call in arm.passes for read in call.reads)


def make_plan(
    mode: Mode,
    prompt: Prompt,
    *,
    steps: int,
    seed: int,
    max_positions: int,
    layers: tuple[int, ...] | None = None,
    arms: Sequence[str] = ARMS,
    noise: bool = True,
    knobs: Sequence[str] = (),
    routed: bool = False,
    scores: bool = True,
) -> Plan:
    """Return the plan of one prompt in one mode.

    `arms` are those of ARMS that the engine knows; without A there is no `kv_aligned`.

    `noise` adds arms N for an engine that can perturb itself, `knobs` the controls for what it lets us turn.

    `routed` adds arm T for a model that chooses experts: decode with prefill's choice; arms N then have it too.
    `scores` is the plan's own.

    Raises UsageError where the mode needs an arm that the engine lacks, the prompt is empty, or it and its `steps`
    tokens do not fit in `max_positions`.
    """
    n = len(prompt.token_ids)
    check_prompt(prompt, steps, max_positions)
    _check_arms(mode, arms)
    prefills = [_prefill("P", n, step, keep=True) for step in range(steps)]
    again = [_prefill("P'", n, step, keep=False) for step in range(steps)]
    made = [*prefills, _decode("D", n, steps), *again, _decode("D'", n, steps)]
    made += [_extension(m, n, steps) for m in EXTENSIONS if n + steps + m <= max_positions]
    made = [arm for arm in made if arm.name.rstrip("0123456789") in arms]
    perturbed = range(1, NOISE_ARMS + 1) if noise else ()
    made += [_noise(which, n, step, seed, routed) for which in perturbed for step in range(steps)]
    made += _turned(n, steps, knobs)
    if routed:
        made += [_routed_decode("T", n, step) for step in range(steps)]
    if mode is Mode.KV_ALIGNED:
        made.append(_decode("A", n, steps, aligned=True))
    return Plan(mode, prompt, steps, seed, tuple(made), layers, scores=scores)


def _check_arms(mode: Mode, arms: Sequence[str]) -> None:
    if mode is Mode.KV_ALIGNED and "A" not in arms:
        raise UsageError(
            "this engine cannot align its cache", where="--mode", measured=f"{mode.value}; it knows {', '.join(arms)}",
            allowed=Mode.AS_DESIGNED.value, next_step="run with --mode as_designed, or give the engine an arm A",
        )  # fmt: skip


def at_rung(plan: Plan, rung: str) -> Plan:
    """Return a plan's second run at a rung of the precision ladder: but for repetitions, threads and batches.

    Whether the engine repeats itself, and what threads and a batch do to it, was asked in the first run.
    """
    kept = tuple(arm for arm in plan.arms if not arm.name.endswith("'") and not (arm.threads or arm.batch))
    return replace(plan, rung=rung, arms=kept)


def together(plans: Sequence[Plan]) -> list[tuple[Plan, ...]]:
    """Return groups of plans that one run of each arm answers for, the plan that has all arms of its group first.

    They are of one prompt and differ in mode alone, and in which arms they have. Groups come in order of their first.
    """
    groups: list[list[Plan]] = []
    for plan in plans:
        group = next((group for group in groups if all(_nested(plan, other) for other in group)), None)
        if group is None:
            groups.append([plan])
        else:
            group.append(plan)
    return [tuple(sorted(group, key=lambda plan: -len(plan.arms))) for group in groups]


def _nested(one: Plan, other: Plan) -> bool:
    """Whether two plans are one but for mode and arms, and all arms of one are the other's, in its order."""
    fewer, more = sorted((one, other), key=lambda plan: len(plan.arms))
    names = {arm.name for arm in fewer.arms}
    return (
        replace(fewer, mode=more.mode, arms=more.arms) == more
        and tuple(arm for arm in more.arms if arm.name in names) == fewer.arms
        and tokens_needed(fewer) == tokens_needed(more)
    )


def tokens_needed(plan: Plan) -> int:
    """Return how many tokens of the sequence the plan's longest pass feeds."""
    return max(call.stop for arm in plan.arms for call in arm.passes)


def sequence(prompt: Prompt, continuation: Sequence[int], length: int) -> tuple[int, ...]:
    """Return the whole token sequence: prompt, its continuation, then the prompt again to fill the extensions.

    What stands behind the last step's token cannot matter to a causal model; it is filler for arms E.
    """
    known = [*prompt.token_ids, *continuation]
    return tuple(known[i] if i < len(known) else known[(i - len(known)) % len(known)] for i in range(length))


def check_prompt(prompt: Prompt, steps: int, max_positions: int) -> None:
    """Raise UsageError where a prompt is empty or does not fit the model's positions."""
    n = len(prompt.token_ids)
    if n == 0:
        raise UsageError(
            "empty prompt", where=f"prompt {prompt.name}", measured="0 tokens", allowed="1 token or more",
            next_step="give the prompt some text, or token ids, and run again",
        )  # fmt: skip
    if n + steps > max_positions:
        raise UsageError(
            "prompt too long for the model", where=f"prompt {prompt.name}",
            measured=f"{n} tokens + {steps} decoded = {n + steps} positions",
            allowed=f"{max_positions} positions (the model's own limit)",
            next_step="shorten the prompt or lower --steps",
        )  # fmt: skip


def _prefill(name: str, n: int, step: int, *, keep: bool) -> Arm:
    position = n + step
    read = Read(name, Phase.PREFILL_LAST, step, position)
    return Arm(name, (Pass(0, position + 1, (read,)),), keeps_rows_for=step if keep else None)


def _decode(name: str, n: int, steps: int, *, aligned: bool = False) -> Arm:
    calls = [Pass(0, n)]
    for step in range(steps):
        read = Read(name, Phase.DECODE, step, n + step)
        calls.append(Pass(n + step, n + step + 1, (read,), aligned_to=step if aligned else None))
    return Arm(name, tuple(calls))


def _routed_decode(name: str, n: int, step: int) -> Arm:
    """D up to one step, every token with the choice that this step's own prefill made for it.

    A shorter prefill may have chosen otherwise for a token before: one arm for all steps could follow but one of them.
    """
    position = n + step
    tokens = (Pass(at, at + 1, routed_to=step) for at in range(n, position))
    last = Pass(position, position + 1, (Read(name, Phase.DECODE, step, position),), routed_to=step)
    return Arm(name, (Pass(0, n, routed_to=step), *tokens, last))


def _turned(n: int, steps: int, knobs: Sequence[str]) -> list[Arm]:
    """Return the controls of an engine's knobs: another number of threads, a batch of two, a prefill in chunks."""
    arms: list[Arm] = []
    if "threads" in knobs:
        arms += [replace(arm, threads=True) for arm in _once_more("@threads", n, steps)]
    if "batch" in knobs and n + steps <= BATCH_LONGEST:
        arms += [replace(arm, batch=True) for arm in _once_more("@batch", n, steps)]
    if "chunks" in knobs and n >= CHUNK:
        reads = [Read("P@chunks", Phase.PREFILL_CHUNKED, step, n + step) for step in range(steps)]
        bounds = [*range(0, n + steps - 1, CHUNK), n + steps]  # no last chunk of one token: that would be a decode step
        arms.append(Arm("P@chunks", tuple(_chunk(low, high, reads) for low, high in pairwise(bounds))))
    return arms


def _once_more(knob: str, n: int, steps: int) -> list[Arm]:
    """Return P of every step, and D, under a knob's name."""
    return [*(_prefill(f"P{knob}", n, step, keep=False) for step in range(steps)), _decode(f"D{knob}", n, steps)]


def _chunk(start: int, stop: int, reads: Sequence[Read]) -> Pass:
    return Pass(start, stop, tuple(read for read in reads if start <= read.position < stop))


def _extension(m: int, n: int, steps: int) -> Arm:
    name = f"E{m}"
    reads = tuple(Read(name, Phase.PREFILL_EXT, step, n + step) for step in range(steps))
    return Arm(name, (Pass(0, n + steps + m, reads),))


def _noise(which: int, n: int, step: int, seed: int, routed: bool) -> Arm:
    """P's own prefill of this step, length and all: a longer one would be an extension, and lean on what E tests."""
    name, position = f"N{which}", n + step
    read = Read(name, Phase.PREFILL_NOISE, step, position)
    call = Pass(0, position + 1, (read,), routed_to=step if routed else None)
    return Arm(name, (call,), noise_seed=(seed * 1000 + which) * 10_000 + step)
