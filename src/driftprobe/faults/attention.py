"""Faults of attention: positions, the cache's extent, heads, scores."""

from __future__ import annotations

from driftprobe.faults.base import Fault

_POSITIONS: tuple[Fault, ...] = (
    Fault("rope_plus_one", "decode rotates q and k for position n+1 instead of n", "MISMATCH", "q_rope", 0,
          "computation", "rope_position", "positions"),
    Fault("rope_minus_one", "decode rotates q and k for position n-1 instead of n", "MISMATCH", "q_rope", 0,
          "computation", "rope_position", "positions"),
    Fault("rope_reset", "decode rotates q and k for position 0", "MISMATCH", "q_rope", 0,
          "computation", "rope_position", "positions"),
    Fault("rope_base", "decode rotates with another rotary base", "MISMATCH", "q_rope", 0,
          "computation", "rope_base", "positions", (4.0, 1.1, 1.01), "times the base", min_prompt=2),
    Fault("rope_scaling", "decode scales rotary positions", "MISMATCH", "q_rope", 0,
          "computation", "rope_scaling", "positions", (2.0, 1.05, 1.001), "times the position", min_prompt=6),
    Fault("rope_partial", "decode rotates only the faster half of the dimensions", "MISMATCH", "q_rope", 0,
          "computation", "rope_dims", "positions"),
    Fault("rope_interleaved", "decode pairs neighbouring dimensions where prefill pairs halves, or the reverse",
          "MISMATCH", "q_rope", 0, "computation", "rope_pairing", "positions"),
    Fault("k_unrotated", "decode stores the new key unrotated", "MISMATCH", "k_rope", 0,
          "computation", "rope_missing", "positions"),
    Fault("rope_twice", "decode rotates the new key twice", "MISMATCH", "k_rope", 0,
          "computation", "rope_twice", "positions"),
    Fault("prefill_rope", "prefill rotates queries, and those alone, for the next position", "MISMATCH", "q_rope", 0,
          "computation", "rope_position", "positions", side="prefill"),
    Fault("alibi_offset", "decode takes cached keys for farther away than they are", "MISMATCH", "attn_scores", 0,
          "computation", "alibi", "positions", (1.0, 0.1), "tokens", min_prompt=2),
)  # fmt: skip
_EXTENT: tuple[Fault, ...] = (
    Fault("oldest_key_masked", "decode does not see key 0", "MISMATCH", "attn_scores", 0, "computation",
          "keys_masked", "cache extent"),
    Fault("oldest_row_lost", "decode's cache has lost its oldest row: an eviction too early", "MISMATCH", "attn_scores",
          0, "computation", "keys_masked", "cache extent", min_prompt=2),
    Fault("sink_tokens_lost", "decode does not see the first 4 keys", "MISMATCH", "attn_scores", 0, "computation",
          "keys_masked", "cache extent", min_prompt=5),
    Fault("newest_key_masked", "decode does not see its own token: the causal mask is off by one", "MISMATCH",
          "attn_scores", 0, "computation", "keys_masked", "cache extent"),
    Fault("extra_key_visible", "decode sees one row more, that nobody wrote", "MISMATCH", "attn_scores", 0,
          "computation", "keys_extra", "cache extent"),
    Fault("window_minus_one", "decode sees one key less than the sliding window", "MISMATCH", "attn_scores", 0,
          "computation", "keys_masked", "cache extent", beyond_window=True),
    Fault("window_plus_one", "decode sees one key more than the sliding window", "MISMATCH", "attn_scores", 0,
          "computation", "keys_extra", "cache extent", beyond_window=True),
    Fault("prefill_sees_next", "prefill's causal mask is off by one: each token sees the next", "MISMATCH",
          "attn_scores", 0, "contents", "keys_extra", "cache extent", min_layers=2, side="prefill"),
    Fault("mask_leak", "prefill masks with a finite number, so that later keys leak in", "MISMATCH", "attn_scores", 0,
          "contents", "mask_leak", "scores", (-5.0, -10.0), "mask value", min_layers=2, side="prefill"),
)  # fmt: skip
_HEADS: tuple[Fault, ...] = (
    Fault("kv_heads_swapped", "decode reads KV heads 0 and 1 in each other's place", "MISMATCH", "attn_scores", 0,
          "computation", "head_map", "heads", min_kv_heads=2),
    Fault("gqa_tile", "decode gives query head h the KV head h mod G, not h // (H/G)", "MISMATCH", "attn_scores", 0,
          "computation", "head_map", "heads", min_kv_heads=2),
    Fault("q_heads_permuted", "decode's query heads stand one place from where they belong", "MISMATCH", "q_proj", 0,
          "computation", "head_order", "heads"),
    Fault("context_heads_rolled", "decode joins its heads' results in another order", "MISMATCH", "attn_ctx", 0,
          "computation", "head_order", "heads"),
    Fault("head_zero", "decode's head 1 gives zeros", "MISMATCH", "attn_ctx", 0, "computation", "head_zero", "heads"),
)  # fmt: skip
_SCORES: tuple[Fault, ...] = (
    Fault("attn_scale", "decode scales attention scores by a factor too much", "MISMATCH", "attn_scores", 0,
          "computation", "score_scale", "scores", (1.05, 1.01, 1.001), "times the scale"),
    Fault("scale_missing", "decode leaves the scale of the scores out", "MISMATCH", "attn_scores", 0,
          "computation", "score_scale", "scores"),
    Fault("scale_wrong_dim", "decode scales scores by the hidden size, not the head's", "MISMATCH", "attn_scores", 0,
          "computation", "score_scale", "scores"),
    Fault("softcap_missing", "decode leaves the soft-cap of the scores out", "MISMATCH", "attn_scores", 0,
          "computation", "score_softcap", "scores"),
    Fault("sinks_lost", "decode's softmax lacks its learned sinks", "MISMATCH", "attn_probs", 0,
          "computation", "sinks_lost", "scores"),
    Fault("prefill_scale", "prefill, and prefill alone, scales scores by a factor too much", "MISMATCH", "attn_scores",
          0, "computation", "score_scale", "scores", (1.05, 1.01, 1.001), "times the scale", side="prefill"),
)  # fmt: skip
_OTHER: tuple[Fault, ...] = (
    Fault("wrong_token", "decode embeds another token than the one it was given", "N/A", "embed", None, "none"),
)  # fmt: skip
FAULTS: tuple[Fault, ...] = (*_POSITIONS, *_EXTENT, *_HEADS, *_SCORES, *_OTHER)
