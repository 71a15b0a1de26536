"""Small traces in memory and the judgements they lead to, for the tests of the reports. No torch, no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from driftprobe.compare import NoPayloads
from driftprobe.diagnose import diagnose
from driftprobe.fingerprint import Array, fingerprint, row_hashes
from driftprobe.judgement import Judgement
from driftprobe.taps import CACHE_TAPS, execution_order
from driftprobe.trace import EngineFacts, Event, Header, Record, Top, Trace
from driftprobe.verdict import judge

LAYERS = 2
TAPS: tuple[tuple[int | None, str], ...] = (
    (None, "embed"),
    *((layer, tap) for layer in range(LAYERS)
      for tap in ("q_proj", "k_proj", "v_proj", "q_rope", "k_cache", "v_cache", "attn_scores", "attn_probs", "x_out")),
    (None, "logits"),
)  # fmt: skip
PHASES = {
    "P": "prefill_last",
    "D": "decode0",
    "A": "decode0",
    "P'": "prefill_last",
    "D'": "decode0",
    "E1": "prefill_ext",
}
LENGTHS = {"p0_short": 2, "p6_len_16": 16, "p6_len_32": 32}
Change = Callable[[str, int | None, str, Array], Array]
"""(arm, layer, tensor, values) -> values: what an arm does differently."""


def same(arm: str, layer: int | None, tensor: str, array: Array) -> Array:
    """No difference anywhere."""
    return array


def rounding(arm: str, layer: int | None, tensor: str, array: Array) -> Array:
    """Decode is off by a rounding error everywhere but in its embedding and its cache."""
    touched = arm in {"D", "D'", "A"} and tensor != "embed" and tensor not in CACHE_TAPS
    return array * np.float32(1 + 2.4e-7) if touched else array


def broken_from(layer: int | None, tensor: str, arms: Sequence[str] = ("D", "D'", "A"), size: float = 0.01) -> Change:
    """Return a change of one percent at one tap and at every tap behind it, the other caches left alone."""
    first = execution_order(layer, tensor)

    def change(arm: str, at: int | None, name: str, array: Array) -> Array:
        behind = execution_order(at, name) >= first
        hit = (at, name) == (layer, tensor) or name not in CACHE_TAPS
        return (array * np.float32(1 + size)).astype(array.dtype) if arm in arms and behind and hit else array

    return change


def prompt_trace(prompt: str, mode: str, change: Change = same, **more: object) -> Trace:
    """Return one prompt's trace in one mode; `more` goes into its header."""
    length = LENGTHS.get(prompt, 3)
    tokens = (*range(65, 65 + length), length)
    arms = [arm for arm in PHASES if arm != "A" or mode == "kv_aligned"]
    records = tuple(record(prompt, length, arm, layer, tap, change) for arm in arms for layer, tap in TAPS)
    events = (Event(event="cache_readback", arm="A", measured={"rows": length, "different": 0}),)
    header: dict[str, object] = {
        "run": "run-1", "engine": EngineFacts(name="hf", version="test", model="builtin:tiny", dtype="float32",
                                              attention="sdpa", layers=LAYERS, device="cpu"),
        "mode": mode, "prompt": prompt, "prompt_text": "Hi there", "token_ids": tokens, "prompt_len": length,
        "date": "2026-11-23", "labels": {"output": "artifacts/2026-11-23/b3_66_v2"}, **more,
    }  # fmt: skip
    return Trace(Header(**header), records, events if mode == "kv_aligned" else (), f"{prompt}_{mode}.jsonl")  # type: ignore[arg-type]


def record(prompt: str, length: int, arm: str, layer: int | None, tensor: str, change: Change) -> Record:
    """Return one arm's record at one tap."""
    array = change(arm, layer, tensor, values(length, layer, tensor))
    print_of = asdict(fingerprint(array))
    top = Top(ids=(3, 5), values=(float(array.reshape(-1)[3]), float(array.reshape(-1)[5])), logsumexp=1.0)
    return Record(prompt=prompt, phase=PHASES[arm], layer=layer, tensor=tensor, arm=arm, token_id=length,
                  logical_tok_idx=length, pos_id=length, rows=row_hashes(array) if tensor in CACHE_TAPS else None,
                  source="recomputed" if tensor == "attn_scores" else "captured",
                  top=top if tensor == "logits" else None, **print_of)  # fmt: skip


def values(length: int, layer: int | None, tensor: str) -> Array:
    """Return the tensor of a tap: its own for every tap and prompt, the same in every arm."""
    seed = [length, 0 if layer is None else layer + 1, *tensor.encode()]
    array = np.random.default_rng(seed).standard_normal((length + 1 if tensor in CACHE_TAPS else 1, 2, 8))
    if tensor == "logits":
        array[0, 0, 3] = 9.0
        array[0, 0, 5] = 6.0
    return array.astype(np.float32)


def run(change: Change = same, modes: Sequence[str] = ("as_designed", "kv_aligned"),
        prompts: Sequence[str] = tuple(LENGTHS), **more: object) -> tuple[Judgement, tuple[Trace, ...]]:  # fmt: skip
    """Return the judgement and the traces of a whole run."""
    traces = tuple(prompt_trace(prompt, mode, change, **more) for mode in modes for prompt in prompts)
    return judged(traces), traces


def judged(traces: Sequence[Trace]) -> Judgement:
    """Return the judgement of traces that have no payloads."""
    return diagnose(judge(traces, NoPayloads()))


def foreign(equal: bool = False, sums: bool = True) -> tuple[Judgement, tuple[Trace, ...]]:
    """Return a stranger's trace: prompt, phase, layer, tensor and hash, and sums where it has them."""
    records = []
    for arm, phase in (("P", "prefill_last"), ("D", "decode0")):
        for layer, tensor in ((0, "q_proj"), (0, "k_cache"), (None, "logits")):
            mark = "a" if equal else arm
            records.append(Record(prompt="theirs", phase=phase, layer=layer, tensor=tensor, arm=arm,
                                  hash=f"0x{mark}{tensor}", abs_sum=70.0 if sums else None))  # fmt: skip
    files = "theirs_decode_trace.jsonl, theirs_trace.jsonl"
    header = Header(prompt="theirs", engine=EngineFacts(name="unknown"))
    traces = (Trace(header, tuple(records), path=files, foreign=True),)
    return judged(traces), traces
