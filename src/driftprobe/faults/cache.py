"""Faults of what the cache holds: wrong slots, blocks, layers, scales, layouts; stale, empty and rounded rows.

All but two are wrong writes: they act on the rows that a prefill has just written, and decode with prefill's own rows
put in is healthy (`contents`). `overwrite_previous` and `other_layer_cache` act in the decode step itself
(`computation`).
"""

from __future__ import annotations

from driftprobe.faults.base import Fault

FAMILY = "cache contents"
_SCALES = (2.0, 1.05, 1.005)


def _fault(name: str, breaks: str, tensor: str, layer: int, cause: str, reading: str = "contents", *,
           prompt: int = 1, kv_heads: int = 1, layers: int = 1, strengths: tuple[float, ...] = (1.0,), unit: str = "",
           family: str = FAMILY) -> Fault:  # fmt: skip
    return Fault(name, breaks, "MISMATCH", tensor, layer, reading, cause, family, strengths, unit, prompt,
                 max(layers, layer + 1), kv_heads)  # fmt: skip


FAULTS: tuple[Fault, ...] = (
    _fault("cache_shift", "the prefill writes every cache row one slot too far; slot 0 stays empty", "k_cache", 0,
           "cache_shift", prompt=2),
    _fault("cache_shift_back", "the prefill writes every cache row one slot too early: row 0 is lost, the last slot "
           "stays empty", "k_cache", 0, "cache_shift", prompt=2),
    _fault("overwrite_previous", "decode writes its K and V one slot too early, over row n-1; slot n stays empty",
           "k_cache", 0, "cache_overwritten", "computation"),
    _fault("k_rows_swapped", "first and last cached K row of layer 1 change places", "k_cache", 1, "cache_swapped",
           prompt=2),
    _fault("v_rows_swapped", "first and last cached V row of layer 1 change places", "v_cache", 1, "cache_swapped",
           prompt=2),
    _fault("stale_row", "the first cached K and V row of layer 1 is left from an earlier request", "k_cache", 1,
           "cache_stale", prompt=2),
    _fault("k_row_zero", "cached K row 0 of layer 1 is zero", "k_cache", 1, "cache_zero"),
    _fault("v_row_zero", "cached V row 0 of layer 1 is zero", "v_cache", 1, "cache_zero"),
    _fault("last_row_twice", "the last row of every layer is written a second time, over the one before it", "k_cache",
           0, "cache_duplicated", prompt=2),
    _fault("other_layer_cache", "decode's layer 1 reads layer 0's cache rows", "k_cache", 1, "cache_other_layer",
           "computation"),
    _fault("layer_offset", "the prefill writes each layer's rows into the cache of the layer before it", "k_cache", 0,
           "cache_other_layer", layers=2),
    _fault("kv_exchanged", "the prefill writes K rows where V rows belong, and V where K", "k_cache", 0,
           "cache_kv_exchanged"),
    _fault("other_batch_row", "every cached row is another sequence's", "k_cache", 0, "cache_other_sequence",
           prompt=2),
    _fault("blocks_exchanged", "the first two 16-token blocks of the cache change places", "k_cache", 0,
           "cache_blocks", prompt=32),
    _fault("k_quant_scale", "cached K rows come back with a wrong scale", "k_cache", 0, "cache_scale",
           strengths=_SCALES, unit="times the scale"),
    _fault("v_quant_scale", "cached V rows come back with a wrong scale", "v_cache", 0, "cache_scale",
           strengths=_SCALES, unit="times the scale"),
    _fault("head_scale", "the last KV head's cached K rows come back with a wrong scale", "k_cache", 0,
           "cache_head_scale", kv_heads=2, strengths=_SCALES, unit="times the scale"),
    _fault("axes_exchanged", "the prefill stores each row [head, dim] as [dim, head]", "k_cache", 0, "cache_axes",
           kv_heads=2),
    _fault("k_cached_unrotated", "the prefill caches K before its rotary embedding", "k_cache", 0, "cache_unrotated",
           prompt=2),
    _fault("rows_fp8", "cached rows are rounded to float8_e4m3fn without being declared", "k_cache", 0, "precision",
           family="precision"),
    _fault("rows_int8", "cached rows are rounded to int8, a scale for each row and head, without being declared",
           "k_cache", 0, "precision", family="precision"),
)  # fmt: skip
