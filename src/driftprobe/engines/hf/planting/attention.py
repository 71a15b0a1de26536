"""Plants faults of attention, in a file a family, and the wrong token, which is no fault of any op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from driftprobe.engines.hf.planting import extent, heads, positions, scores
from driftprobe.engines.hf.planting.base import Call, Planter, Site, Undo, during, is_decode
from driftprobe.faults import Expected


@contextmanager
def _wrong_token(site: Site, _strength: float) -> Iterator[Expected]:
    def change(call: Call) -> list[Undo]:
        call["input_ids"] = (call["input_ids"] + 1) % site.model.get_input_embeddings().weight.shape[0]
        return []

    with during(site, is_decode, change):
        yield Expected(None, "embed", "none", "")


PLANTERS: dict[str, Planter] = {
    "wrong_token": _wrong_token,
    **positions.PLANTERS,
    **extent.PLANTERS,
    **heads.PLANTERS,
    **scores.PLANTERS,
}
