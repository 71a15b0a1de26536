"""Faults of attention: positions, the cache's extent, heads, scores."""

from __future__ import annotations

from driftprobe.faults.base import Fault

FAULTS: tuple[Fault, ...] = (
    Fault("rope_plus_one", "decode rotates q and k for position n+1 instead of n", "MISMATCH", "q_rope", 0,
          "computation", "rope_position", "positions"),
    Fault("kv_heads_swapped", "decode reads KV heads 0 and 1 in each other's place", "MISMATCH", "attn_scores", 0,
          "computation", "head_map", "heads", min_kv_heads=2),
    Fault("attn_scale", "decode scales attention scores by 1.05 too much", "MISMATCH", "attn_scores", 0,
          "computation", "score_scale", "scores"),
    Fault("oldest_key_masked", "decode does not see key 0", "MISMATCH", "attn_scores", 0, "computation",
          "keys_masked", "cache extent"),
    Fault("wrong_token", "decode embeds another token than the one it was given", "N/A", "embed", None, "none"),
)  # fmt: skip
