"""A program for the command engine's tests: a tiny "model" in NumPy that writes a trace, or goes wrong on request.

Usage: stand_in.py ARM TOKENS PROMPT_LEN STEPS MODE OUT [HOW]
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from driftprobe.capture import top_of
from driftprobe.fingerprint import SKETCH_SIZE, fingerprint
from driftprobe.trace import EngineFacts, Event, Header, Record
from driftprobe.trace_file import TraceWriter

WIDTH, VOCABULARY = 8, 32


def logits(tokens: list[int], at: int, lanes: int) -> np.ndarray:
    """A causal 'model': a row that depends on the tokens up to `at`, summed in one of two orders."""
    embed = np.random.default_rng(1).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    head = np.random.default_rng(2).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    rows = embed[tokens[: at + 1]]
    state = sum((rows[i::lanes].sum(axis=0) for i in range(lanes)), np.zeros(WIDTH, np.float32))
    return (head @ state)[None]


def main() -> None:
    arm, token_file, prompt_len, steps, mode, out = sys.argv[1:7]
    how = sys.argv[7] if len(sys.argv) > 7 else ""
    print(f"stand-in computes arm {arm}")
    n, count = int(prompt_len), int(steps)
    tokens = [int(word) for word in Path(token_file).read_text(encoding="utf-8").split()]
    if how == f"exit {arm}":
        print("CUDA error: out of luck")
        sys.exit(3)
    if how == f"hang {arm}":
        time.sleep(60)
    if how == f"silent {arm}":
        return
    phase = {"P": "prefill_last", "E": "prefill_ext"}.get(arm[0])
    size = 16 if how == f"small sketch {arm}" else SKETCH_SIZE
    header = Header(prompt="mine", sketch_size=size, mode=mode, prompt_len=n, steps=count,
                    engine=EngineFacts(name="stand-in", dtype="float32", vocabulary=VOCABULARY, max_positions=128,
                                       device=os.environ.get("STAND_IN", "")))  # fmt: skip
    with TraceWriter(Path(out), header) as writer:
        for step in range(count):
            at = n + step
            row = logits(tokens, at, 1 if phase else 3)
            if how == "fault" and arm[0] in "DA":
                row = row * np.float32(1.01)
            if how == "cut" and arm == "D":
                os._exit(0)
            embed = np.full((1, WIDTH), tokens[at], np.float32)
            for tensor, array in (("embed", embed), ("logits", row)):
                writer.record(
                    Record(prompt="mine", phase=phase or f"decode{step}", layer=None, tensor=tensor,
                           arm="X" if how == "other arm" else arm, step=step,
                           token_id=1 if how == "other token" else None, logical_tok_idx=at,
                           top=top_of(array) if tensor == "logits" else None, **asdict(fingerprint(array, size)))
                )  # fmt: skip
            if arm == "A":
                writer.event(Event(event="cache_readback", arm="A", step=step, measured={"rows": n, "different": 0}))
    if how == f"spoil {arm}":
        Path(out).write_text(
            Path(out).read_text(encoding="utf-8").replace('"nz_count":', '"nz_count":-'), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
