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
from driftprobe.compare import PayloadSource, other_extent, same_shape
from driftprobe.constants import tensor_name
from driftprobe.errors import UsageError
from driftprobe.extents import NO_CONTROL, Cuts, OneTensor, Rows, alike, can_cut, cut, find_cuts
from driftprobe.extents import Place as _Place
from driftprobe.fingerprint import SKETCH_SIZE, UNIT_ROUNDOFF, Array
from driftprobe.payload import Payloads, payload_file, write_payloads
from driftprobe.taps import BY_NAME, CANDIDATE, PATHS, REFERENCE, execution_order, place
from driftprobe.trace import (
    CANNOT_PASS,
    CONSTANTS,
    FAILED,
    LEFT_OUT,
    EngineFacts,
    Event,
    Header,
    PlannedRead,
    Record,
    Trace,
)
from driftprobe.trace_file import TraceWriter

PHASES = {"prefill": "P", "decode": "D"}
"""What is compared, and the arm that holds it."""


@dataclass(frozen=True)
class Side:
    """One engine's run: its traces and their payloads."""

    name: str
    """What its traces are called in messages: the folder as it was given."""
    traces: tuple[Trace, ...]
    payloads: Payloads


def write_comparison(left: Side, right: Side, stage: Layout, date: str, output: str = "") -> list[str]:
    """Write a trace for each prompt and phase that either side has; returns what could not be compared, a line each.

    `output` is the folder that reports name. The reference is the side that measured its rounding noise (arms N), else
    the left one: their drift is of use only against the reference. Raises UsageError where no prompt of both has the
    same tokens, neither side a record of one, or the sketches are of two sizes.
    """
    reference, candidate = (right, left) if _noisy(right) and not _noisy(left) else (left, right)
    _check_sketches(left, right)
    left_out: list[str] = []
    written = 0
    for one in _runs(reference):
        name = one.header.prompt
        other = next((t for t in _runs(candidate) if t.header.prompt == name), None)
        if other is None:
            left_out.append(f"prompt {name}: only {reference.name} has it")
            continue
        parted = _other_tokens(one, other)
        if parted is not None:
            left_out.append(f"prompt {name}: {parted.words}")
        if parted is None or parted.chosen:
            _write_prompt(_Couple(one, other, (reference, candidate), parted), stage, (date, output))
            written += 1
    names = {t.header.prompt for t in _runs(reference)}
    left_out += [f"prompt {t.header.prompt}: only {candidate.name} has it" for t in _runs(candidate)
                 if t.header.prompt not in names]  # fmt: skip
    if not written:
        raise _nothing(f"{left.name} and {right.name}", "; ".join(left_out)[:400] or "no run")
    return left_out


def _check_sketches(left: Side, right: Side) -> None:
    sizes = {side.name: sorted({size for trace in _runs(side) for size in _sketch_sizes(trace)})
             for side in (left, right)}  # fmt: skip
    if len({size for found in sizes.values() for size in found}) > 1:
        raise UsageError(
            "sketches of two sizes", where=" and ".join(sizes),
            measured="; ".join(f"{name}: sketch_size {', '.join(map(str, found))}" for name, found in sizes.items()
                               if found),
            allowed=f"one sketch_size on both sides, {SKETCH_SIZE} by default",
            next_step="run one side again with the other's sketch_size",
        )  # fmt: skip


def _sketch_sizes(*traces: Trace) -> set[int]:
    return {len(record.sketch) for trace in traces for record in trace.records if record.sketch is not None}


def _nothing(where: str, measured: str) -> UsageError:
    return UsageError(
        "nothing to compare", where=where, measured=measured, allowed="runs of the same prompts, token by token",
        next_step="run both engines on one --prompt-file of token ids, with the same --steps",
    )  # fmt: skip


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
    return arm[:1] == "N" and arm[1:].isdigit()


@dataclass(frozen=True)
class _Parted:
    """Where two runs of one prompt begin to have other tokens."""

    at: int
    words: str
    chosen: bool
    """Whether the prompts are the same, and the engines went on with next tokens of their own."""


@dataclass(frozen=True)
class _Couple:
    """Both sides' traces of one prompt: the reference's and the candidate's."""

    one: Trace
    other: Trace
    sides: tuple[Side, Side]
    parted: _Parted | None

    @property
    def members(self) -> tuple[tuple[Trace, Side, str], ...]:
        """Each trace, its side, and the arm that it becomes."""
        return ((self.one, self.sides[0], "P"), (self.other, self.sides[1], "D"))


def _other_tokens(one: Trace, other: Trace) -> _Parted | None:
    """Return where the two ran other tokens, or None; tokens that only one of them names cannot disagree."""
    length = one.header.prompt_len
    last = length + min(one.header.steps, other.header.steps)
    for at, (mine, theirs) in enumerate(zip(one.header.token_ids[:last], other.header.token_ids[:last], strict=False)):
        if mine != theirs:
            chosen = at >= length == other.header.prompt_len
            why = " (each side chose its own next token)" if chosen else ""
            return _Parted(at, f"token {mine} and token {theirs} at position {at}{why}", chosen)
    if length != other.header.prompt_len:
        return _Parted(0, f"{length} and {other.header.prompt_len} tokens of prompt", chosen=False)
    return None


def _write_prompt(couple: _Couple, stage: Layout, named: tuple[str, str]) -> None:
    """Write a trace for each phase that has a record; a phase that failed on both sides is told in the other's.

    `named` is their date and output folder. Raises UsageError where neither side has a record of prefill or decode.
    """
    held = [phase for phase, arm in PHASES.items() if _rows(couple.one, arm) or _rows(couple.other, arm)]
    if not held:
        raise _nothing(f"prompt {couple.one.header.prompt}", "no record of prefill or decode on either side")
    failed = {phase: list(_failed(couple, phase)) for phase in PHASES}
    lost = [event for phase in PHASES if phase not in held for event in failed[phase]]
    for phase in held:
        _write(couple, phase, failed[phase] + lost, stage, named)


def _write(couple: _Couple, phase: str, failed: list[Event], stage: Layout, named: tuple[str, str]) -> None:
    """Write the trace of one phase; where no two records can be compared, it holds what one side alone has."""
    arm, parted = PHASES[phase], couple.parted
    everything = (_rows(couple.one, arm), _rows(couple.other, arm))
    mine, theirs = (
        {w: r for w, r in rows.items() if parted is None or (w[2] is not None and w[2] < parted.at)}
        for rows in everything
    )
    cuts = find_cuts(mine, theirs, (couple.sides[0].payloads, couple.sides[1].payloads))
    shared = {where for where in mine.keys() & theirs.keys() if alike(mine[where], theirs[where])}
    shared |= cuts.to.keys() | cuts.seen
    held = {"P": shared, "D": shared} if shared else _alone(*everything)
    header = _header(couple, phase, held["P"] | held["D"], *named)
    stem = f"{header.prompt}_{PATHS}"
    kept: dict[str, dict[str, Array]] = {}
    with TraceWriter(stage.traces / f"{stem}.jsonl", header) as writer:
        for record, payloads in _cut(_records(couple, phase, held), cuts, (mine, theirs), header.sketch_size):
            writer.record(_kept(replace(record, prompt=header.prompt), payloads, stem, kept))
        for event in (*failed, *_events(mine, theirs, shared), *cuts.events(), *_doubts(mine, theirs, parted)):
            writer.event(event)
    for name, arrays in kept.items():
        write_payloads(stage.traces / payload_file(stem, name), arrays)


def _rows(trace: Trace, arm: str) -> dict[_Place, Record]:
    return {(r.layer, r.tensor, r.logical_tok_idx): r for r in trace.records if r.arm == arm}


def _alone(mine: dict[_Place, Record], theirs: dict[_Place, Record]) -> dict[str, set[_Place]]:
    return {"P": set(mine), "D": set() if mine else set(theirs)}


def _failed(couple: _Couple, phase: str) -> Iterator[Event]:
    """Yield why a side's arms of this phase failed, in its own words or because planned steps have no record."""
    for trace, side, became in couple.members:
        names = _renamed(trace, phase, became)
        faults = [(e.arm, e.event.removeprefix(FAILED)) for e in trace.events if e.event.startswith(FAILED)]
        if trace.damage:
            faults.append((PHASES[phase], f"its trace is incomplete: {trace.damage}"))
        told, seen = {arm for arm, _ in faults}, {(record.arm, record.step) for record in trace.records}
        faults += [(read.arm, f"no record of step {read.step}, which its trace plans") for read in trace.header.reads
                   if read.arm not in told and (read.arm, read.step) not in seen]  # fmt: skip
        for arm, fault in faults:
            if arm in names:
                yield Event(event=f"{FAILED}{side.name}, its arm {arm}: {fault}", arm=names[arm])


def _records(couple: _Couple, phase: str, held: dict[str, set[_Place]]) -> Iterator[tuple[Record, PayloadSource]]:
    """Yield every record of the comparison under its new arm, with where its tensor is found."""
    for trace, side, became in couple.members:
        names, word = _renamed(trace, phase, became), REFERENCE if became == "P" else CANDIDATE
        for record in trace.records:
            arm, at = names.get(record.arm), (record.layer, record.tensor, record.logical_tok_idx)
            if arm is not None and at in held[became]:
                yield replace(record, arm=arm, phase=word, step=0), side.payloads
    source = couple.one if any(r.arm == CONSTANTS for r in couple.one.records) else couple.other
    for record in source.records:
        if record.arm == CONSTANTS:
            yield record, couple.sides[0 if source is couple.one else 1].payloads


def _cut(records: Iterator[tuple[Record, PayloadSource]], cuts: Cuts, bases: tuple[Rows, Rows],
         sketch_size: int) -> Iterator[tuple[Record, PayloadSource]]:  # fmt: skip
    """Yield records with those of other positions cut to what both sides have.

    A control is cut where its tensor was kept, or is bit for bit that of the arm compared; else it is left over.
    """
    for record, payloads in records:
        where = (record.layer, record.tensor, record.logical_tok_idx)
        to = None if record.arm == CONSTANTS else cuts.to.get(where)
        if to is None:
            yield record, payloads
            continue
        base = bases[record.arm[0] == "D"][where]
        array = payloads.get(base if (record.hash, record.dtype) == (base.hash, base.dtype) else record)
        if array is None or not can_cut(record, to):
            cuts.untold.setdefault(NO_CONTROL, []).append(where)
            continue
        shorter, rows = cut(record, array, to, sketch_size)
        yield shorter, OneTensor(rows)


def _renamed(trace: Trace, phase: str, side: str) -> dict[str, str]:
    """Return a side's arms and what they are called in the comparison: its own repetition, and controls of prefill.

    Extensions of the candidate become `D@E1`: another run of it, compared with it and not with the reference.
    """
    arm = PHASES[phase]
    names = {arm: side, f"{arm}'": f"{side}'"}
    if phase == "prefill":
        others = {r.arm for r in trace.records} | {e.arm for e in trace.events} | {r.arm for r in trace.header.reads}
        names |= {a: a if side == "P" else f"D@{a}" for a in others if a[:1] == "E" and a[1:].isdigit()}
        names |= {a: a for a in others if side == "P" and (_is_noise(a) or a == "P@chunks")}
    return names


def _kept(record: Record, payloads: PayloadSource, stem: str, kept: dict[str, dict[str, Array]]) -> Record:
    """Return a record whose payload is copied into the comparison's own files, for the arms that are compared."""
    array = payloads.get(record) if record.arm in ("P", "D", CONSTANTS) else None
    if array is None:
        return replace(record, payload=None)
    name = tensor_name(record) if record.arm == CONSTANTS else f"{record.logical_tok_idx}.{tensor_name(record)}"
    kept.setdefault(record.arm, {})[name] = array
    return replace(record, payload=f"{payload_file(stem, record.arm)}#{name}")


def _header(couple: _Couple, phase: str, shared: set[_Place], date: str, output: str) -> Header:
    one, other, sides = couple.one, couple.other, couple.sides
    taps: dict[str, set[int]] = {}
    for layer, tensor, _ in shared:
        taps.setdefault(tensor, set()).update(() if layer is None else (layer,))
    positions = sorted({at for _, _, at in shared if at is not None})
    first = positions[0] if positions else 0
    length = one.header.prompt_len + min(one.header.steps, other.header.steps)
    return Header(
        run=f"{one.header.run} and {other.header.run}",
        engine=_facts(one.header.engine, other.header.engine),
        mode=PATHS,
        prompt=f"{one.header.prompt}.{phase}",
        token_ids=one.header.token_ids,
        prompt_len=min(length, len(one.header.token_ids) or length),
        prompt_text=one.header.prompt_text,
        date=date,
        reads=tuple(PlannedRead(arm=arm, phase=word, step=0, position=first)
                    for arm, word in (("P", REFERENCE), ("D", CANDIDATE))),
        taps={tensor: tuple(sorted(layers)) for tensor, layers in taps.items()},
        sketch_size=min(_sketch_sizes(one, other), default=one.header.sketch_size),
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
        yield from _counted(f"{LEFT_OUT}{reason}", [w for w in rows if w[2] in common and w not in others])


def _doubts(mine: dict[_Place, Record], theirs: dict[_Place, Record], parted: _Parted | None) -> Iterator[Event]:
    """Yield what keeps the comparison from passing: what was compared cannot stand for what was not."""
    if parted is not None:
        yield Event(event=f"{CANNOT_PASS}{parted.words}", arm="D")
    both = mine.keys() & theirs.keys()
    odd = [w for w in both if not same_shape(mine[w], theirs[w]) and not other_extent(mine[w], theirs[w])]
    yield from _counted(f"{CANNOT_PASS}the two sides have other shapes", odd)
    common = {at for _, _, at in mine} & {at for _, _, at in theirs}
    last: dict[int | None, _Place] = {}
    for where in mine.keys() | theirs.keys():
        _, tensor, at = where
        if at in common and tensor in BY_NAME:
            best = last.get(at, where)
            last[at] = max(best, where, key=lambda w: execution_order(w[0], w[1]))
    for side, other, rows in (("reference", "candidate", mine), ("candidate", "reference", theirs)):
        ends = [where for where in last.values() if where not in rows]
        yield from _counted(f"{CANNOT_PASS}the {side} lacks the last tap of the {other}", ends)


def _counted(event: str, places: Sequence[_Place]) -> Iterator[Event]:
    counts: dict[str, int] = {}
    for layer, tensor, _ in sorted(places, key=lambda where: execution_order(where[0], where[1])):
        counts[place(layer, tensor)] = counts.get(place(layer, tensor), 0) + 1
    if counts:
        yield Event(event=event, arm="D", measured=counts)


def side_of(folder: Path, traces: tuple[Trace, ...], where: Path) -> Side:
    """Return a side: its name is the folder as it was given, its payloads lie in `where`."""
    return Side(folder.as_posix(), traces, Payloads(where))
