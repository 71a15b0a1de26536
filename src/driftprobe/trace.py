"""Header, Record, Event, Footer: what stands in a trace. Specified in docs/trace-format.md.

A trace is JSON Lines: one header, then records and events, then a footer with counts and a digest (`trace_file.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import attrgetter

import msgspec

from driftprobe.fingerprint import SKETCH_SIZE
from driftprobe.trace_checks import CONSTANT_ARM

SCHEMA = "driftprobe/trace/1"
CONSTANTS = CONSTANT_ARM
"""The arm of records that hold constants of the model, not results: `q_proj.weight`, `rope.inv_freq` of a layer."""
OTHER_TOKEN = "other_token"
"""Event of mode `paths`: from `measured.position` on the candidate went on with another token than the reference."""
CALL_TOKENS = "call_tokens"
"""Event of mode `paths`: position -> how many tokens the call had that computed it last."""
CACHE_BEYOND = "cache_beyond"
"""Event of mode `paths`: position -> how many rows too many the cache held for the call that computed it last."""
LEFT_OUT = "not compared: "
"""How the events of mode `paths` begin that count, by tap, in how many calls something fired that has no pair."""
KNOB_FAILED = "the knob cannot be turned"
"""The event of an arm that runs with a knob of the engine turned, and failed: it is a control less, not a run lost."""
CANNOT_PASS = "cannot pass: "
"""How the events of mode `paths` begin that say why pairs without a failure are no pass; `measured` counts by tap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine declares of itself and of the model it runs."""

    name: str
    version: str = ""
    model: str = ""
    dtype: str = ""
    """The dtype that the model computes in."""
    casts: dict[str, str] = field(default_factory=dict)
    """Coarser dtypes that the engine uses on the path, by the place that does it: `{"k_cache": "float16"}`."""
    accumulate: str = ""
    """The dtype that matrix products are summed in, whatever they are stored in; empty where that is not known."""
    attention: str = ""
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    vocabulary: int = 0
    max_positions: int = 0
    switches: dict[str, int] = field(default_factory=dict)
    """Total lengths in tokens at which something in the model switches, by kind: `{"window": 4096}`."""
    device: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRead:
    """One position that the plan asked an arm for."""

    arm: str
    phase: str
    step: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first line: what was run, by whom, and what the plan asked for."""

    schema: str = SCHEMA
    run: str = ""
    engine: EngineFacts = field(default_factory=lambda: EngineFacts(name="unknown"))
    mode: str = "as_designed"
    prompt: str
    token_ids: tuple[int, ...] = ()
    """The whole sequence that the arms were fed from: the prompt, its continuation, filler for arms E."""
    prompt_len: int = 0
    prompt_text: str = ""
    steps: int = 1
    seed: int = 0
    rung: str = ""
    """Empty for the model's own dtype; else the higher precision of the ladder at which everything was run again."""
    date: str = ""
    reads: tuple[PlannedRead, ...] = ()
    taps: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Tap -> layers where the engine promises it (empty for taps outside the layers)."""
    sketch_size: int = SKETCH_SIZE
    payload: str = "none"
    labels: dict[str, str] = field(default_factory=dict)
    """For readers only: output path, a planted fault's name. Judgement never reads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """The head of a logits row: enough for top-1 agreement and the margin without a payload."""

    ids: tuple[int, ...]
    values: tuple[float, ...]
    logsumexp: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One tensor at one tap. Only prompt, phase, layer, tensor and hash are asked of a stranger's trace."""

    prompt: str
    phase: str
    layer: int | None
    tensor: str
    hash: str
    arm: str = ""
    step: int = 0
    token_id: int | None = None
    logical_tok_idx: int | None = None
    pos_id: int | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    nz_count: int | None = None
    abs_sum: float | None = None
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    l2: float | None = None
    nan_count: int | None = None
    inf_count: int | None = None
    sketch: tuple[float, ...] | None = None
    rows: tuple[str, ...] | None = None
    """K/V cache taps: one hash a row, in order of position."""
    row_start: int = 0
    """Absolute position of the first row."""
    source: str = "captured"
    """`captured`, or `recomputed` where a fused kernel hides the tensor and it was rebuilt from captured inputs."""
    top: Top | None = None
    order: int | None = None
    """The tap's rank in order of execution, from 0, where its name does not tell it (mode `paths`)."""
    payload: str | None = None
    """`FILE#NAME`: a safetensors file below the trace's folder, and the tensor's name in it."""

    @property
    def key(self) -> tuple[str, str, int, int | None, str, int | None]:
        """What makes a record unique in its file: arm, phase, step, layer, tensor, position."""
        return (self.arm, self.phase, self.step, self.layer, self.tensor, self.logical_tok_idx)


FAILED = "failed: "
"""How the event of an arm begins that could not be run; the rest says why."""
COST = "cost"
"""Event: what a rung of the precision ladder took, in `milliseconds`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that an arm did or checked, which no tensor shows (a cache row read back, say)."""

    event: str
    arm: str
    step: int = 0
    measured: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """The last line: counts, and SHA-256 of every byte before it."""

    records: int
    events: int
    sha256: str


Item = Header | Record | Event | Footer


@dataclass(frozen=True, slots=True)
class Trace:
    """One trace file, read."""

    header: Header
    records: tuple[Record, ...]
    events: tuple[Event, ...] = ()
    path: str = ""
    """Name of the file, without its folder."""
    damage: str = ""
    """Empty, or why the trace is incomplete."""
    foreign: bool = False
    """True for a trace without a header: only what its records carry is known."""


def encode_line(kind: str, item: Item) -> bytes:
    """Return one JSON line; fields that are None are left out, except a layer of None."""
    names, values = _FIELDS[type(item)]
    body = {n: v for n, v in zip(names, values(item), strict=True) if v is not None or n == "layer"}
    return msgspec.json.encode({"type": kind, **body}) + b"\n"


_FIELDS = {
    kind: (names, attrgetter(*names))
    for kind in (Header, Record, Event, Footer)
    for names in [tuple(spec.name for spec in fields(kind))]
}
"""Kind of line -> the names of its fields, and what reads them all at once."""
