"""run(plan, engine) -> trace: fingerprints what the engine hands out and writes it down."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from driftprobe.constants import constant_record, tensor_name
from driftprobe.engines.base import Engine, Recorded, Tapped
from driftprobe.fingerprint import Array, Fingerprint, fingerprint, row_hashes, to_float64
from driftprobe.payload import payload_file, write_payloads
from driftprobe.plan import Plan, sequence, tokens_needed
from driftprobe.taps import CACHE_TAPS
from driftprobe.trace import CONSTANTS, COST, Event, Header, PlannedRead, Record, Top, TraceWriter

PAYLOAD_ARMS = "PDATE"
"""First letters of the arms whose tensors are kept whole: the rest, P', D' and N, are judged by their sketches."""
TOP = 16
"""How many of the largest logits a record carries."""

_OF_A_FINGERPRINT = tuple(spec.name for spec in fields(Fingerprint))
"""Copied one by one: `asdict` copies every number of the sketch as well, a third of a capture's time."""

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
    started = time.perf_counter()
    header = _header(plan, engine, tokens, options)
    layers = frozenset(layer for where in header.taps.values() for layer in where)
    path = folder / f"{trace_name(plan)}.jsonl"
    with TraceWriter(path, header) as writer:
        kept: dict[str, dict[str, Array]] = {}
        engine.begin(plan)
        for arm in plan.arms:
            for item in engine.run(arm, tokens, layers):
                if isinstance(item, Event):
                    writer.event(item)
                elif isinstance(item, Recorded):
                    if _wanted(item.record, header):
                        writer.record(_adopted(item, plan, tokens, header, kept))
                elif _wanted(item, header):
                    writer.record(_record(item, plan, tokens, header, kept))
            progress(f"{arm.name} {'+'.join(str(c.stop - c.start) for c in arm.passes)} tokens")
        if options.payload != "none":  # without its tensor a constant says nothing
            for constant in engine.constants(layers):
                record = constant_record(constant, header, trace_name(plan))
                kept.setdefault(CONSTANTS, {})[tensor_name(record)] = constant.array
                writer.record(record)
        for arm_name, arrays in kept.items():
            write_payloads(folder / payload_file(trace_name(plan), arm_name), arrays)
        if plan.rung:
            took = round(1000 * (time.perf_counter() - started))
            writer.event(Event(event=COST, arm="", measured={"milliseconds": took}))
    return path


def _wanted(item: Tapped | Record, header: Header) -> bool:
    where = header.taps.get(item.tensor)
    return where is not None and (item.layer is None or item.layer in where)


def _header(plan: Plan, engine: Engine, tokens: tuple[int, ...], options: CaptureOptions) -> Header:
    chosen = None if plan.layers is None else set(plan.layers)
    taps = {
        name: tuple(layer for layer in where if chosen is None or layer in chosen)
        for name, where in engine.taps.items()
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
        reads=tuple(
            PlannedRead(arm=read.arm, phase=read.phase_name, step=read.step, position=read.position)
            for read in plan.reads
        ),
        taps={name: where for name, where in taps.items() if where or not engine.taps[name]},
        payload=options.payload,
        labels=options.labels,
    )


def _record(
    item: Tapped, plan: Plan, tokens: tuple[int, ...], header: Header, kept: dict[str, dict[str, Array]]
) -> Record:
    read, print_ = item.read, fingerprint(item.array, header.sketch_size)
    record = Record(
        prompt=plan.prompt.name,
        phase=read.phase_name,
        layer=item.layer,
        tensor=item.tensor,
        arm=read.arm,
        step=read.step,
        token_id=tokens[read.position],
        logical_tok_idx=read.position,
        pos_id=item.pos_id,
        **{name: getattr(print_, name) for name in _OF_A_FINGERPRINT},
        rows=row_hashes(item.array) if item.tensor in CACHE_TAPS else None,
        row_start=item.row_start,
        source=item.source,
        top=top_of(item.array) if item.tensor == "logits" else None,
    )
    return _with_payload(record, item.array, plan, header, kept)


def _adopted(
    item: Recorded, plan: Plan, tokens: tuple[int, ...], header: Header, kept: dict[str, dict[str, Array]]
) -> Record:
    """Return a record of the engine's own under this trace's names; its token is told where it left that out."""
    record, at = item.record, item.record.logical_tok_idx
    token = tokens[at] if record.token_id is None and at is not None else record.token_id
    record = replace(record, prompt=plan.prompt.name, token_id=token, payload=None)
    return _with_payload(record, item.array, plan, header, kept)


def _with_payload(
    record: Record, array: Array | None, plan: Plan, header: Header, kept: dict[str, dict[str, Array]]
) -> Record:
    """Return a record that names its payload, and keep that, where its arm's tensors are kept whole."""
    if array is None or header.payload == "none" or not _keeps_payload(record.arm):
        return record
    name = f"{record.phase}.{record.step}.{'model' if record.layer is None else record.layer}.{record.tensor}"
    kept.setdefault(record.arm, {})[name] = array
    return replace(record, payload=f"{payload_file(trace_name(plan), record.arm)}#{name}")


def _keeps_payload(arm: str) -> bool:
    return arm[0] in PAYLOAD_ARMS and not arm.endswith("'")


def top_of(logits: Array) -> Top | None:
    """Return the head of a logits row, or None where it is not finite throughout."""
    values = to_float64(logits).reshape(-1)
    if not np.isfinite(values).all():
        return None
    order = np.lexsort((np.arange(values.size), -values))[:TOP]
    peak = values.max()
    return Top(
        ids=tuple(int(i) for i in order),
        values=tuple(float(v) for v in values[order]),
        logsumexp=float(peak + np.log(np.exp(values - peak).sum())),
    )
