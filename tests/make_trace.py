"""Small traces for tests, written with the product's own writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from driftprobe.errors import DriftprobeError
from driftprobe.fingerprint import Array, fingerprint, row_hashes
from driftprobe.taps import CACHE_TAPS, ExecutionOrder, execution_order
from driftprobe.trace import EngineFacts, Event, Header, PlannedRead, Record, Top, Trace
from driftprobe.trace_file import TraceWriter

ARMS = {"P": "prefill_last", "D": "decode0", "P'": "prefill_last", "D'": "decode0", "E1": "prefill_ext"}
TAPS: tuple[tuple[int | None, str], ...] = ((None, "embed"), (0, "q_proj"), (0, "k_cache"), (None, "logits"))
POSITION = 3


def values(layer: int | None, tensor: str) -> Array:
    """The tensor of a tap: the same in every arm."""
    rng = np.random.default_rng(len(tensor) + 100 * (layer or 0))
    rows = POSITION + 1 if tensor in CACHE_TAPS else 1
    return rng.standard_normal((rows, 2, 4)).astype(np.float32)


def record(arm: str, layer: int | None, tensor: str, array: Array | None = None, **more: object) -> Record:
    """A record of an arm at a tap, with the fingerprint of `array`."""
    array = values(layer, tensor) if array is None else array
    body: dict[str, object] = {
        "prompt": "p0",
        "phase": ARMS.get(arm, "decode0"),
        "layer": layer,
        "tensor": tensor,
        "arm": arm,
        "token_id": 7,
        "logical_tok_idx": POSITION,
        "pos_id": POSITION,
        **asdict(fingerprint(array)),
        "rows": row_hashes(array) if tensor in CACHE_TAPS else None,
    }
    return Record(**(body | more))  # type: ignore[arg-type]


def header(prompt: str = "p0", mode: str = "as_designed", **more: object) -> Header:
    """A header that plans all of ARMS and promises all of TAPS."""
    taps: dict[str, tuple[int, ...]] = {}
    for layer, tensor in TAPS:
        taps[tensor] = taps.get(tensor, ()) + (() if layer is None else (layer,))
    reads = tuple(PlannedRead(arm=a, phase=phase, step=0, position=POSITION) for a, phase in ARMS.items())
    engine = EngineFacts(name="toy", dtype="float32", layers=1)
    body: dict[str, object] = {"prompt": prompt, "mode": mode, "engine": engine, "reads": reads, "taps": taps}
    return Header(**(body | more))  # type: ignore[arg-type]


def write(folder: Path, prompt: str = "p0", mode: str = "as_designed") -> Path:
    """A complete, healthy trace with every planned arm."""
    path = folder / f"{prompt}_{mode}.jsonl"
    with TraceWriter(path, header(prompt, mode)) as writer:
        for arm in ARMS:
            for layer, tensor in TAPS:
                writer.record(record(arm, layer, tensor, prompt=prompt))
            writer.event(Event(event="done", arm=arm, measured={"taps": len(TAPS)}))
    return path


def rows(path: Path) -> list[dict[str, object]]:
    """The lines of a trace as objects, to be spoiled."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def put(path: Path, *bodies: dict[str, object] | str) -> Path:
    """Write lines, given as objects or as raw text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((b if isinstance(b, str) else json.dumps(b)) + "\n" for b in bodies))
    return path


def assert_five_parts(error: DriftprobeError, *, what: str, where: str, measured: str = "") -> None:
    """The message names the fault and its place, and leaves no part empty."""
    assert what in error.what
    assert where in error.where
    assert measured in error.measured
    assert all([error.what, error.where, error.measured, error.allowed, error.next_step]), error.render()
    assert len(error.render()) < 1500


# ---- traces in memory, for the judgement


LAYER_TAPS = ("x_in", "attn_norm", "q_proj", "k_proj", "v_proj", "q_rope", "k_rope", "k_cache", "v_cache",
              "attn_scores", "attn_probs", "attn_ctx", "attn_out", "x_mid", "ffn_norm", "mlp_out", "x_out")  # fmt: skip
CONTROLS = ("P'", "D'", "E1", "E7")
LENGTH = 5
"""Tokens of the prompt; step k is at position LENGTH + k."""


@dataclass(frozen=True)
class Site:
    """One record to be: where an arm is in its forward pass."""

    arm: str
    step: int
    layer: int | None
    tensor: str

    @property
    def order(self) -> tuple[int, ExecutionOrder]:
        return (self.step, execution_order(self.layer, self.tensor))


Change = Callable[[Site, Array], "Array | None"]
"""What an arm does differently at a site; None leaves the record out."""


class Arrays:
    """A payload source that holds whole tensors in memory."""

    def __init__(self, arrays: dict[object, Array]) -> None:
        self.arrays = arrays

    def get(self, item: Record) -> Array | None:
        return self.arrays.get(item.key)


class _Together:
    def __init__(self, sides: tuple[tuple[Trace, Arrays], ...]) -> None:
        self.arrays = {id(record): arrays.get(record) for trace, arrays in sides for record in trace.records}

    def get(self, item: Record) -> Array | None:
        return self.arrays.get(id(item))


def both_payloads(*sides: tuple[Trace, Arrays]) -> _Together:
    """The payloads of several traces whose keys are alike: a run and its rung."""
    return _Together(sides)


def unchanged(_site: Site, array: Array) -> Array:
    """The healthy engine: every arm computes the same bits."""
    return array


def scaled(array: Array, size: float) -> Array:
    """Every element off by a relative error of exactly this size, up to rounding to the dtype."""
    return (array.astype(np.float64) * (1 + size)).astype(array.dtype)


def drifting(size: float, arms: tuple[str, ...] = ("D", "D'", "A"), start: tuple[int | None, str] = (0, "x_in"),
             step: int = 0, caches: bool = True) -> Change:  # fmt: skip
    """Arms are off by a relative error at a tap and at everything behind it but the embedding, in this step and on."""
    first = (step, execution_order(*start))

    def change(site: Site, array: Array) -> Array:
        behind = site.order >= first and site.tensor != "embed"
        hit = site.arm in arms and behind and (caches or site.tensor not in CACHE_TAPS)
        return scaled(array, size) if hit else array

    return change


def both(*changes: Change) -> Change:
    """One change after another."""

    def change(site: Site, array: Array) -> Array | None:
        for each in changes:
            changed = each(site, array)
            if changed is None:
                return None
            array = changed
        return array

    return change


def rotated(site: Site, array: Array) -> Array:
    """Queries that are their projection's, turned: the same numbers in other places of their head."""
    given = toy_values(replace(site, tensor="q_proj"), array.dtype) if site.tensor == "q_rope" else array
    return np.roll(given, 1, axis=-1) if site.tensor == "q_rope" else array


def without(**where: object) -> Change:
    """Leave out the records whose site has all of these."""
    return lambda site, array: None if all(getattr(site, name) == value for name, value in where.items()) else array


def toy_values(site: Site, dtype: np.dtype[np.generic]) -> Array:
    """The tensor of a site: its own for every step, layer and tap, the same in every arm; 128 elements a row."""
    rows = range(LENGTH + site.step + 1) if site.tensor in CACHE_TAPS else [100 + site.step]
    seeds = [[row, 0 if site.layer is None else site.layer + 1, *site.tensor.encode()] for row in rows]
    return np.stack([np.random.default_rng(seed).standard_normal((2, 64)) for seed in seeds]).astype(dtype)


def toy(change: Change = unchanged, *, arms: tuple[str, ...] = CONTROLS, layers: int = 2, steps: int = 1,
        taps: tuple[str, ...] = LAYER_TAPS, dtype: object = np.float32, mode: str = "as_designed", prompt: str = "p0",
        facts: dict[str, object] | None = None) -> tuple[Trace, Arrays]:  # fmt: skip
    """A complete trace of arms P, D, `arms`, and A in kv_aligned mode, with its plan, and its whole tensors."""
    names = ("P", "D", *arms, *(("A",) if mode == "kv_aligned" else ()))
    places: list[tuple[int | None, str]] = [(None, "embed")]
    places += [(layer, tap) for layer in range(layers) for tap in taps]
    places += [(None, "final_norm"), (None, "logits")]
    records, arrays = [], {}
    for arm in names:
        for site in (Site(arm, step, *where) for step in range(steps) for where in places):
            array = change(site, toy_values(site, np.dtype(dtype)))  # type: ignore[call-overload]
            if array is not None:
                item = toy_record(site, array, prompt)
                records.append(item)
                arrays[item.key] = array
    aligned = [step for arm in names if arm == "A" for step in range(steps)]
    counts = [{"rows": 2 * layers * (LENGTH + step), "different": 0} for step in range(steps)]
    events = [Event(event="cache_readback", arm="A", step=step, measured=counts[step]) for step in aligned]
    reads = [PlannedRead(arm=arm, phase=phase_of(arm, step), step=step, position=LENGTH + step)
             for arm in names for step in range(steps)]  # fmt: skip
    promised: dict[str, tuple[int, ...]] = {tap: tuple(range(layers)) for tap in taps}
    engine: dict[str, object] = {"name": "toy", "dtype": np.dtype(dtype).name, "layers": layers}  # type: ignore[call-overload]
    known = EngineFacts(**(engine | (facts or {})))  # type: ignore[arg-type]
    promised |= {"embed": (), "final_norm": (), "logits": ()}
    top = Header(prompt=prompt, mode=mode, steps=steps, prompt_len=LENGTH, reads=tuple(reads), taps=promised,
                 engine=known)  # fmt: skip
    return Trace(top, tuple(records), tuple(events), f"{prompt}_{mode}.jsonl"), Arrays(arrays)


def toy_record(site: Site, array: Array, prompt: str = "p0") -> Record:
    """The record of a site, fingerprinted."""
    position = LENGTH + site.step
    values = array.reshape(-1).astype(np.float64)
    order = np.argsort(-values)[:4]
    top = Top(ids=tuple(map(int, order)), values=tuple(map(float, values[order])), logsumexp=0.0)
    return Record(prompt=prompt, phase=phase_of(site.arm, site.step), layer=site.layer, tensor=site.tensor,
                  arm=site.arm, step=site.step, token_id=7 + site.step, logical_tok_idx=position, pos_id=position,
                  rows=row_hashes(array) if site.tensor in CACHE_TAPS else None,
                  top=top if site.tensor == "logits" and np.isfinite(values).all() else None,
                  **asdict(fingerprint(array)))  # fmt: skip


def phase_of(arm: str, step: int) -> str:
    """The phase that an arm's records carry."""
    if arm[0] in "DAT":
        return f"decode{step}"
    if arm == "P@chunks":
        return "prefill_chunked"
    return {"E": "prefill_ext", "N": "prefill_noise"}.get(arm[0], "prefill_last")


def bare(trace: Trace, *kept: str) -> Trace:
    """The same trace as a stranger would write it: P and D, hashes, and the fields named."""
    records = tuple(
        Record(prompt=r.prompt, phase=r.phase, layer=r.layer, tensor=r.tensor, hash=r.hash, arm=r.arm, step=r.step,
               **{name: getattr(r, name) for name in kept})
        for r in trace.records if r.arm in {"P", "D"}
    )  # fmt: skip
    header = Header(prompt=trace.header.prompt, mode=trace.header.mode, steps=trace.header.steps)
    return Trace(header, records, path="p0_trace.jsonl", foreign=True)
