"""The benign variations: what engines do differently in decode that is no bug, and must never be called one.

Each is a context on an engine, like a planted fault, and like one it says so where it cannot act in a model. It knows
no dtype: at a higher precision of the ladder it does the very same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.accuracy import keepers, kernels
from driftprobe.plan import Plan


def as_it_is(plan: Plan) -> Plan:
    """Return a plan unchanged."""
    return plan


@dataclass(frozen=True)
class Benign:
    """One benign variation."""

    name: str
    does: str
    keep: keepers.Keeper
    plan: Callable[[Plan], Plan] = as_it_is
    """How the plan's calls are made differently, where that is the variation."""


_VARIATIONS = (
    Benign("sdpa_math", "decode attends with torch's math backend",
           keepers.attention("sdpa_math", kernels.fused("MATH"), plain=True)),
    Benign("sdpa_flash", "decode attends with torch's flash backend",
           keepers.attention("sdpa_flash", kernels.fused("FLASH_ATTENTION"), plain=True)),
    Benign("split_keys_2", "decode splits the keys in 2 and merges by log-sum-exp",
           keepers.attention("split_keys_2", kernels.split(2))),
    Benign("split_keys_4", "decode splits the keys in 4 and merges by log-sum-exp",
           keepers.attention("split_keys_4", kernels.split(4))),
    Benign("online_softmax", "decode tiles the keys by 8, online softmax",
           keepers.attention("online_softmax", kernels.online)),
    Benign("reversed_keys", "decode adds up from the last key to the first",
           keepers.attention("reversed_keys", kernels.reversed_order)),
    Benign("softmax_float32", "decode takes the softmax in float32",
           keepers.attention("softmax_float32", kernels.softmax_wide)),
    Benign("softmax_own", "decode takes the softmax in the model's dtype",
           keepers.attention("softmax_own", kernels.softmax_own)),
    Benign("query_scaled", "decode scales the query, not the scores",
           keepers.attention("query_scaled", kernels.query_scaled)),
    Benign("keys_float16", "decode casts query and keys to float16 inside attention, declared",
           keepers.attention("keys_float16", kernels.keys_float16, {"attn_scores": "float16"})),
    Benign("cache_float16", "the cache keeps float16, declared",
           keepers.coarse_cache("cache_float16", "float16", keepers.rounded_to(torch.float16))),
    Benign("cache_bfloat16", "the cache keeps bfloat16, declared",
           keepers.coarse_cache("cache_bfloat16", "bfloat16", keepers.rounded_to(torch.bfloat16))),
    Benign("cache_fp8", "the cache keeps float8 e4m3 with a scale for each row and head, declared",
           keepers.coarse_cache("cache_fp8", "float8_e4m3fn", keepers.to_fp8)),
    Benign("cache_fp8_unscaled", "the cache keeps float8 e4m3 without a scale, declared",
           keepers.coarse_cache("cache_fp8_unscaled", "float8_e4m3fn", keepers.rounded_to(torch.float8_e4m3fn))),
    Benign("cache_int8", "the cache keeps int8 with a scale for each row and head, declared",
           keepers.coarse_cache("cache_int8", "int8", keepers.to_int8)),
    Benign("static_cache", "a cache of fixed size", keepers.static_cache),
    Benign("chunks_16", "decode's own prefill in chunks of 16 tokens", keepers.several_tokens,
           partial(keepers.chunked, 16)),
    Benign("chunks_7", "decode's own prefill in chunks of 7 tokens", keepers.several_tokens,
           partial(keepers.chunked, 7)),
    Benign("threads", "decode on another number of threads", keepers.threads),
    Benign("fused_qkv", "decode computes q, k and v in one product", keepers.fused_qkv),
    Benign("split_qkv", "decode computes a fused projection in three", keepers.split_qkv),
    Benign("transposed_weights", "decode multiplies with weights laid out the other way", keepers.transposed_weights),
    Benign("batch_left_padded", "decode's products are a batch's of two, the keys padded on the left",
           keepers.batch("batch_left_padded", left=True)),
    Benign("batch_right_padded", "decode's products are a batch's of two, the keys padded on the right",
           keepers.batch("batch_right_padded", left=False)),
    Benign("router_tie", "three experts nearly tie, and rounding flips them", keepers.router_tie),
    Benign("argmax_tie", "tokens nearly tie, and rounding flips the top one", keepers.argmax_tie),
)  # fmt: skip
BENIGN: dict[str, Benign] = {variation.name: variation for variation in _VARIATIONS}
