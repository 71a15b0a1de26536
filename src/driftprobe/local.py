"""The local test: an op whose inputs are bit for bit equal may differ by its own rounding, and by nothing else.

The floor of a tap holds all the rounding that has come down to it. Where the inputs of an op agree bit for bit none
has, and the op's own rounding is known element by element: u·|y| for one that is stored, more where an op rounds in
between. So the first op at fault is told from rounding far below the floor, in one dtype and without a second
precision. Elements that are small beside the rest show most: a fault adds to them what it adds to all, rounding does
not.

Axes legend: see taps.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from driftprobe.compare import SCORES, Pair, PayloadSource, without_shift
from driftprobe.fingerprint import CAST_ROUNDOFF, UNIT_ROUNDOFF, Float64, l2_norm, to_float64
from driftprobe.taps import BY_NAME, CACHE_TAPS
from driftprobe.trace import CONSTANTS, EngineFacts, Record, Trace

LOCAL_LIMIT = 1.5
"""Excess above which an op differs by more than its own rounding (docs/decisions/0004-local-test.md)."""
SUM_ERRORS = 4.0
"""Standard deviations allowed to a sum of K products, each √K·s of the result (Higham and Mary 2019)."""
COARSE = UNIT_ROUNDOFF["float16"]
"""Dtypes from this roundoff up are tested locally; finer ones round as their sums do, which the floor measures."""

INPUT_ERRORS = 2.0
"""How many times its inputs' distance a rotation's results may be apart: more than once, for a factor of their own."""
SAME_GAIN = 0.01
"""How far apart the heads' factors may be: a norm between that nobody recorded makes them others."""
ANGLE_ERRORS = 32.0
"""Unit roundoffs, for each position, by which an angle may be off: fast trigonometric functions lose some."""

_SUBNORMAL = {"float16": 2.0**-24, "float8_e4m3fn": 2.0**-9, "float8_e5m2": 2.0**-16}
"""Smallest positive number of a dtype whose range is so narrow that results fall below it."""

Place = tuple[int, int | None, str]
"""Step, layer, tensor."""


class Ground(str, Enum):
    """Why a difference under the floor is no rounding."""

    INPUTS = "inputs"
    TOKENS = "tokens"
    ROTATION = "rotation"
    VALUES = "values"
    PRODUCT = "product"

    @property
    def words(self) -> str:
        """The ground as a clause that its excess follows."""
        return _GROUNDS[self]


_GROUNDS = {
    Ground.INPUTS: "the op's inputs are bit for bit equal and its own rounding is exceeded",
    Ground.TOKENS: "nothing but ops on single tokens stands before these rows and its own rounding is exceeded",
    Ground.ROTATION: "a rotation keeps distances, and what its input's difference and its rounding allow is exceeded",
    Ground.PRODUCT: "what the matrix makes of its inputs' difference is taken off and its own rounding is exceeded",
    Ground.VALUES: "the rows in which V fails stand out in K too, and what any other row allows is exceeded",
}


@dataclass(frozen=True, slots=True)
class Local:
    """What the local test says of one tap."""

    excess: float
    """How far the difference exceeds what its ground allows: in units of the op's own rounding, root mean square over
    the elements or a quarter of the worst; of distances (rotation) and rows (values) their plain ratio."""
    inputs: tuple[str, ...]
    """The taps that the op reads: bit for bit equal on both sides, unless its ground says otherwise."""
    ground: Ground = Ground.INPUTS


@dataclass(frozen=True)
class Bench:
    """The pairs of one arm and prefill, by place, and where their whole tensors are."""

    facts: EngineFacts
    pairs: dict[Place, Pair]
    payloads: PayloadSource
    constants: dict[tuple[int | None, str], Record] = field(default_factory=dict)
    trace: Trace | None = None
    _read: dict[tuple[int | None, str], Float64 | None] = field(default_factory=dict)

    @property
    def prefilled(self) -> int:
        """How many rows a prefill has written; those behind them are decode's own."""
        return 0 if self.trace is None else self.trace.header.prompt_len

    def reference(self, step: int, layer: int | None, tensor: str) -> Float64 | None:
        """Return prefill's tensor as float64, or None."""
        found = self.pairs.get((step, layer, tensor))
        array = None if found is None else self.payloads.get(found.reference)
        return None if array is None else to_float64(array)

    def candidate(self, step: int, layer: int | None, tensor: str) -> Float64 | None:
        """Return the other side's tensor as float64, or None."""
        found = self.pairs.get((step, layer, tensor))
        array = None if found is None else self.payloads.get(found.candidate)
        return None if array is None else to_float64(array)

    def roundoff(self, place: Place) -> float:
        """Return the unit roundoff of what is stored at a place: the coarser record's, or a declared cast's.

        Scores and probabilities may be recorded more finely than a kernel has computed them: in the model's own dtype.
        """
        pair = self.pairs[place]
        dtypes = [r.dtype for r in (pair.reference, pair.candidate)] + [self.facts.casts.get(place[2])]
        dtypes += [self.facts.dtype] if place[2] in {"attn_scores", "attn_probs"} else []
        dtypes += [dtype for name, dtype in self.facts.casts.items() if name not in BY_NAME]
        return max(UNIT_ROUNDOFF[dtype] for dtype in dtypes if dtype in UNIT_ROUNDOFF)

    def smallest(self, place: Place) -> float:
        """Return the distance of the smallest numbers of what is stored: below it nothing is rounded relatively."""
        pair = self.pairs[place]
        dtypes = {pair.reference.dtype, pair.candidate.dtype, self.facts.dtype}
        return max(_SUBNORMAL.get(dtype or "", 0.0) for dtype in dtypes)

    def constant(self, layer: int | None, name: str) -> Float64 | None:
        """Return a constant of the model, or None where the trace has none of this name."""
        record = self.constants.get((layer, name))
        if record is None:
            return None
        if (layer, name) not in self._read:
            array = self.payloads.get(record)
            self._read[(layer, name)] = None if array is None else to_float64(array)
        return self._read[(layer, name)]


def bench(trace: Trace, pairs: Iterable[Pair], payloads: PayloadSource) -> Bench:
    """Return the bench of one pairing of a trace."""
    return Bench(
        trace.header.engine,
        {(p.reference.step, p.reference.layer, p.reference.tensor): p for p in pairs},
        payloads,
        {(r.layer, r.tensor): r for r in trace.records if r.arm == CONSTANTS},
        trace,
    )


def own_rounding(pair: Pair, on: Bench) -> Local | None:
    """Return the local test of a pair; None where it cannot be made.

    It needs both whole tensors, inputs that were recorded and are bit for bit equal, an op whose rounding is known, and
    a dtype that rounds more coarsely than sums do. A rotation behind a coarser cast is tested with other inputs too.
    """
    record = pair.reference
    place = (record.step, record.layer, record.tensor)
    if record.tensor in CACHE_TAPS:
        return _stored_rows(pair, place, on)
    if record.tensor in {"k_rope", "v_proj"} and coarser_cache(on.facts):
        return None  # a latent comes back from the cache before it is taken apart
    if record.tensor in {"q_rope", "k_rope"} and _finer_than_casts(on.facts):
        return _turned(pair, place, on)
    spread = _SPREADS.get(record.tensor)
    inputs = () if spread is None else sources(place, on.pairs)
    if spread is None or not inputs or pair.drift.equal or not coarse(on.facts):
        return None
    if not all(on.pairs[source].drift.equal for source in inputs):
        return None
    p, d = (on.payloads.get(r) for r in (record, pair.candidate))
    if p is None or d is None or p.shape != d.shape or not p.size:
        return None
    d = without_shift(p, d) if record.tensor == SCORES else d
    return _measured(place, to_float64(p), to_float64(d), on.roundoff(place), on, spread, inputs)


def _measured(
    place: Place, p: Float64, d: Float64, u: float, on: Bench, spread: _Spread, inputs: tuple[Place, ...]
) -> Local | None:
    size = spread(place, p, on)
    seen = np.isfinite(p) & np.isfinite(d)
    if size is None or not seen.any() or not (seen | (p == d)).all():
        return None
    gaps = np.abs(d - p, where=seen, out=np.zeros_like(p))[seen]
    unit = u * size.products[seen] + size.sums * _rms(p[seen]) + on.smallest(place)
    return Local(_in_units(gaps, unit), tuple(source[2] for source in inputs))


def product_excess(place: Place, p: Float64, gaps: Float64, terms: int, on: Bench) -> float:
    """Return how far `gaps` exceed what a product of `terms` terms with result p rounds by, as `Local.excess` says."""
    size = _product_of(place, p, on, terms)
    unit = on.roundoff(place) * size.products + size.sums * _rms(p) + on.smallest(place)
    return _in_units(np.abs(gaps), unit)


def _stored_rows(pair: Pair, place: Place, on: Bench) -> Local | None:
    """Return the local test of the first layer's cache rows that a prefill wrote.

    Nothing but ops on single tokens stands before them, so a prefill of another length, or in chunks, has no reason to
    store others: they may differ by the rounding of a projection and a rotation. Not made for a cache that is declared
    coarser, which may round on a grid of its own.
    """
    if place[1] != 0 or pair.drift.equal or not coarse(on.facts) or not on.facts.accumulate or coarser_cache(on.facts):
        return None
    first = pair.reference.row_start
    p, d = on.reference(*place), on.candidate(*place)
    if p is None or d is None or p.shape != d.shape or first != pair.candidate.row_start or on.prefilled <= first:
        return None
    p, d = p[: on.prefilled - first], d[: on.prefilled - first]
    if not (np.isfinite(p) & np.isfinite(d)).all():
        return None
    size = (
        _rotation(place, p, on)
        if (place[0], 0, "k_rope") in on.pairs and place[2] == "k_cache"
        else _stored(place, p, on)
    )
    unit = on.roundoff(place) * size.products + _row_sums(on.facts) * _rms(p)
    return Local(_in_units(np.abs(d - p), unit), ("the tokens",), Ground.TOKENS)


def _finer_than_casts(facts: EngineFacts) -> bool:
    """Whether an engine stores finely what has been through a coarser cast, whose floor it has from there on."""
    return not coarse(facts) and any(CAST_ROUNDOFF.get(dtype, 0.0) >= COARSE for dtype in facts.casts.values())


def _turned(pair: Pair, place: Place, on: Bench) -> Local | None:
    """Return the test of a rotation by distances, which it keeps: ‖Rd − Rp‖ = ‖d − p‖, however far apart the two are.

    Made where prefill's own rotation keeps its heads' lengths, up to one factor. Cosine and sine may be as far off
    as their angle is rounded, which grows with the position.
    """
    given, position = sources(place, on.pairs), pair.reference.logical_tok_idx
    if len(given) != 1 or position is None or pair.drift.equal:
        return None
    before, after = ((on.reference(*at), on.candidate(*at)) for at in (given[0], place))
    found = [x for x in (*before, *after) if x is not None]
    if len(found) < 4 or len({x.shape for x in found}) > 1 or not all(np.isfinite(x).all() for x in found):
        return None
    p, d, turned_p, turned_d = found
    gain = _gain(p, turned_p)
    if gain is None:
        return None
    turned_size = l2_norm(turned_p.reshape(-1))
    own = on.roundoff(place) * (2.0 + ANGLE_ERRORS * (1 + position)) * turned_size
    allowed = INPUT_ERRORS * gain * l2_norm((d - p).reshape(-1)) + own
    gap = l2_norm((turned_d - turned_p).reshape(-1))
    return Local(gap / allowed if allowed > 0.0 else 0.0, (given[0][2],), Ground.ROTATION)


def _gain(before: Float64, after: Float64) -> float | None:
    """Return the one factor by which all heads are longer behind a rotation; None where something else is between."""
    sizes, turned = (np.sqrt(np.square(x).sum(axis=-1)) for x in (before, after))
    if not (sizes > 0.0).all():
        return None
    ratios = turned / sizes
    alike = float(ratios.max() - ratios.min()) <= SAME_GAIN * float(ratios.max())
    return float(ratios.max()) if alike else None


def coarser_cache(facts: EngineFacts) -> bool:
    """Whether the cache is declared to keep its rows more coarsely than the model computes."""
    return any(name not in BY_NAME or name in CACHE_TAPS for name in facts.casts)


def _row_sums(facts: EngineFacts) -> float:
    """Return the accumulation error of a projection whose width the rows do not tell: a wide one's, of 2¹⁴ terms."""
    return SUM_ERRORS * _sum_roundoff(facts) * 2.0**7


def _in_units(gaps: Float64, unit: Float64) -> float:
    """Return the root mean square of gaps in units of what rounding allows, or a quarter of the worst, if that is more.

    Few elements that are far off (some tokens' logits, one head) are lost in the mean of many that are equal.
    """
    units = np.divide(gaps, unit, out=np.zeros_like(gaps), where=gaps > 0)
    return max(float(np.sqrt(np.square(units).mean())), float(units.max(initial=0.0)) / 4) if units.size else 0.0


def _rms(values: Float64) -> float:
    return float(np.sqrt(np.square(values).mean())) if values.size else 0.0


def coarse(facts: EngineFacts) -> bool:
    """Whether an engine stores results more coarsely than it sums them."""
    return UNIT_ROUNDOFF.get(facts.dtype, 0.0) >= COARSE


def sources(place: Place, pairs: dict[Place, Pair]) -> tuple[Place, ...]:
    """Return the recorded taps that an op reads: its own inputs, or, where one was not recorded, that one's inputs."""
    return tuple(_sources(place, pairs) or ())


def _sources(place: Place, pairs: dict[Place, Pair]) -> dict[Place, None] | None:
    step, layer, tensor = place
    found: dict[Place, None] = {}
    for name in _inputs(tensor, layer, step, pairs):
        known = _recorded((step, layer, name), pairs)
        if known is None:
            return None
        found.update(known)
    return found


def _recorded(place: Place, pairs: dict[Place, Pair]) -> dict[Place, None] | None:
    """Return what stands for an input; None where nothing does: cache rows come from other tokens than this one."""
    step, layer, tensor = place
    if place in pairs:
        return {place: None}
    if tensor in CACHE_TAPS:
        return None
    if tensor == "embed":
        return {(step, None, "embed"): None} if (step, None, "embed") in pairs else {}
    if tensor == "x_out" and layer is None:
        last = max((at for _, at, name in pairs if name == "x_out" and at is not None), default=None)
        return {} if last is None else _recorded((step, last, "x_out"), pairs)
    return _sources(place, pairs)


def _inputs(tensor: str, layer: int | None, step: int, pairs: dict[Place, Pair]) -> tuple[str, ...]:
    """Return the names of an op's inputs; of alternatives (`q_norm`, else `q_proj`) the one that was recorded."""
    if tensor in _SUMS:
        return next((w for w in _SUMS[tensor] if all((step, layer, n) in pairs for n in w)), _SUMS[tensor][-1])
    if tensor == "x_in" and layer is not None and layer > 0:
        return ()  # the output of the layer before, the same tensor
    names = BY_NAME[tensor].inputs
    if tensor in {"q_rope", "k_rope"}:
        return names[:1] if (step, layer, names[0]) in pairs else names[1:]
    if tensor == "mlp_out":
        return tuple(n for n in ("ffn_norm", "router_logits") if (step, layer, n) in pairs) or ("ffn_norm",)
    return names


_SUMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "x_mid": (("x_in", "attn_out"),),
    "x_out": (("x_mid", "mlp_out"), ("x_in", "attn_out", "mlp_out")),
}
"""Sums and their terms; a parallel block adds attention and MLP at once."""


@dataclass(frozen=True, slots=True)
class _Size:
    """How large an op's own rounding errors are."""

    products: Float64
    """Elementwise, in unit roundoffs of what the op stores."""
    sums: float = 0.0
    """Of accumulation, relative to the result's root mean square."""


_Spread = Callable[[Place, Float64, Bench], _Size | None]


def _stored(_place: Place, p: Float64, on: Bench) -> _Size:
    """Return the error of a result that is computed in float32 and rounded at most twice: norms, softmax."""
    return _Size(2 * np.abs(p), SUM_ERRORS * _sum_roundoff(on.facts))


def _product(place: Place, p: Float64, on: Bench) -> _Size | None:
    """Return the error of a matrix product with a bias: one rounding of the result, one before the bias is added.

    The sum's own error is √K·s·‖x‖‖w‖/√K (Higham and Mary 2019), taken relative to the result's size; where an engine
    does not say in what its products are summed there is no test.
    """
    if not on.facts.accumulate:
        return None
    given = next((on.reference(*source) for source in sources(place, on.pairs)), None)
    return _product_of(place, p, on, 1 if given is None else given[0].size)


def _product_of(place: Place, p: Float64, on: Bench, terms: int) -> _Size:
    bias = on.constant(place[1], f"{place[2]}.bias")
    offset = np.abs(bias.reshape(p.shape[1:])) if bias is not None and bias.size == p[0].size else 0.0
    return _Size(np.abs(p) + offset, SUM_ERRORS * _sum_roundoff(on.facts) * float(np.sqrt(terms)))


def _rotation(_place: Place, p: Float64, on: Bench) -> _Size:
    """Return the error of a rotation whose products are rounded: of the size of the pair, however it is paired."""
    half = p.shape[-1] // 2
    partners = [np.roll(p, half, axis=-1), _neighbours(p)]
    return _Size(2 * np.sqrt(np.square(p) + np.square(np.maximum(*map(np.abs, partners)))), _sum_roundoff(on.facts))


def _neighbours(p: Float64) -> Float64:
    even = p.shape[-1] // 2 * 2
    swapped = p.copy()
    swapped[..., 0:even:2], swapped[..., 1:even:2] = p[..., 1:even:2], p[..., 0:even:2]
    return swapped


def _scores(place: Place, p: Float64, on: Bench) -> _Size | None:
    """Return the error of scores: of the result, and of the query where the scale is taken into it first."""
    step, layer, _ = place
    q, k = on.reference(step, layer, "q_rope"), on.reference(step, layer, "k_cache")
    q = on.reference(step, layer, "q_proj") if q is None else q
    if q is None or k is None or not _of_heads(q, k) or q.shape[-1] != k.shape[-1] or p.shape[-1] != k.shape[0]:
        return None
    heads = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    terms = np.sqrt(np.einsum("hd,shd->hs", np.square(q[0]), np.square(heads)))
    plain = np.einsum("hd,shd->hs", q[0], heads)
    seen = np.isfinite(p[0])
    scale = float((p[0][seen] * plain[seen]).sum() / max(np.square(plain[seen]).sum(), 1e-300))
    return _Size(2 * np.where(seen, np.abs(p[0]), 0.0)[None] + abs(scale) * terms[None], _sum_roundoff(on.facts))


def _probabilities(place: Place, p: Float64, on: Bench) -> _Size:
    """Return the error of a softmax: of the result, and of scores that were rounded where nobody saw them.

    Scores that were recomputed may stand for ones that the kernel has stored: exp turns a rounding of u·|s| into that
    share of the probability.
    """
    step, layer, _ = place
    pair = on.pairs.get((step, layer, SCORES))
    scores = on.reference(step, layer, SCORES)
    sums = SUM_ERRORS * _sum_roundoff(on.facts)
    if pair is None or scores is None or scores.shape != p.shape or "recomputed" not in _sources_of(pair):
        return _Size(2 * np.abs(p), sums)
    known = np.where(np.isfinite(scores), np.abs(scores), 0.0)
    return _Size(np.abs(p) * (2 + known + (p * known).sum(axis=-1, keepdims=True)), sums)


def _sources_of(pair: Pair) -> tuple[str, str]:
    return pair.reference.source, pair.candidate.source


def _context(place: Place, p: Float64, on: Bench) -> _Size | None:
    """Return the error of the weighted values: of the result, and of probabilities that are stored before."""
    step, layer, _ = place
    probs, v = on.reference(step, layer, "attn_probs"), on.reference(step, layer, "v_cache")
    if probs is None or v is None or not _of_heads(probs, v):
        return None
    if p.shape[-1] != v.shape[-1] or probs.shape[-1] != v.shape[0]:
        return None
    heads = np.repeat(np.abs(v), probs.shape[1] // v.shape[1], axis=1)
    return _Size(2 * np.abs(p) + np.einsum("hs,shd->hd", probs[0], heads)[None], _sum_roundoff(on.facts))


def _of_heads(queries: Float64, rows: Float64) -> bool:
    """Whether `[1, H, …]` belongs to cache rows `[S, G, D]`: each KV head serves as many query heads."""
    return (
        queries.ndim == rows.ndim == 3
        and 0 < rows.shape[1] <= queries.shape[1]
        and not queries.shape[1] % rows.shape[1]
    )


def _inner(_place: Place, p: Float64, _on: Bench) -> _Size:
    """Return the error of an op that stores results in between (an MLP): of the size of the whole result."""
    return _Size(2 * (np.abs(p) + _rms(p)))


def _sum(place: Place, p: Float64, on: Bench) -> _Size:
    """Return the error of a sum: of the result, and of its terms where they were not rounded on both sides."""
    terms = [on.reference(*source) for source in sources(place, on.pairs)]
    return _Size(np.abs(p) + sum(np.abs(t) for t in terms if t is not None and t.shape == p.shape))


def _sum_roundoff(facts: EngineFacts) -> float:
    return UNIT_ROUNDOFF.get(facts.accumulate, UNIT_ROUNDOFF["float32"])


_SPREADS: dict[str, _Spread] = {
    **dict.fromkeys(("attn_norm", "q_norm", "k_norm", "ffn_norm", "final_norm", "x_in"), _stored),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out", "router_logits", "logits"), _product),
    **dict.fromkeys(("q_rope", "k_rope"), _rotation),
    **dict.fromkeys(("mlp_out", "mixer_out"), _inner),
    **dict.fromkeys(("x_mid", "x_out"), _sum),
    "attn_probs": _probabilities,
    "attn_scores": _scores,
    "attn_ctx": _context,
}
assert not set(_SPREADS) & CACHE_TAPS  # rows come from earlier calls: no op of this one made them
