"""probe_paths(): two ways to run one model that ought to be equal, compared at every position that both computed.

The experiment has the same arms as any other (docs/probe-paths.md): P is the reference, D the candidate, P' and D'
are both once more, N1 and N2 are the reference with rounding noise. Gates, floor, first failure and reports are those
of every run.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from datetime import date as calendar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from driftprobe.api import finish
from driftprobe.artifacts import Layout, check_place, staged, write_reports
from driftprobe.capture import top_of
from driftprobe.constants import constant_record, tensor_name
from driftprobe.errors import EngineError, UsageError
from driftprobe.fingerprint import Array, fingerprint
from driftprobe.options import LADDERS, MAX_SEED, PAYLOADS, rung_of
from driftprobe.payload import payload_file, write_payloads
from driftprobe.plan import NOISE_ARMS
from driftprobe.result import Result
from driftprobe.taps import CANDIDATE, PATHS, REFERENCE, place
from driftprobe.trace import (
    CACHE_BEYOND,
    CALL_TOKENS,
    CONSTANTS,
    COST,
    LEFT_OUT,
    OTHER_TOKEN,
    Event,
    Header,
    PlannedRead,
    Record,
)
from driftprobe.trace_checks import name_fault
from driftprobe.trace_file import TraceWriter

if TYPE_CHECKING:
    from driftprobe.engines.hf.paths import Compared, PathEngine, Row

POSITIONS = 64
"""Positions that are compared unless told otherwise; of more, those at the ends of calls and others evenly between."""


def probe_paths(
    model: Any,
    *,
    reference: Callable[[Any], Any],
    candidate: Callable[[Any], Any],
    name: str = "paths",
    positions: int = POSITIONS,
    row: int | tuple[int | None, int | None] | None = None,
    locate: Callable[[dict[str, Any]], Any] | None = None,
    seed: int = 0,
    payload: str = "failing",
    ladder: str = "auto",
    out: str | Path | None = None,
) -> Result:
    """Run a model in two ways that ought to be equal and return the verdict.

    `model` is any `torch.nn.Module` that is called with token ids and yields logits, or a function without arguments
    that makes one anew for each run, where a run leaves state behind in the module. `reference` and `candidate` are
    functions of the model that run it as they please; what they return is not looked at. The reference
    runs six times and the candidate three, as often again where the ladder is climbed.

    Every forward call of the model inside them is listened to. Rows are paired by absolute position. A position that
    one path computes several times counts as its last call left it. `positions` is the largest number of them that is
    compared. `row` is the batch row that holds the sequence (or one for each side); None takes the row whose tokens
    agree. `locate` tells where a call's tokens stand (`{argument: value}` -> first position), where neither position
    ids, nor a cache's length, nor the tokens do. `ladder` says whether all is run again in float64: `auto` (where the
    model is small enough), `on` or `off`. `name` names the trace, `out` the artifacts folder to write.

    Raises UsageError for input that cannot be used, EngineError where one of the paths fails.
    """
    _check(name, positions, seed, payload, ladder)
    from driftprobe.engines.hf.paths import PathEngine

    rows = row if isinstance(row, tuple) else (row, row)
    temporary = None if out is not None else tempfile.TemporaryDirectory(prefix="driftprobe-")
    root = Path(out) if out is not None else Path(str(temporary and temporary.name)) / "run"
    check_place(root)
    engine = PathEngine(model, reference, candidate, rows=rows, locate=locate, seed=seed)
    header = Header(run=name, prompt=name, mode=PATHS, seed=seed, payload=payload,
                    date=calendar.today().isoformat(), labels={} if out is None else {"output": str(out)})  # fmt: skip
    with staged(root) as stage:
        rung = rung_of(engine, ladder)
        _capture(engine, header, positions, stage)
        if rung:
            _climb(engine, replace(header, rung=rung), positions, stage)
        result = finish(engine, stage, payload)
        write_reports(stage.root, result.reports())
    return Result(result.judgement, result.traces, root / "traces", temporary)


def _check(name: str, positions: int, seed: int, payload: str, ladder: str) -> None:
    fault = name_fault("name", name)
    if fault is not None:
        what, measured, allowed, mend = fault
        raise UsageError(what, where="name", measured=measured, allowed=allowed, next_step=mend)
    if positions < 1:
        raise UsageError("too few positions", where="positions", measured=str(positions), allowed="1 or more",
                         next_step="compare at least one position")  # fmt: skip
    if not 0 <= seed < MAX_SEED:
        raise UsageError("seed out of range", where="seed", measured=str(seed)[:40], allowed=f"0 to {MAX_SEED - 1}",
                         next_step="choose a smaller seed")  # fmt: skip
    if payload not in PAYLOADS:
        raise UsageError("unknown payload choice", where="payload", measured=payload, allowed=", ".join(PAYLOADS),
                         next_step="choose one of them")  # fmt: skip
    if ladder not in LADDERS:
        raise UsageError("unknown ladder choice", where="ladder", measured=ladder, allowed=", ".join(LADDERS),
                         next_step="choose one of them")  # fmt: skip


def _capture(engine: PathEngine, header: Header, limit: int, stage: Layout) -> None:
    """Run every arm and write the trace, its payloads and a log into a staging folder."""
    started = time.perf_counter()
    compared = engine.scout(limit)
    both = {arm: list(engine.run(arm, compared)) for arm in ("P", "D")[: 2 if compared.common else 1]}
    shared = set.intersection(*({_place(item) for item in rows} for rows in both.values()))
    header = _complete(header, engine, compared, shared)
    stem = f"{header.prompt}_{header.mode}" + (f"_{header.rung}" if header.rung else "")
    lines = [f"{header.engine.version} {header.engine.model} {header.engine.dtype} on {header.engine.device}"]
    with TraceWriter(stage.traces / f"{stem}.jsonl", header) as writer:
        hashes: dict[str, list[str]] = {}
        for arm, noise_seed in _arms(engine, header.seed, compared):
            if noise_seed is not None and hashes["P"] != hashes["P'"]:
                lines.append(f"arm {arm} left out: the reference does not repeat itself, so noise is not all it shows")
                continue
            rows = both.get(arm) or engine.run(arm, compared, noise_seed)
            hashes[arm] = _write_arm(
                (item for item in rows if _place(item) in shared), arm, writer, stage, stem, header
            )
            lines.append(f"arm {arm}")
        if header.payload != "none":
            _write_constants(engine, header, stem, writer, stage)
        for event in (*_events(compared), *_alone(both, shared)):
            writer.event(event)
        if header.rung:
            took = round(1000 * (time.perf_counter() - started))
            writer.event(Event(event=COST, arm="", measured={"milliseconds": took}))
    stage.logs.mkdir(parents=True, exist_ok=True)
    (stage.logs / f"{stem}.log").write_text("\n".join(lines) + "\n", encoding="utf-8")


_Place = tuple[int | None, str, int]
"""Layer, tensor, position."""


def _place(item: Row) -> _Place:
    return (item.layer, item.tensor, item.position)


def _write_arm(
    rows: Iterable[Row], arm: str, writer: TraceWriter, stage: Layout, stem: str, header: Header
) -> list[str]:
    """Write one arm's records and its payloads; returns the records' hashes."""
    kept: dict[str, Array] = {}
    hashes = []
    for item in rows:
        record, whole = _record(item, arm, header)
        hashes.append(record.hash)
        if whole is not None:
            kept[whole] = item.array
            record = replace(record, payload=f"{payload_file(stem, arm)}#{whole}")
        writer.record(record)
    if kept:
        write_payloads(stage.traces / payload_file(stem, arm), kept)
    return hashes


def _alone(both: dict[str, list[Row]], shared: set[_Place]) -> Iterator[Event]:
    """Yield how many rows of each tap one side alone computed, though the other computed that position too."""
    for arm, rows in both.items():
        alone = Counter(place(item.layer, item.tensor) for item in rows if _place(item) not in shared)
        if alone:
            side = REFERENCE if arm == "P" else CANDIDATE
            yield Event(event=f"{LEFT_OUT}at some positions only in the {side}", arm=arm, measured=dict(alone))


def _climb(engine: PathEngine, header: Header, limit: int, stage: Layout) -> None:
    """Run everything again at a rung of the ladder; where that fails the run itself stands, and a log says why."""
    try:
        with engine.at(header.rung):
            _capture(engine, header, limit, stage)
    except EngineError as error:
        (stage.logs / f"ladder_{header.rung}.log").write_text(error.render() + "\n", encoding="utf-8")


def _write_constants(engine: PathEngine, header: Header, stem: str, writer: TraceWriter, stage: Layout) -> None:
    kept: dict[str, Array] = {}
    for constant in engine.constants():
        record = constant_record(constant, header, stem)
        kept[tensor_name(record)] = constant.array
        writer.record(record)
    if kept:
        write_payloads(stage.traces / payload_file(stem, CONSTANTS), kept)


def _arms(engine: PathEngine, seed: int, compared: Compared) -> Iterator[tuple[str, int | None]]:
    """Yield every arm with the seed of its noise; where nothing is in common, the reference stands alone."""
    if not compared.common:
        yield "P", None
        return
    yield from (("P", None), ("D", None), ("P'", None), ("D'", None))
    for which in range(1, NOISE_ARMS + 1 if engine.perturbs else 1):
        yield f"N{which}", (seed * 1000 + which) * 10_000


def _complete(header: Header, engine: PathEngine, compared: Compared, shared: set[_Place]) -> Header:
    taps: dict[str, list[int]] = {}
    seen = {(layer, tensor) for layer, tensor, _ in shared}
    for layer, tensor in (known for known in compared.taps.values() if known in seen):
        taps.setdefault(tensor, []).extend([] if layer is None else [layer])
    tokens = tuple(0 if token is None else token for token in compared.sequence)
    return replace(
        header,
        engine=engine.facts,
        token_ids=tokens,
        prompt_len=len(tokens),
        reads=tuple(
            PlannedRead(arm=arm, phase=_phase(arm), step=0, position=compared.positions[0])
            for arm in ("P", "D", "P'", "D'")
            if compared.common
        ),
        taps={tensor: tuple(layers) for tensor, layers in taps.items()} if compared.common else {},
    )


def _phase(arm: str) -> str:
    return CANDIDATE if arm.startswith("D") else REFERENCE


def _record(item: Row, arm: str, header: Header) -> tuple[Record, str | None]:
    """Return a row's record, and the name of its payload where it keeps one."""
    whole = None
    if header.payload != "none" and arm in ("P", "D"):
        whole = f"{item.position}.{'model' if item.layer is None else item.layer}.{item.tensor}"
    record = Record(
        prompt=header.prompt,
        phase=_phase(arm),
        layer=item.layer,
        tensor=item.tensor,
        arm=arm,
        token_id=item.token,
        logical_tok_idx=item.position,
        order=item.order,
        **asdict(fingerprint(item.array, header.sketch_size)),
        top=top_of(item.array) if item.tensor == "logits" else None,
    )
    return record, whole


def _events(compared: Compared) -> Iterator[Event]:
    """Yield what no record shows: what both sides have in common, and what was left out and why."""
    counts = {
        "common": compared.common,
        "compared": len(compared.positions),
        "only_reference": compared.only_reference,
        "only_candidate": compared.only_candidate,
        "moved": compared.moved,
    }
    yield Event(event="positions", arm="D", measured=counts)
    for arm, calls in compared.calls.items() if compared.common else ():
        found = {str(position): calls[position] for position in compared.positions if position in calls}
        yield Event(event=CALL_TOKENS, arm=arm, measured={p: call.count for p, call in found.items()})
        beyond = {p: call.beyond for p, call in found.items() if call.beyond}
        if beyond:
            yield Event(event=CACHE_BEYOND, arm=arm, measured=beyond)
    if compared.stray is not None:
        yield Event(event=OTHER_TOKEN, arm="D", measured={"position": compared.stray})
    for reason, taps in compared.left_out.items():
        yield Event(event=f"{LEFT_OUT}{reason}", arm="D", measured=taps)
