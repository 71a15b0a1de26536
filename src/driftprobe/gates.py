"""The gates, in order. One that fails gives `N/A` with the reason, never a pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from driftprobe.compare import SCORES, Pair, Pairing
from driftprobe.fingerprint import UNIT_ROUNDOFF
from driftprobe.floor import UNKNOWN_DTYPE, Controls, Floors, innocent
from driftprobe.judgement import Cell, Determinism, Gate, LeftOut, Seen, Status
from driftprobe.taps import BY_NAME, CACHE_TAPS, PATHS, STATE_TAPS, execution_order, place
from driftprobe.trace import CANNOT_PASS, FAILED, KNOB_FAILED, OTHER_TOKEN, Event, Record, Trace

SHOWN = 3
"""How many culprits a gate names before it counts the rest."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the gates look at."""

    trace: Trace
    decode: Pairing
    """D against P."""
    aligned: Pairing
    """A against P; empty where A was not run."""
    strangers: tuple[Record, ...]
    """Records of arms that are neither P, D, A nor a control."""
    controls: Controls
    floors: Floors
    cells: tuple[Cell, ...]
    left_out: LeftOut | None = None

    @property
    def seen(self) -> Seen:
        """What every arm recorded in every step."""
        return seen_of(self.trace) if self.left_out is None else self.left_out.seen

    @property
    def unpaired(self) -> tuple[Record, ...]:
        """Every record that found no partner."""
        return self.decode.unpaired + self.aligned.unpaired + self.strangers

    @property
    def pairs(self) -> Iterator[Pair]:
        """Every pair of every arm."""
        yield from self.decode.matched
        yield from self.aligned.matched
        for found in self.controls.values():
            yield from found


def pass_gates(evidence: Evidence) -> tuple[Gate, ...]:
    """Return every gate's outcome, in the order in which they count."""
    return (
        _complete(evidence.trace),
        _ran(evidence.trace),
        _compared(evidence),
        _paired(evidence.unpaired),
        _same_token(evidence),
        _embed(evidence),
        _deterministic(evidence),
        _fired(evidence.trace, evidence.seen),
        _read_back(evidence.trace, evidence.seen),
        _finite(evidence.cells),
        _plausible(evidence.cells),
    )


def measure_determinism(controls: Controls) -> Determinism:
    """Return what the repeated arms P' and D' say."""
    again = _again(controls)
    drifts = [pair.drift.value for pair in again if pair.drift.value is not None]
    return Determinism(bool(again), all(pair.drift.equal for pair in again), max(drifts, default=0.0))


def _again(controls: Controls) -> list[Pair]:
    return [pair for arm, pairs in controls.items() if arm.endswith("'") for pair in pairs]


def _complete(trace: Trace) -> Gate:
    whole = "a trace without header or footer: whether it is whole is not known" if trace.foreign else "its footer fits"
    return Gate("complete", not trace.damage, trace.damage or whole)


def _ran(trace: Trace) -> Gate:
    failed = [f"arm {e.arm}: {e.event.removeprefix(FAILED)}" for e in trace.events if e.event.startswith(FAILED)]
    return Gate("ran", not failed, _listed(failed) or "no arm says that it failed")


def _compared(evidence: Evidence) -> Gate:
    """The embedding is not counted: it shows that both sides had the same token, not what they made of it.

    Where a comparison says why it cannot pass, a failure in what was compared counts all the same.
    """
    count = sum(pair.reference.tensor != "embed" for pair in evidence.decode.matched)
    count += 0 if evidence.left_out is None else evidence.left_out.pairs - evidence.left_out.embeds
    doubts = [_doubt(event) for event in evidence.trace.events if event.event.startswith(CANNOT_PASS)]
    if not count:
        return Gate("compared", False, _listed(["nothing was compared", *doubts]))
    if doubts and all(cell.status is not Status.FAIL for cell in evidence.cells):
        return Gate("compared", False, _listed(doubts))
    return Gate("compared", True, f"{count} pairs of prefill and decode")


def _doubt(event: Event) -> str:
    words, places = event.event.removeprefix(CANNOT_PASS), list(event.measured)
    return words if not places else f"{words}: {', '.join(places[:SHOWN])}{', …' if len(places) > SHOWN else ''}"


def _paired(left: Sequence[Record]) -> Gate:
    detail = "every record has its partner" if not left else f"{len(left)} records without a partner: {_names(left)}"
    return Gate("paired", not left, detail)


_IDENTITY = {"token_id": "token", "logical_tok_idx": "position", "pos_id": "position id"}


def _same_token(evidence: Evidence) -> Gate:
    """Compare what both sides of each pair say of their token; what one of them leaves out cannot disagree.

    A candidate that goes on with a token of its own choice (mode `paths`) is no pass; where an earlier position fails,
    that failure is why it chose so, and it counts.
    """
    different, told = [], False
    for pair in evidence.pairs:
        for name, word in _IDENTITY.items():
            p, d = getattr(pair.reference, name), getattr(pair.candidate, name)
            told = told or None not in (p, d)
            if None not in (p, d) and p != d:
                different.append(f"{word} {p} and {d} at {_pair_name(pair)}")
    strays = [
        f"the candidate goes on with another token at position {event.measured.get('position')}"
        for event in evidence.trace.events
        if event.event == OTHER_TOKEN and all(cell.status is not Status.FAIL for cell in evidence.cells)
    ]
    agreed = "same token at the same position in all arms" if told else "the trace does not name its tokens"
    strayed = bool(strays) and not different and evidence.trace.header.mode == PATHS
    different += strays
    return Gate("same token", not different, _listed(different) or agreed, strayed)


def _embed(evidence: Evidence) -> Gate:
    lookups = [pair for pair in evidence.pairs if pair.reference.tensor == "embed"]
    odd = [
        f"embed of {pair.candidate.arm} {pair.candidate.phase} at step {pair.candidate.step} is not prefill's"
        for pair in lookups
        if not pair.drift.equal
    ]
    agreed = "embed is bit-identical in all arms" if lookups else "no embed tap: the input itself was not compared"
    return Gate("aligned", not odd, _listed(odd) or agreed)


def _deterministic(evidence: Evidence) -> Gate:
    measured = measure_determinism(evidence.controls)
    if not measured.checked:
        return Gate("deterministic", True, "not checked: no arm was run twice")
    if measured.equal:
        return Gate("deterministic", True, "P = P' and D = D' bit for bit")
    again = _again(evidence.controls)
    untold = [pair for pair in again if pair.drift.value is None or (pair.drift.lower_bound and not pair.drift.equal)]
    wild = [pair for pair in again if not innocent(pair, evidence.floors)]
    detail = f"run-to-run drift up to {measured.largest:.2e}"
    if wild:
        return Gate("deterministic", False, f"{detail}, more than rounding explains, first at {_pair_name(wild[0])}")
    if untold:
        where = _pair_name(untold[0])
        return Gate("deterministic", False, f"run-to-run drift of a size that the trace cannot tell, first at {where}")
    return Gate("deterministic", True, f"{detail}, within rounding; it joins the floor")


def seen_of(trace: Trace) -> Seen:
    """Return what every arm of a trace recorded in every step."""
    found: dict[tuple[str, str, int], set[tuple[int | None, str]]] = {}
    for record in trace.records:
        found.setdefault((record.arm, record.phase, record.step), set()).add((record.layer, record.tensor))
    return {key: frozenset(places) for key, places in found.items()}


def _fired(trace: Trace, seen: Seen) -> Gate:
    header, failed = trace.header, {event.arm for event in trace.events if event.event == KNOB_FAILED}
    if not header.reads or not header.taps:
        return Gate("fired", True, "the trace names no plan to hold it to")
    promised = [(layer, tensor) for tensor, layers in header.taps.items() for layer in (layers or (None,))]
    whole = frozenset(promised)
    fixed = frozenset(at for at in promised if at[1] not in STATE_TAPS)  # a state is of the call's last token alone
    missing = []
    for read in (read for read in header.reads if read.arm not in failed):
        wanted, here = fixed if read.phase == "prefill_ext" else whole, seen.get((read.arm, read.phase, read.step))
        if here is None or not here >= wanted:
            gaps = [at for at in promised if at in wanted and at not in (here or ())]
            missing += [f"{place(*at)} in arm {read.arm} step {read.step}" for at in gaps]
    told = "every planned tap was seen in every arm"
    told += f" but {', '.join(sorted(failed))}, which failed" if failed else ""
    return Gate("fired", not missing, _listed(missing) or told)


def _read_back(trace: Trace, seen: Seen) -> Gate:
    """Every step of arm A needs an event that counts rows or states, none of them different."""
    checks = [event for event in trace.events if event.event == "cache_readback"]
    bad = [
        f"arm {e.arm} step {e.step}: {e.measured['different']} of {_put_in(e) or '?'} {_kinds(e)} differ"
        for e in checks
        if e.measured.get("different", 0)
    ]
    done = {(e.arm, e.step) for e in checks if _put_in(e) > 0 and "different" in e.measured}
    aligned = {(read.arm, read.step) for read in trace.header.reads if read.arm == "A"}
    aligned |= {(arm, step) for arm, _, step in seen if arm == "A"}
    unchecked = [f"arm {arm} step {step} was not read back" for arm, step in sorted(aligned - done)]
    counts = {word: sum(e.measured.get(word, 0) for e in checks) for word in ("rows", "states")}
    counted = " and ".join(f"{count} aligned cache {word}" for word, count in counts.items() if count)
    good = f"{counted} read back, all equal" if checks else "no aligned cache in this plan"
    return Gate("read back", not bad + unchecked, _listed(bad + unchecked) or good)


def _put_in(event: Event) -> int:
    return event.measured.get("rows", 0) + event.measured.get("states", 0)


def _kinds(event: Event) -> str:
    """Return what was put in: rows of keys and values, states of state-space layers, or both."""
    return " and ".join(word for word in ("rows", "states") if event.measured.get(word)) or "rows"


def _finite(cells: Sequence[Cell]) -> Gate:
    """Both sides non-finite before any failure: nothing can be compared there."""
    first_failure = min((_order(cell) for cell in cells if cell.status is Status.FAIL), default=None)
    broken = [
        f"{place(cell.layer, cell.tensor)} of {cell.prompt}, step {cell.step}"
        for cell in cells
        if _both_not_finite(cell)
        if first_failure is None or _order(cell) < first_failure
    ]
    detail = f"NaN or infinity in both phases: {_listed(broken)}" if broken else "finite before any failure"
    return Gate("finite", not broken, detail)


def _both_not_finite(cell: Cell) -> bool:
    return _not_finite(cell.reference) and _not_finite(cell.candidate)


def _not_finite(record: Record) -> bool:
    masks = record.tensor == "attn_scores"
    return bool(record.nan_count) or (bool(record.inf_count) and not masks)


def _plausible(cells: Sequence[Cell]) -> Gate:
    """A large drift that nothing behind it shows was not on the path: the probe, not the engine."""
    odd: list[Cell] = []
    rows: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells:
        if not _both_not_finite(cell):
            rows.setdefault((cell.step, cell.reference.logical_tok_idx or 0), []).append(cell)
    for here in rows.values():
        row = sorted(here, key=_order)
        last = max((i for i, cell in enumerate(row) if not cell.drift.equal), default=-1)
        layers: dict[int | None, list[Cell]] = {}
        for cell in row:
            layers.setdefault(cell.layer, []).append(cell)
        odd += [
            cell for i, cell in enumerate(row)
            if _large(cell) and _without_effect(cell, _near(cell, layers), i == last < len(row) - 1)
        ]  # fmt: skip
    detail = _listed([f"drift{_size(cell)} at {place(cell.layer, cell.tensor)} and what follows from it bit-equal"
                      for cell in odd])  # fmt: skip
    return Gate("plausible", not odd, detail or "no large drift stands upstream of bit-equal tensors")


def _large(cell: Cell) -> bool:
    """Beyond the limit, in whichever norm the evidence has: this gate ends in N/A, so it need not be proven.

    Scores that pass all the same are shifted by a constant, which has no effect (`scores.pass_shifts`).
    """
    if cell.tensor == SCORES and cell.status is Status.PASS:
        return False
    return cell.beyond_floor or (cell.drift.value is not None and cell.drift.value > cell.floor.limit)


def _size(cell: Cell) -> str:
    return "" if cell.drift.value is None or math.isinf(cell.drift.value) else f" of {cell.drift.value:.1e}"


def _near(cell: Cell, layers: Mapping[int | None, Sequence[Cell]]) -> Sequence[Cell]:
    """Return the cells of a cell's own layer and of the next one, in their order: nothing else reads it."""
    own = layers[cell.layer]
    return own if cell.layer is None else (*own, *layers.get(cell.layer + 1, ()))


def _without_effect(cell: Cell, near: Sequence[Cell], nothing_after: bool) -> bool:
    """Whether a drift ought to show in tensors that are bit-equal: in all that follow, or in all that read it.

    Cache rows may be masked or weigh nothing, and attention does not depend on their order; so may a key that one side
    alone has scores for. A state that a token leaves is read by the next one only. A branch that is small beside the
    residual stream may round away in the sum.
    """
    more_keys = cell.tensor in _OVER_KEYS and cell.reference.shape != cell.candidate.shape
    if cell.tensor in CACHE_TAPS | STATE_TAPS or more_keys or _reordered(cell, near) or _rounds_away(cell, near):
        return False
    readers = [other for other in near if _reads(other, cell)]
    return (nothing_after and cell.tensor in BY_NAME) or (
        cell.tensor in _PASSED_ON and bool(readers) and all(r.drift.equal for r in readers)
    )


_OVER_KEYS = frozenset(("attn_scores", "attn_probs"))
"""Taps that count keys along their last axis: what a key more or less weighs can be nothing."""
_PASSED_ON = frozenset(
    ("x_in", "attn_norm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope", "attn_ctx", "x_mid",
     "ffn_norm", "x_out", "final_norm")
)  # fmt: skip
"""Taps whose every change shows in the op that reads them: no top-k, softmax or sum with a larger tensor behind."""


def _reads(other: Cell, cell: Cell) -> bool:
    tap = BY_NAME.get(other.tensor)
    if tap is None or other.tensor in CACHE_TAPS | STATE_TAPS:
        return False
    if cell.tensor == "x_out" and other.tensor == "x_in":
        return cell.layer is not None and other.layer == cell.layer + 1
    return cell.tensor in tap.inputs and other.layer == cell.layer


def _rounds_away(cell: Cell, near: Sequence[Cell]) -> bool:
    """Whether the sum that takes in this branch is so large that rounding it can swallow the difference."""
    sums = [other for name in _SUMS_OF.get(cell.tensor, ()) for other in near
            if (other.layer, other.tensor) == (cell.layer, name)][:1]  # fmt: skip
    sizes = [_norms(item.reference) for item in (cell, *sums)]
    if len(sizes) != 2 or cell.drift.value is None:
        return False
    unit = UNIT_ROUNDOFF.get(sums[0].reference.dtype or UNKNOWN_DTYPE, 0.0)
    return any(cell.drift.value * small <= unit * large for small, large in zip(*sizes, strict=True))


_SUMS_OF = {"attn_out": ("x_mid", "x_out"), "mlp_out": ("x_out",), "mixer_out": ("x_mid", "x_out")}
"""Branch -> the sum that takes it in, by preference: a layer without an MLP has no `x_mid`."""


def _norms(record: Record) -> tuple[float, ...]:
    """Return a record's 2-norm, or its 1-norm where that is all there is."""
    known = record.l2 if record.l2 is not None else record.abs_sum
    return () if known is None else (known,)


def _reordered(cell: Cell, near: Sequence[Cell]) -> bool:
    """Scores over cache rows that are themselves in another order: attention does not depend on their order."""
    return cell.tensor in _OVER_KEYS and any(
        other.tensor in CACHE_TAPS and other.layer == cell.layer and other.status is Status.FAIL for other in near
    )


def _order(cell: Cell) -> tuple[int, tuple[int, int, int, str]]:
    return (cell.step, execution_order(cell.layer, cell.tensor, cell.reference.order))


def _pair_name(pair: Pair) -> str:
    record = pair.candidate
    return f"{place(record.layer, record.tensor)} of arm {record.arm}, step {record.step}"


def _names(records: Iterable[Record]) -> str:
    return _listed([f"{place(r.layer, r.tensor)} ({r.arm or r.phase}, step {r.step}{_shape(r)})" for r in records])


def _shape(record: Record) -> str:
    return "" if record.shape is None else f", shape {list(record.shape)}"


def _listed(items: Sequence[str]) -> str:
    more = len(items) - SHOWN
    return "; ".join(items[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
