"""run(plan, engine) -> trace: fingerprints what the engine hands out and writes it down."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from driftprobe.background import Background, Begun
from driftprobe.constants import constant_record, tensor_name
from driftprobe.engines.base import Constant, Engine, Recorded, Tapped
from driftprobe.errors import EngineError
from driftprobe.fingerprint import Array, fields_and_rows, to_float64
from driftprobe.lines import NOTHING, Extra, LineMaker
from driftprobe.payload import payload_file, write_payloads
from driftprobe.plan import Arm, Plan, sequence, tokens_needed
from driftprobe.taps import CACHE_TAPS, SCORE_TAPS
from driftprobe.trace import CONSTANTS, COST, KNOB_FAILED, Event, Header, PlannedRead, Record, Top
from driftprobe.trace_file import Line, TraceWriter, line_of

PAYLOAD_ARMS = "PDATE"
"""First letters of the arms whose tensors are kept whole: the rest, P', D' and N, are judged by their sketches."""
TOP = 16
"""How many of the largest logits a record carries."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """What a capture is told beside its plan."""

    run: str = ""
    date: str = ""
    payload: str = "failing"
    """`none`, `failing` (all are written; the caller prunes them after judgement) or `all`."""
    labels: dict[str, str] = field(default_factory=dict)


def trace_name(plan: Plan) -> str:
    """Return the trace's file name without its ending: `<prompt>_<mode>`, and `_<rung>` at one of the ladder's."""
    return f"{plan.prompt.name}_{plan.mode.value}" + (f"_{plan.rung}" if plan.rung else "")


def choose_tokens(plan: Plan, engine: Engine) -> tuple[int, ...]:
    """Return the sequence that all arms of a plan are fed from, with the engine's own next tokens in it."""
    continuation = engine.greedy(plan.prompt.token_ids, plan.steps)
    return sequence(plan.prompt, continuation, tokens_needed(plan))


def capture(
    plan: Plan, engine: Engine, tokens: tuple[int, ...], folder: Path, options: CaptureOptions, progress: Progress
) -> Path:
    """Run every arm of a plan over its tokens and write its trace into a folder; returns the trace's path.

    `progress` is called with a line after each arm. Raises OutputError where the folder cannot be written.
    """
    return capture_once([plan], engine, tokens, folder, options, lambda _arm, line: progress(line))[0]


def capture_once(
    plans: Sequence[Plan], engine: Engine, tokens: tuple[int, ...], folder: Path, options: CaptureOptions,
    progress: Callable[[Arm, str], None],
) -> list[Path]:  # fmt: skip
    """Run each arm of plans that belong `together` once, and write every plan's trace; returns the traces' paths.

    Each trace is what `capture` makes of its plan alone. `progress` is called with each arm and a line, after it.
    Raises OutputError where the folder cannot be written.
    """
    started = time.perf_counter()
    fullest = plans[0]
    header = _header(fullest, engine, tokens, options)
    layers = frozenset(layer for where in header.taps.values() for layer in where)
    desk = _Desk(fullest, tokens, header)
    with ExitStack() as open_files:
        sheets = [_Sheet.begun(plan, fullest, header, folder, open_files) for plan in plans]
        with Background(desk.work, lambda made: _write(made, sheets)) as background:
            engine.begin(fullest, background.begin)
            for arm in fullest.arms:
                said = f"{arm.name} {'+'.join(str(c.stop - c.start) for c in arm.passes)} tokens"
                try:
                    for item in engine.run(arm, tokens, layers):
                        background.put(item, 0 if isinstance(item, Begun) else _size(item))
                except EngineError as error:
                    if not arm.batch:
                        raise
                    background.put(Event(event=KNOB_FAILED, arm=arm.name), 0)
                    said += f", left out: {error.what}: {error.measured}"
                background.flush()
                progress(arm, said)
        constants = list(engine.constants(layers)) if options.payload != "none" else []  # nothing without its tensor
        took = round(1000 * (time.perf_counter() - started))
        for sheet in sheets:
            sheet.end(constants, folder, took)
    return [sheet.writer.path for sheet in sheets]


@dataclass(slots=True)
class _Sheet:
    """One of the traces that are written together: it takes what is made of its own plan's arms."""

    plan: Plan
    writer: TraceWriter
    arms: frozenset[str] | None
    """Names of the arms whose lines it takes; None takes all that comes."""
    renamed: tuple[bytes, bytes]
    """How a payload's reference begins in the lines that are made, and how it does here."""
    kept: dict[str, dict[str, Array]] = field(default_factory=dict)
    """Arm -> name -> whole tensor."""

    @classmethod
    def begun(cls, plan: Plan, fullest: Plan, header: Header, folder: Path, files: ExitStack) -> _Sheet:
        """Return the trace of a plan with its header written; `header` is that of the plan that has all arms."""
        own = header if plan is fullest else replace(header, mode=plan.mode.value, reads=_reads(plan))
        writer = files.enter_context(TraceWriter(folder / f"{trace_name(plan)}.jsonl", own))
        arms = None if plan is fullest else frozenset(arm.name for arm in plan.arms)
        return cls(plan, writer, arms, (_reference_start(fullest), _reference_start(plan)))

    def take(self, made: Sequence[_Made]) -> None:
        """Write those lines that are this plan's, and keep their tensors for later."""
        mine = [each for each in made if self.arms is None or each.of in self.arms]
        self.writer.group(self._named(each) for each in mine)
        for each in mine:
            if each.array is not None:
                self.kept.setdefault(each.of, {})[each.name] = each.array

    def _named(self, made: _Made) -> Line | Event:
        """Return a line with the reference to its payload under this trace's name."""
        what, (before, after) = made.what, self.renamed
        if made.array is None or before == after or isinstance(what, Event):
            return what
        return replace(what, raw=what.raw.replace(before, after, 1))

    def end(self, constants: Sequence[Constant], folder: Path, took: int) -> None:
        """Write constants, whole tensors, and at a rung what it took, in milliseconds."""
        name, writer = trace_name(self.plan), self.writer
        for constant in constants:
            record = constant_record(constant, writer.header, name)
            self.kept.setdefault(CONSTANTS, {})[tensor_name(record)] = constant.array
            writer.record(record)
        for arm, arrays in self.kept.items():
            write_payloads(folder / payload_file(name, arm), arrays)
        if self.plan.rung:
            writer.event(Event(event=COST, arm="", measured={"milliseconds": took}))


def _write(made: Sequence[_Made], sheets: Sequence[_Sheet]) -> None:
    for sheet in sheets:
        sheet.take(made)


def _reference_start(plan: Plan) -> bytes:
    """Return how the references to payloads begin in a trace's lines; within a string its quotes would be escaped."""
    return b'"payload":' + msgspec.json.encode(payload_file(trace_name(plan), ""))[: -len('..safetensors"') + 1]


def _size(item: Tapped | Recorded | Event) -> int:
    array = None if isinstance(item, Event) else item.array
    return 0 if array is None else array.nbytes


@dataclass(slots=True)
class _Made:
    """What is written, and the tensor that is kept beside it."""

    what: Line | Event
    of: str
    """Its arm."""
    name: str = ""
    array: Array | None = None


class _Desk:
    """Turns what an engine hands out into lines and payloads, several items at a time, whenever."""

    def __init__(self, plan: Plan, tokens: tuple[int, ...], header: Header) -> None:
        self.plan, self.tokens, self.header = plan, tokens, header
        self._maker = LineMaker(plan.prompt.name, tokens, header.sketch_size)
        self._places = {(layer, tensor) for tensor, where in header.taps.items() for layer in (None, *where)}

    def work(self, items: Sequence[Tapped | Recorded | Event]) -> Callable[[], list[_Made]]:
        """Prepare those items that the plan asks for; what is returned makes their lines, and keeps whole tensors."""
        parts: list[Callable[[], list[_Made]]] = []
        together: list[Tapped] = []
        for item in items:
            if not self._wanted(item):
                continue
            if isinstance(item, Tapped) and self._maker.takes(item):
                together.append(item)
                continue
            parts += [self._together(together), partial(self._alone, item)]
            together = []
        parts.append(self._together(together))
        return lambda: [made for part in parts for made in part()]

    def _wanted(self, item: Tapped | Recorded | Event) -> bool:
        if isinstance(item, Event):
            return True
        what = item.record if isinstance(item, Recorded) else item
        return (what.layer, what.tensor) in self._places

    def _together(self, items: Sequence[Tapped]) -> Callable[[], list[_Made]]:
        if not items:
            return list
        told = [self._told(item) for item in items]
        lines = self._maker.lines(items, [extra for _, extra in told])
        return lambda: [
            _Made(line, item.read.arm) if name is None else _Made(line, item.read.arm, name, item.array)
            for line, item, (name, _) in zip(lines(), items, told, strict=True)
        ]

    def _told(self, item: Tapped) -> tuple[str | None, Extra]:
        """Return the name under which a tensor is kept, and what its line says of that, and of logits."""
        if self.header.payload == "none" and item.tensor != "logits":
            return None, NOTHING
        read = item.read
        name = self._payload_name(read.arm, read.phase_name, read.step, item.layer, item.tensor)
        return name, Extra(_top_of(item), self._reference(read.arm, name))

    def _alone(self, item: Tapped | Recorded | Event) -> list[_Made]:
        if isinstance(item, Event):
            return [_Made(item, item.arm)]
        record = self._record(item) if isinstance(item, Tapped) else self._adopted(item)
        name = self._payload_name(record.arm, record.phase, record.step, record.layer, record.tensor)
        if item.array is None or name is None:
            return [_Made(line_of(record, self.header.sketch_size), record.arm)]
        record = replace(record, payload=self._reference(record.arm, name))
        return [_Made(line_of(record, self.header.sketch_size), record.arm, name, item.array)]

    def _payload_name(self, arm: str, phase: str, step: int, layer: int | None, tensor: str) -> str | None:
        if self.header.payload == "none" or not _keeps_payload(arm):
            return None
        return f"{phase}.{step}.{'model' if layer is None else layer}.{tensor}"

    def _reference(self, arm: str, name: str | None) -> str | None:
        return None if name is None else f"{payload_file(trace_name(self.plan), arm)}#{name}"

    def _record(self, item: Tapped) -> Record:
        read = item.read
        found, rows = fields_and_rows(item.array, self.header.sketch_size, rows=item.tensor in CACHE_TAPS)
        return Record(
            prompt=self.plan.prompt.name,
            phase=read.phase_name,
            layer=item.layer,
            tensor=item.tensor,
            arm=read.arm,
            step=read.step,
            token_id=self.tokens[read.position],
            logical_tok_idx=read.position,
            pos_id=item.pos_id,
            **found,
            rows=rows,
            row_start=item.row_start,
            source=item.source,
            top=_top_of(item),
        )

    def _adopted(self, item: Recorded) -> Record:
        """Return a record of the engine's own under this trace's names; its token is told where it left that out."""
        record, at = item.record, item.record.logical_tok_idx
        token = self.tokens[at] if record.token_id is None and at is not None else record.token_id
        return replace(record, prompt=self.plan.prompt.name, token_id=token, payload=None)


def _header(plan: Plan, engine: Engine, tokens: tuple[int, ...], options: CaptureOptions) -> Header:
    chosen = None if plan.layers is None else set(plan.layers)
    taps = {
        name: tuple(layer for layer in where if chosen is None or layer in chosen)
        for name, where in engine.taps.items()
        if plan.scores or name not in SCORE_TAPS
    }
    return Header(
        run=options.run,
        engine=engine.facts,
        mode=plan.mode.value,
        prompt=plan.prompt.name,
        token_ids=tokens,
        prompt_len=len(plan.prompt.token_ids),
        prompt_text=plan.prompt.text,
        steps=plan.steps,
        seed=plan.seed,
        rung=plan.rung,
        date=options.date,
        reads=_reads(plan),
        taps={name: where for name, where in taps.items() if where or not engine.taps[name]},
        payload=options.payload,
        labels=options.labels,
    )


def _reads(plan: Plan) -> tuple[PlannedRead, ...]:
    return tuple(
        PlannedRead(arm=read.arm, phase=read.phase_name, step=read.step, position=read.position) for read in plan.reads
    )


def _keeps_payload(arm: str) -> bool:
    return arm[0] in PAYLOAD_ARMS and not arm.endswith("'")


def _top_of(item: Tapped) -> Top | None:
    return top_of(item.array) if item.tensor == "logits" else None


def top_of(logits: Array) -> Top | None:
    """Return the head of a logits row, or None where it is not finite throughout."""
    values = to_float64(logits).reshape(-1)
    if not np.isfinite(values).all():
        return None
    last = max(values.size - TOP, 0)
    reached = np.partition(values, last)[last]  # the smallest of the largest: sorting a whole vocabulary takes longer
    ids = np.flatnonzero(values >= reached)
    order = ids[np.lexsort((ids, -values[ids]))][:TOP]
    peak = values.max()
    return Top(
        ids=tuple(int(i) for i in order),
        values=tuple(float(v) for v in values[order]),
        logsumexp=float(peak + np.log(np.exp(values - peak).sum())),
    )
