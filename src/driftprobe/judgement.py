"""What a judgement is made of: verdicts, gates, cells, indicators, findings. Frozen data, no logic but look-ups."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from driftprobe.causes import Parameters
from driftprobe.compare import Drift
from driftprobe.floor import Floor
from driftprobe.local import Local
from driftprobe.matched import Match
from driftprobe.trace import EngineFacts, Record


class Verdict(str, Enum):
    """The four answers. Never tested for truth."""

    NO_DRIFT = "NO_DRIFT"
    STRUCTURAL_DRIFT = "STRUCTURAL_DRIFT"
    MISMATCH = "MISMATCH"
    NOT_AVAILABLE = "N/A"

    def __bool__(self) -> bool:
        raise TypeError("a verdict is not true or false; compare it with a member of Verdict")


class Reading(str, Enum):
    """The 2×2 reading of arms D and A."""

    H0 = "H0"
    CONTENTS = "contents"
    COMPUTATION = "computation"
    HARNESS = "harness"
    NONE = "none"

    @property
    def words(self) -> str:
        """The reading as a sentence."""
        return _READINGS[self]


_READINGS = {
    Reading.H0: "both decode arms stay within the floor: arithmetic explains the difference",
    Reading.CONTENTS: "decode fails with its own cache and agrees with prefill's rows put in: "
    "the cache's contents are wrong",
    Reading.COMPUTATION: "decode fails with its own cache and with prefill's rows put in: "
    "the decode computation is wrong",
    Reading.HARNESS: "decode agrees with its own cache and fails with prefill's rows put in: the alignment is at fault",
    Reading.NONE: "not read: arm A was not run in this mode, a gate was shut, or the trace cannot tell a drift's size",
}


class Status(str, Enum):
    """What became of one compared tap."""

    PASS = "pass"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition that must hold before a verdict is given."""

    name: str
    passed: bool
    detail: str
    strayed: bool = False
    """Whether nothing shuts it but a candidate that goes on with a token of its own choice (mode `paths`)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One tap of one step: decode against prefill, with the floor that judged it."""

    prompt: str
    step: int
    layer: int | None
    tensor: str
    drift: Drift
    floor: Floor
    status: Status
    reference: Record
    candidate: Record
    local: Local | None = None
    """The local test, where it could be made; its ground says what it stands on."""
    match: Match | None = None
    """The matched filter that found this tap, if one did."""
    unlike: float | None = None
    """How much more a linear op's result differs than its input, where its matrix would tell more (`products`)."""

    @property
    def beyond_floor(self) -> bool:
        """Whether the drift itself is known to pass the limit."""
        return self.drift.at_least is not None and self.drift.at_least > self.floor.limit

    @property
    def excess(self) -> float | None:
        """Drift over floor; None where the drift cannot be told."""
        return None if self.drift.value is None else self.drift.value / self.floor.value


@dataclass(frozen=True, slots=True)
class RowCheck:
    """K or V rows of one layer and step: which of decode's rows are prefill's, and which are another row."""

    prompt: str
    step: int
    layer: int
    tensor: str
    compared: int
    """Rows that both sides hold for positions before the step's own token."""
    equal: int
    """Of those, rows whose hashes are equal."""
    within: int = 0
    """Rows that differ from prefill's by no more than the floor allows."""
    moved: tuple[tuple[int, int], ...] = ()
    """(position, source): decode's row at `position` is bit for bit prefill's row of another position."""
    zero: tuple[int, ...] = ()
    """Positions whose row is all zeros in decode and not in prefill."""
    other_layer: tuple[tuple[int, int], ...] = ()
    """(position, layer): decode's row is prefill's row of the same position in another layer."""
    changed: tuple[int, ...] = ()
    """Positions whose row differs and matches no other row."""


@dataclass(frozen=True, slots=True)
class KvIndicators:
    """K with K and V with V, never K with V."""

    k_hash_consistent: bool | None
    """Every cached K row hashes as prefill's; None where there are no rows to compare."""
    v_hash_consistent: bool | None
    kv_aligned: bool | None
    """Every K row and every V row is prefill's own, bit for bit or within the floor."""
    k_rows_equal: int = 0
    k_rows: int = 0
    v_rows_equal: int = 0
    v_rows: int = 0


@dataclass(frozen=True, slots=True)
class Range:
    """Extremes and mean of a statistic over layers, prompts and steps."""

    min: float
    max: float
    mean: float


@dataclass(frozen=True, slots=True)
class Attention:
    """Scores before and probabilities after the softmax, in both phases; None where the tap is absent."""

    pre_softmax_prefill: Range | None
    pre_softmax_decode: Range | None
    post_softmax_prefill: Range | None
    post_softmax_decode: Range | None
    recomputed: bool
    """Whether scores were rebuilt from captured q and k because a fused kernel hides them."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What a range is made of: extremes, and the sum of all finite elements with their number."""

    low: float = math.inf
    high: float = -math.inf
    total: float = 0.0
    count: int = 0


@dataclass(frozen=True, slots=True)
class AttentionSums:
    """The statistics of scores and probabilities in one trace."""

    sums: dict[tuple[str, str], Sums] = field(default_factory=dict)
    """(tensor, arm P or D) -> its sums."""
    recomputed: bool = False


Seen = dict[tuple[str, str, int], frozenset[tuple[int | None, str]]]
"""(arm, phase, step) -> layer and tensor of every record."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What pairs add to a judgement that others answered for: none drifts more than one judged at its tap."""

    passed: int
    """Pairs of P and D, each within its limit."""
    unknown: int
    """Pairs of P and D that differ by an amount that cannot be told."""
    embeds: int
    """Of both, pairs of `embed`."""
    seen: Seen
    """Of the whole trace."""
    cache_rows: dict[str, tuple[int, int]]
    """Cache tap -> its rows that are equal, and that were compared."""
    attention: AttentionSums
    """Of the whole trace."""

    @property
    def pairs(self) -> int:
        """How many pairs of P and D these are."""
        return self.passed + self.unknown


@dataclass(frozen=True, slots=True)
class Impact:
    """What the difference does to the output, apart from its cause; the worst step of those compared."""

    kl: float | None
    """KL(prefill ‖ decode) over the full vocabulary, nats; None without whole logits."""
    max_abs_dlogit: float | None
    top1_agree: bool | None
    margin: float | None
    """Prefill's top-1 logit minus its top-2."""
    flip: str
    """`none`, `tie flip` (the margin is within what rounding does to a logit), `confident flip`, or `unknown`."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The cause whose prediction explains a failure."""

    cause: str
    """Its name in `causes.CAUSES`."""
    parameters: Parameters
    layer: int | None
    tensor: str
    """Where the prediction was compared."""
    residual: float
    """‖candidate − predicted‖₂ / ‖reference‖₂: what the cause leaves over."""
    explained: float
    """Share of the difference that the cause explains: 1 − ‖candidate − predicted‖² / ‖candidate − reference‖²."""
    z: float | None = None
    """The fitted parameter in its own standard errors, where it was estimated under noise."""
    side: str = ""
    """The side at fault, `decode` or `prefill`, where a replay of the op from its captured inputs shows it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A tap whose drift arithmetic does not explain."""

    prompt: str
    step: int
    layer: int | None
    tensor: str
    drift: float
    floor: float
    excess: float
    phase: str
    """The candidate's phase: `decode0`…, or `prefill_ext` for a control that is no innocent."""
    root_cause: str = ""
    arm: str = "D"
    """The candidate's arm: D, or the control that is no innocent."""
    local: Local | None = None
    """The local test, where that told the failure and the floor did not."""
    match: Match | None = None
    """The matched filter that told the failure, where neither the floor nor the local test did."""
    diagnosis: Diagnosis | None = None
    position: int | None = None
    """Absolute position of the token, where the trace names it."""
    order: int | None = None
    """The tap's measured rank in order of execution; see `Record.order`."""
    rung: str = ""
    """The rung of the precision ladder at which it was seen; empty for the run itself."""

    @property
    def of_control(self) -> bool:
        """Whether a control differs from what it repeats, and not decode from prefill."""
        return self.arm not in {"D", "A", ""} or self.phase == "prefill_ext"


@dataclass(frozen=True, slots=True)
class TieFlip:
    """Another choice of experts, between logits so close that rounding alone can turn it."""

    step: int
    layer: int | None
    left: tuple[int, ...]
    """Experts that prefill chose and decode did not."""
    came: tuple[int, ...]
    """Experts that decode chose in their stead."""
    margin: float
    """By how much prefill preferred those that left: the largest difference of their logits in prefill."""
    allowed: float
    """How far rounding can move such a difference."""
    earlier: bool = False
    """Whether it is the choice of an earlier token, in a prefill that recorded a later one: it shows in cache rows."""
    position: int | None = None
    """Where that token stands, if it was decoded: the prefill that read it recorded the margin. None for a prompt's."""

    @property
    def told(self) -> bool:
        """Whether a margin shows that it was a near tie; of a prompt's token nobody recorded one."""
        return not self.earlier or self.position is not None

    @property
    def words(self) -> str:
        """The flip in a sentence."""
        if self.earlier:
            known = f"position {self.position}, margin {self.margin:.2e} (rounding can move it by {self.allowed:.2e})"
            return (
                f"an earlier token's experts: the cache rows of layer {self.layer} are not prefill's, and are with its "
                "choice of experts put in; "
                + (f"a near tie, at {known}" if self.told else "a prompt's token, whose margin nobody recorded")
            )
        left, came = (", ".join(map(str, experts)) for experts in (self.left, self.came))
        return (
            f"a near tie between experts that rounding flips: at layer {self.layer} decode chose {came} where prefill "
            f"chose {left}, margin {self.margin:.2e} (rounding can move it by {self.allowed:.2e})"
        )


@dataclass(frozen=True, slots=True)
class Determinism:
    """Whether running the same arm again gives the same bits."""

    checked: bool
    equal: bool
    largest: float = 0.0
    """Largest run-to-run drift."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The smallest relative errors that this run could have told from rounding: LIMIT × floor."""

    smallest: float
    smallest_at: str
    largest: float
    largest_at: str


@dataclass(frozen=True, slots=True)
class Slope:
    """How one tap's drift goes with the unit roundoff, from the run to a rung of the ladder."""

    layer: int | None
    tensor: str
    base: float
    """Drift in the run itself, the largest over steps."""
    rung: float
    """Drift at the rung."""
    slope: float | None
    """log(rung / base) over log of the same ratio of unit roundoffs: about 1 for arithmetic, about 0 for a bug.

    None where either drift is 0 or infinite, or both runs have one unit roundoff."""


class Outcome(str, Enum):
    """What the ladder says of a run's own verdict."""

    AGREES = "agrees"
    SHARPER = "sharper"
    SCALES = "scales"
    PRECISION = "precision"
    NOT_TOLD = "not told"

    @property
    def words(self) -> str:
        """The outcome as a sentence."""
        return _OUTCOMES[self]


_OUTCOMES = {
    Outcome.AGREES: "nothing is beyond the floor there either",
    Outcome.SHARPER: "beyond the floor there, where rounding is far too small to explain it: no arithmetic",
    Outcome.SCALES: "larger than this run's floor, but it scales with the unit roundoff: arithmetic",
    Outcome.PRECISION: "far beyond the floor of this run's dtype, and gone in float64: something rounds more coarsely "
    "than declared, or a kernel of this dtype is wrong",
    Outcome.NOT_TOLD: "the rung cannot tell; the run's own verdict stands",
}


@dataclass(frozen=True, slots=True)
class Ladder:
    """The whole experiment once more at a higher precision, beside the run itself."""

    rung: str
    judged: TraceJudgement
    """The rung's own judgement, by the same rules."""
    outcome: Outcome
    base_verdict: Verdict
    """What the run alone was judged to be."""
    base_unit: float
    """Unit roundoff of the coarsest dtype that the run declares."""
    unit: float
    """The same at the rung: of the dtype that is left when the model's own casts are lifted."""
    limited_by: str
    """What sets `unit`: the rung's dtype, or a cast inside that could not be lifted."""
    noise: float | None
    """Largest drift between the rung's controls: the roundoff that was really reached."""
    slopes: tuple[Slope, ...]
    seconds: float | None
    """What the rung took; None where its trace does not say."""


@dataclass(frozen=True, slots=True)
class TraceJudgement:
    """One prompt in one mode."""

    mode: str
    prompt: str
    verdict: Verdict
    reason: str
    gates: tuple[Gate, ...]
    cells: tuple[Cell, ...]
    aligned_cells: tuple[Cell, ...]
    """Arm A against P; empty where A was not run."""
    unpaired: tuple[Record, ...]
    failures: tuple[Failure, ...]
    """Of decode and of controls E, earliest step first, each step in execution order."""
    reading: Reading
    rows: tuple[RowCheck, ...]
    determinism: Determinism
    impact: Impact | None
    limits: Limits | None
    controls: dict[str, float]
    """Control arm -> largest drift seen in it (inf where one side is not finite and the other is)."""
    engine: EngineFacts
    token_ids: tuple[int, ...] = ()
    prompt_len: int = 0
    foreign: bool = False
    file: str = ""
    matches: tuple[Match, ...] = ()
    """What matched filters found in decode under the floor."""
    flips: tuple[TieFlip, ...] = ()
    """Near ties between experts that decode settled otherwise; behind them arm T was compared, with routing aligned."""
    attention: AttentionSums = AttentionSums()
    left_out: LeftOut | None = None
    """Pairs that others of `cells` answered for, where the trace was thinned; they are not in `cells`."""
    ladder: Ladder | None = None
    """The same prompt and mode at a higher precision, where it was run."""

    @property
    def first_failure(self) -> Failure | None:
        """The first failing tap of the earliest failing step, where the verdict is MISMATCH."""
        return self.failures[0] if self.failures and self.verdict is Verdict.MISMATCH else None

    @property
    def decided_by(self) -> TraceJudgement:
        """The judgement whose numbers decided: the rung's where the ladder found what the verdict rests on."""
        return self.ladder.judged if self.ladder and self.ladder.outcome is Outcome.SHARPER else self


@dataclass(frozen=True, slots=True)
class ModeJudgement:
    """All prompts of one mode."""

    mode: str
    verdict: Verdict
    reason: str
    prompts: tuple[TraceJudgement, ...]
    kv: KvIndicators
    attention: Attention
    impact: Impact | None
    limits: Limits | None
    first_failure: Failure | None

    @property
    def status(self) -> str:
        """`COMPLETE`, or `INCOMPLETE` where a trace has no end."""
        gates = (gate for prompt in self.prompts for gate in prompt.gates if gate.name == "complete")
        return "COMPLETE" if all(gate.passed for gate in gates) else "INCOMPLETE"

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every decode cell of every prompt."""
        return tuple(cell for prompt in self.prompts for cell in prompt.cells)

    @property
    def pairs(self) -> int:
        """How many pairs of P and D were judged, by themselves or by one that answers for them."""
        return len(self.cells) + sum(item.left_out.pairs for item in self.prompts if item.left_out is not None)

    def count(self, status: Status) -> int:
        """Return how many pairs of P and D have a status."""
        left_out = [item.left_out for item in self.prompts if item.left_out is not None]
        more = {Status.PASS: sum(x.passed for x in left_out), Status.UNKNOWN: sum(x.unknown for x in left_out)}
        return sum(cell.status is status for cell in self.cells) + more.get(status, 0)

    @property
    def unpaired(self) -> int:
        """How many records found no partner."""
        return sum(len(prompt.unpaired) for prompt in self.prompts)


@dataclass(frozen=True, slots=True)
class Judgement:
    """Everything that was decided about a traces folder."""

    verdict: Verdict
    reason: str
    modes: dict[str, ModeJudgement]
    """Modes that were run, by name."""
    limits: Limits | None
    impact: Impact | None

    @property
    def ladders(self) -> tuple[Ladder, ...]:
        """Every rung that was climbed."""
        prompts = (item for mode in self.modes.values() for item in mode.prompts)
        return tuple(item.ladder for item in prompts if item.ladder is not None)

    @property
    def first_failure(self) -> Failure | None:
        """The first failure of the mode that looks deepest, or of the next one that has any."""
        names = dict.fromkeys(("kv_aligned", "as_designed", *self.modes))
        found = [self.modes[m].first_failure for m in names if m in self.modes]
        return next((failure for failure in found if failure is not None), None)
