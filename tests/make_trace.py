"""Small traces for tests, written with the product's own writer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from driftprobe.errors import DriftprobeError
from driftprobe.fingerprint import Array, fingerprint, row_hashes
from driftprobe.taps import CACHE_TAPS
from driftprobe.trace import EngineFacts, Event, Header, PlannedRead, Record, TraceWriter

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
