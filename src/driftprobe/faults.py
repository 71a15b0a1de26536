"""Planted faults: what each breaks and what must be found. How they are planted is each engine's own business.

A fault is a known answer for the probe: the verdict, the first tap and the 2×2 reading that it must come to. Nothing
in the trace says that a fault was planted, except a label that judgement never reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from driftprobe.errors import UsageError


@dataclass(frozen=True, slots=True)
class Fault:
    """One planted fault and what must be found in `kv_aligned` mode."""

    name: str
    breaks: str
    verdict: str
    """`MISMATCH`, or `N/A` where the two sides are no longer the same experiment."""
    tensor: str | None
    """Tap of the first failure; None where there is none to name."""
    layer: int | None
    """Layer of the first failure."""
    reading: str
    """The 2×2 reading of D and A: `contents`, `computation`, or `none` for `N/A`."""
    min_prompt: int = 1
    """Tokens that a prompt must have for the fault to change anything."""
    min_layers: int = 1
    min_kv_heads: int = 1


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("rope_plus_one", "decode rotates q and k for position n+1 instead of n", "MISMATCH", "q_rope", 0,
              "computation"),
        Fault("cache_shift", "the prefill writes every cache row one slot too far; slot 0 stays empty", "MISMATCH",
              "k_cache", 0, "contents"),
        Fault("k_rows_swapped", "first and last cached K row of layer 1 change places", "MISMATCH", "k_cache", 1,
              "contents", min_prompt=2, min_layers=2),
        Fault("v_row_zero", "cached V row 0 of layer 1 is zero", "MISMATCH", "v_cache", 1, "contents", min_layers=2),
        Fault("kv_heads_swapped", "decode reads KV heads 0 and 1 in each other's place", "MISMATCH", "attn_scores", 0,
              "computation", min_kv_heads=2),
        Fault("attn_scale", "decode scales attention scores by 1.05 too much", "MISMATCH", "attn_scores", 0,
              "computation"),
        Fault("oldest_key_masked", "decode does not see key 0", "MISMATCH", "attn_scores", 0, "computation"),
        Fault("other_layer_cache", "decode's layer 1 reads layer 0's cache rows", "MISMATCH", "k_cache", 1,
              "computation", min_layers=2),
        Fault("norm_epsilon", "decode adds 0.01 to the epsilon of every norm", "MISMATCH", "attn_norm", 0,
              "computation"),
        Fault("wrong_token", "decode embeds another token than the one it was given", "N/A", "embed", None, "none"),
    )
}  # fmt: skip


def find_fault(name: str) -> Fault:
    """Return a fault by name. Raises UsageError for an unknown one."""
    fault = FAULTS.get(name)
    if fault is None:
        raise UsageError(
            "unknown fault", where="--fault", measured=name, allowed=", ".join(FAULTS),
            next_step="`driftprobe faults` says what each one breaks",
        )  # fmt: skip
    return fault
