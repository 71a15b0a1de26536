"""driftprobe compare: two engines, or two builds of one, on the same tokens in the same phase.

Each pair of traces becomes a trace of mode `paths`, whose reference is the one side and whose candidate the other: once
for their prefills and once for their decode steps. Both sides' controls set the floor. docs/engines.md says how to read
what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from driftprobe.artifacts import Layout
from driftprobe.constants import tensor_name
from driftprobe.errors import UsageError
from driftprobe.fingerprint import UNIT_ROUNDOFF, Array
from driftprobe.payload import Payloads, payload_file, write_payloads
from driftprobe.taps import CANDIDATE, PATHS, REFERENCE, place
from driftprobe.trace import CONSTANTS, LEFT_OUT, EngineFacts, Event, Header, PlannedRead, Record, Trace, TraceWriter

PHASES = {"prefill": "P", "decode": "D"}
"""What is compared, and the arm that holds it."""
_Place = tuple[int | None, str, int | None]


@dataclass(frozen=True)
class Side:
    """One engine's run: its traces and their payloads."""

    name: str
    """What its traces are called in messages: the folder as it was given."""
    traces: tuple[Trace, ...]
    payloads: Payloads


def write_comparison(left: Side, right: Side, stage: Layout, date: str, output: str = "") -> list[str]:
    """Write a trace for each prompt and phase that both sides have; returns what could not be compared, a line each.

    `output` is the folder that reports name. The reference is the side that measured its rounding noise (arms N), else
    the left one: their drift is of use only against the reference. Raises UsageError where no prompt of both has the
    same tokens.
    """
    reference, candidate = (right, left) if _noisy(right) and not _noisy(left) else (left, right)
    left_out: list[str] = []
    written = 0
    for one in _runs(reference):
        other = next((t for t in _runs(candidate) if t.header.prompt == one.header.prompt), None)
        fault = f"only {reference.name} has it" if other is None else _other_tokens(one, other)
        if other is None or fault:
            left_out.append(f"prompt {one.header.prompt}: {fault}")
            continue
        for phase in PHASES:
            written += _write(one, other, phase, (reference, candidate), stage, (date, output))
    names = {t.header.prompt for t in _runs(reference)}
    left_out += [f"prompt {t.header.prompt}: only {candidate.name} has it" for t in _runs(candidate)
                 if t.header.prompt not in names]  # fmt: skip
    if not written:
        raise UsageError(
            "nothing to compare", where=f"{left.name} and {right.name}", measured="; ".join(left_out)[:400] or "no run",
            allowed="runs of the same prompts, token by token",
            next_step="run both engines on one --prompt-file of token ids, with the same --steps",
        )  # fmt: skip
    return left_out


def _runs(side: Side) -> list[Trace]:
    """Return a side's traces, one for each prompt; of two modes the first, whose arms P and D are the same."""
    found: dict[str, Trace] = {}
    for trace in side.traces:
        if not trace.header.rung and trace.header.mode != PATHS:
            found.setdefault(trace.header.prompt, trace)
    return list(found.values())


def _noisy(side: Side) -> bool:
    return any(_is_noise(record.arm) for trace in _runs(side) for record in trace.records)


def _is_noise(arm: str) -> bool:
    return arm[0] == "N" and arm[1:].isdigit()


def _other_tokens(one: Trace, other: Trace) -> str:
    """Return where the two ran other tokens, or nothing; tokens that only one of them names cannot disagree."""
    if one.damage or other.damage:
        return one.damage or other.damage
    last = one.header.prompt_len + min(one.header.steps, other.header.steps)
    for at, (mine, theirs) in enumerate(zip(one.header.token_ids[:last], other.header.token_ids[:last], strict=False)):
        if mine != theirs:
            chosen = " (each side chose its own next token)" if at >= one.header.prompt_len else ""
            return f"token {mine} and token {theirs} at position {at}{chosen}"
    if one.header.prompt_len != other.header.prompt_len:
        return f"{one.header.prompt_len} and {other.header.prompt_len} tokens of prompt"
    return ""


def _write(
    one: Trace, other: Trace, phase: str, sides: tuple[Side, Side], stage: Layout, named: tuple[str, str]
) -> int:
    """Write the trace of one phase; returns how many pairs it holds. `named` is its date and output folder."""
    arm = PHASES[phase]
    mine, theirs = (_rows(trace, arm) for trace in (one, other))
    shared = {where for where in mine.keys() & theirs.keys() if mine[where].shape == theirs[where].shape}
    if not shared:
        return 0
    header = _header(one, other, phase, shared, sides, *named)
    stem = f"{header.prompt}_{PATHS}"
    kept: dict[str, dict[str, Array]] = {}
    with TraceWriter(stage.traces / f"{stem}.jsonl", header) as writer:
        for record, payloads in _records(one, other, phase, shared, sides):
            writer.record(_kept(replace(record, prompt=header.prompt), payloads, stem, kept))
        for event in _events(mine, theirs, shared):
            writer.event(event)
    for name, arrays in kept.items():
        write_payloads(stage.traces / payload_file(stem, name), arrays)
    return len(shared)


def _rows(trace: Trace, arm: str) -> dict[_Place, Record]:
    return {(r.layer, r.tensor, r.logical_tok_idx): r for r in trace.records if r.arm == arm}


def _records(
    one: Trace, other: Trace, phase: str, shared: set[_Place], sides: tuple[Side, Side]
) -> Iterator[tuple[Record, Payloads]]:
    """Yield every record of the comparison under its new arm, with where its tensor is found."""
    for trace, side, word, names in (
        (one, sides[0], REFERENCE, _renamed(one, phase, "P")),
        (other, sides[1], CANDIDATE, _renamed(other, phase, "D")),
    ):
        for record in trace.records:
            arm, at = names.get(record.arm), (record.layer, record.tensor, record.logical_tok_idx)
            if arm is not None and at in shared:
                yield replace(record, arm=arm, phase=word, step=0), side.payloads
    source = one if any(r.arm == CONSTANTS for r in one.records) else other
    for record in source.records:
        if record.arm == CONSTANTS:
            yield record, sides[0 if source is one else 1].payloads


def _renamed(trace: Trace, phase: str, side: str) -> dict[str, str]:
    """Return a side's arms and what they are called in the comparison: its own repetition, and controls of prefill.

    Extensions of the candidate become `D@E1`: another run of it, compared with it and not with the reference.
    """
    arm = PHASES[phase]
    names = {arm: side, f"{arm}'": f"{side}'"}
    if phase == "prefill":
        others = sorted({record.arm for record in trace.records})
        names |= {a: a if side == "P" else f"D@{a}" for a in others if a[0] == "E" and a[1:].isdigit()}
        names |= {a: a for a in others if side == "P" and (_is_noise(a) or a == "P@chunks")}
    return names


def _kept(record: Record, payloads: Payloads, stem: str, kept: dict[str, dict[str, Array]]) -> Record:
    """Return a record whose payload is copied into the comparison's own files, for the arms that are compared."""
    array = payloads.get(record) if record.arm in ("P", "D", CONSTANTS) else None
    if array is None:
        return replace(record, payload=None)
    name = tensor_name(record) if record.arm == CONSTANTS else f"{record.logical_tok_idx}.{tensor_name(record)}"
    kept.setdefault(record.arm, {})[name] = array
    return replace(record, payload=f"{payload_file(stem, record.arm)}#{name}")


def _header(
    one: Trace, other: Trace, phase: str, shared: set[_Place], sides: tuple[Side, Side], date: str, output: str
) -> Header:
    taps: dict[str, set[int]] = {}
    for layer, tensor, _ in shared:
        taps.setdefault(tensor, set()).update(() if layer is None else (layer,))
    positions = sorted({at for _, _, at in shared if at is not None})
    first = positions[0] if positions else 0
    return Header(
        run=f"{one.header.run} and {other.header.run}",
        engine=_facts(one.header.engine, other.header.engine),
        mode=PATHS,
        prompt=f"{one.header.prompt}.{phase}",
        token_ids=one.header.token_ids,
        prompt_len=one.header.prompt_len + min(one.header.steps, other.header.steps),
        prompt_text=one.header.prompt_text,
        date=date,
        reads=tuple(PlannedRead(arm=arm, phase=word, step=0, position=first)
                    for arm, word in (("P", REFERENCE), ("D", CANDIDATE))),
        taps={tensor: tuple(sorted(layers)) for tensor, layers in taps.items()},
        sketch_size=one.header.sketch_size,
        payload=one.header.payload if one.header.payload == other.header.payload else "failing",
        labels={"reference": sides[0].name, "candidate": sides[1].name} | ({"output": output} if output else {}),
    )  # fmt: skip


def _facts(one: EngineFacts, other: EngineFacts) -> EngineFacts:
    """Return what is known of both: the coarser of two dtypes, and every cast of either."""
    coarser = max((one.dtype, other.dtype), key=lambda dtype: UNIT_ROUNDOFF.get(dtype, 1.0))
    return EngineFacts(
        name=f"{one.name} and {other.name}",
        version=f"{one.version} | {other.version}",
        model=one.model if one.model == other.model else f"{one.model} | {other.model}",
        dtype=coarser,
        casts=_casts(one, other),
        accumulate=one.accumulate if one.accumulate == other.accumulate else "",
        attention=one.attention if one.attention == other.attention else f"{one.attention} | {other.attention}",
        layers=max(one.layers, other.layers),
        heads=one.heads or other.heads,
        kv_heads=one.kv_heads or other.kv_heads,
        vocabulary=one.vocabulary or other.vocabulary,
        max_positions=min(one.max_positions or other.max_positions, other.max_positions or one.max_positions),
        device=one.device if one.device == other.device else f"{one.device} | {other.device}",
    )


def _casts(one: EngineFacts, other: EngineFacts) -> dict[str, str]:
    """Return every cast of either engine; where both cast at one place, the coarser."""
    casts = dict(one.casts)
    for where, dtype in other.casts.items():
        if UNIT_ROUNDOFF.get(dtype, 1.0) > UNIT_ROUNDOFF.get(casts.get(where, "float64"), 0.0):
            casts[where] = dtype
    return casts


def _events(mine: dict[_Place, Record], theirs: dict[_Place, Record], shared: set[_Place]) -> Iterator[Event]:
    """Yield the counts of positions, and what one side alone has: an engine need not have every tap."""
    here, there = ({at for _, _, at in rows} for rows in (mine, theirs))
    common = here & there
    yield Event(event="positions", arm="D", measured={
        "common": len(common), "compared": len({at for _, _, at in shared}), "only_reference": len(here - there),
        "only_candidate": len(there - here), "moved": 0,
    })  # fmt: skip
    for reason, rows, others in (
        ("only the reference has this tap", mine, theirs),
        ("only the candidate has this tap", theirs, mine),
    ):
        yield from _left_out(reason, [w for w in rows if w[2] in common and w not in others])
    yield from _left_out("the two sides have other shapes", [w for w in mine.keys() & theirs.keys() if w not in shared])


def _left_out(reason: str, places: Sequence[_Place]) -> Iterator[Event]:
    counts: dict[str, int] = {}
    for layer, tensor, _ in places:
        counts[place(layer, tensor)] = counts.get(place(layer, tensor), 0) + 1
    if counts:
        yield Event(event=f"{LEFT_OUT}{reason}", arm="D", measured=counts)


def side_of(folder: Path, traces: tuple[Trace, ...], where: Path) -> Side:
    """Return a side: its name is the folder as it was given, its payloads lie in `where`."""
    return Side(folder.as_posix(), traces, Payloads(where))
