"""Faults of attention: positions, the cache's contents and extent, heads, scores."""

from __future__ import annotations

from driftprobe.faults.base import Fault

FAULTS: tuple[Fault, ...] = (
    Fault("rope_plus_one", "decode rotates q and k for position n+1 instead of n", "MISMATCH", "q_rope", 0,
          "computation", "rope_position", "positions"),
    Fault("cache_shift", "the prefill writes every cache row one slot too far; slot 0 stays empty", "MISMATCH",
          "k_cache", 0, "contents", "cache_shift", "cache contents"),
    Fault("k_rows_swapped", "first and last cached K row of layer 1 change places", "MISMATCH", "k_cache", 1,
          "contents", "cache_swapped", "cache contents", min_prompt=2, min_layers=2),
    Fault("v_row_zero", "cached V row 0 of layer 1 is zero", "MISMATCH", "v_cache", 1, "contents", "cache_zero",
          "cache contents", min_layers=2),
    Fault("kv_heads_swapped", "decode reads KV heads 0 and 1 in each other's place", "MISMATCH", "attn_scores", 0,
          "computation", "head_map", "heads", min_kv_heads=2),
    Fault("attn_scale", "decode scales attention scores by 1.05 too much", "MISMATCH", "attn_scores", 0,
          "computation", "score_scale", "scores"),
    Fault("oldest_key_masked", "decode does not see key 0", "MISMATCH", "attn_scores", 0, "computation",
          "keys_masked", "cache extent"),
    Fault("other_layer_cache", "decode's layer 1 reads layer 0's cache rows", "MISMATCH", "k_cache", 1,
          "computation", "cache_other_layer", "cache contents", min_layers=2),
    Fault("wrong_token", "decode embeds another token than the one it was given", "N/A", "embed", None, "none"),
)  # fmt: skip
