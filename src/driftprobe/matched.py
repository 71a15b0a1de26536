"""Matched filters: a fault whose direction is known, found under the noise of one coarse dtype.

A wrong softmax scale moves every score along itself, a wrong quantisation scale every cached element, a wrong epsilon
every element of a norm. The difference of the two sides is projected on that direction. Rounding has no sign: under it
each term of the projection is as likely to be positive as negative, so the projection in units of the root of the sum
of its squared terms is about normal, whatever the errors' sizes are (the sign-flip test: Fisher 1935, section 21; Efron
1969). All layers and steps are pooled: a global fault adds up, rounding does not. Each tap is looked at alone as well,
where the noise that has come down to later layers does not bury it; many taps are many chances, and the limit rises
with their number. A norm is not: it has one factor a row, whose own rounding can move all of the row one way. A cache's
rows are the same at every step, and are pooled within one.

Where an op's inputs differ, the difference that they make is computed and taken off first (scores), or the tap is left
out: a matched filter sees the op, not what came down to it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from driftprobe.causes import Parameters
from driftprobe.compare import Pair
from driftprobe.fingerprint import UNIT_ROUNDOFF, Float64
from driftprobe.local import Bench, Place, coarse, coarser_cache, sources
from driftprobe.taps import CACHE_TAPS
from driftprobe.turns import BASE, turns

MIN_Z = 5.0
"""Standard errors from which a projection is no accident: 6e-7 two-sided; a run makes some ten projections."""
ROUNDINGS = 0.82
"""Standard deviation of the difference of two roundings, each uniform within a unit roundoff: √(2/3)."""
MIN_SHARE = 1 / 4
"""Smallest relative change, in unit roundoffs of the stored dtype, that is a fault; of a rotation, that of the pair
which turns most. Kernels that round a scale or a soft-cap in another order lean one way by less: 0.21 at most."""

LEAST_SHARE = {"mlp_out": 1.5, "q_rope": 1.0, "k_rope": 1.0}
"""The same for taps whose rounding can lean. Where one hidden unit outweighs the others, its rounding moves the whole
result of an MLP along itself, by up to two roundoffs of its own. Cosine and sine are shared by all heads and layers:
kept more coarsely on one side, they turn each pair by one angle, by up to 0.71 of a roundoff (half a spacing below 1 in
each)."""


@dataclass(frozen=True, slots=True)
class Match:
    """A direction along which the two sides differ by more than rounding does."""

    tensor: str
    step: int
    layer: int | None
    """Where it acts first."""
    cause: str
    parameters: Parameters
    share: float
    """The estimated change along the direction: d = p + share · direction."""
    error: float
    """Its standard error."""
    z: float
    places: tuple[Place, ...]
    """All that was pooled."""


@dataclass(frozen=True, slots=True)
class _Projection:
    """One tap's difference on one direction: the terms of the sum, and the direction's own size."""

    place: Place
    terms: Float64
    """difference · direction / variance, element by element."""
    weight: float
    """Σ direction² / variance."""
    most: float = 1.0
    """The largest |direction| / size: how much the element that moves most does, relatively, under a share of 1."""


def match_filters(pairs: Iterable[Pair], on: Bench) -> tuple[Match, ...]:
    """Return what the filters find in one arm's pairs with what it repeats, first place first; nothing in a fine dtype.

    At most one match a tensor.
    """
    if not coarse(on.facts):
        return ()
    found: dict[str, dict[_Group, list[_Projection]]] = defaultdict(lambda: defaultdict(list))
    looks: Counter[str] = Counter()
    for pair in pairs:
        record = pair.reference
        place = (record.step, record.layer, record.tensor)
        looks[record.tensor] += record.tensor in _NAMES
        if record.tensor in _NAMES and not pair.drift.equal:
            for variant, item in _projections(place, on):
                found[record.tensor][record.step if record.tensor in CACHE_TAPS else 0, variant].append(item)
    matches = (_first_match(tensor, groups, looks[tensor], on) for tensor, groups in found.items())
    return tuple(match for match in matches if match is not None)


_Variant = int | str
"""Which direction of a tap: `all` of it along itself, one head of it, or a turn of a rotation and its pairing."""
_Group = tuple[int, _Variant]
"""What is pooled: a direction, and for cache rows, which are the same ones at every step, a step."""


def _first_match(tensor: str, groups: dict[_Group, list[_Projection]], looks: int, on: Bench) -> Match | None:
    """Return the clearest of a tensor's matches, of the first step in which there is one."""
    for step in sorted({step for step, _ in groups}):
        found = (_clearest(tensor, group[1], items, looks, on) for group, items in groups.items() if group[0] == step)
        best = max(filter(None, found), key=lambda pair: pair[0], default=None)
        if best is not None:
            return best[1]
    return None


def _clearest(
    tensor: str, variant: _Variant, items: list[_Projection], looks: int, on: Bench
) -> tuple[float, Match] | None:
    """Return a group's match and how clear it is: all taps pooled, or one of them alone where that is clearer.

    One of `looks` taps is the clearest by chance as well: its z² must be larger by 2·ln(looks), the Gaussian tail's
    price of as many tries.
    """
    pooled = _pooled(tensor, variant, items, on)
    found = [] if pooled is None else [(_clearness(pooled, 0.0), pooled)]
    price = 2.0 * math.log(max(looks, 1))
    for item in items if tensor in _ALONE and len(items) > 1 else ():
        alone = _pooled(tensor, variant, [item], on)
        if alone is not None and alone.z**2 - price >= MIN_Z**2:
            found.append((_clearness(alone, price), alone))
    return max(found, key=lambda pair: pair[0], default=None)


def _clearness(match: Match, price: float) -> float:
    """Return how clear a match is; one head that moves alone is as clear as all together, and says more."""
    return math.sqrt(max(match.z**2 - price, 0.0)) * (1.001 if "head" in match.parameters else 1.0)


def _projections(place: Place, on: Bench) -> Iterator[tuple[_Variant, _Projection]]:
    if place[2] in CACHE_TAPS | set(_TURNED) and coarser_cache(on.facts):
        return  # a grid of few steps takes small elements to zero, which is a direction; a latent comes back from it
    p, d = on.reference(*place), on.candidate(*place)
    if place[2] in _TURNED and p is not None and d is not None and p.shape == d.shape:
        for turn in turns(place, p, d, on):
            yield from _projected(f"{turn.kind} {turn.pairing}", place, turn.gap, turn.direction, turn.size)
    gap = None if place[2] in _TURNED else _difference(place, on)
    if p is None or gap is None or gap.shape != p.shape:
        return
    yield from _projected("all", place, gap, p, _error_size(place, p))
    if place[2] in CACHE_TAPS and p.shape[1] > 1:
        for head in range(p.shape[1]):
            yield from _projected(head, place, gap[:, head], p[:, head], p[:, head])


def _error_size(place: Place, p: Float64) -> Float64:
    """Return what an element's rounding error is as large as: itself, or, behind a sum of rounded terms, the others."""
    return np.hypot(p, np.sqrt(np.square(p).mean())) if place[2] in LEAST_SHARE else p


def _projected(
    variant: _Variant, place: Place, gap: Float64, direction: Float64, size: Float64
) -> Iterator[tuple[_Variant, _Projection]]:
    """Project a difference on a direction, each element weighed by its rounding error, which is as large as `size`."""
    seen = np.isfinite(direction) & np.isfinite(gap) & (size != 0)
    if seen.any():
        direction, gap, variance = direction[seen], gap[seen], np.square(size[seen])
        each = np.square(direction) / variance
        yield variant, _Projection(place, gap * direction / variance, float(each.sum()), float(each.max()) ** 0.5)


def _difference(place: Place, on: Bench) -> Float64 | None:
    """Return d − p, less what the inputs' difference makes of it; None where that is not known."""
    p, d = on.reference(*place), on.candidate(*place)
    if p is None or d is None or p.shape != d.shape:
        return None
    if place[2] in CACHE_TAPS:
        return d - p
    if all(on.pairs[source].drift.equal for source in sources(place, on.pairs)):
        return d - p
    if place[2] in _NORMS:
        return _norms_apart(place, p, d, on)
    return _scores_apart(place, p, d, on) if place[2] == "attn_scores" else None


def _norms_apart(place: Place, p: Float64, d: Float64, on: Bench) -> Float64 | None:
    """Return the difference of a norm's results that the norm itself, computed from both inputs, does not explain."""
    given = sources(place, on.pairs)
    if len(given) != 1:
        return None
    mine, other = (_normed(side(*given[0]), place, on) for side in (on.reference, on.candidate))
    if mine is None or other is None or mine.shape != p.shape:
        return None
    if float(np.sqrt(np.square(p - mine).mean())) > _FITS * float(np.sqrt(np.square(p).mean())):
        return None
    apart: Float64 = (d - p) - (other - mine)
    leans = _leans(on.reference(*given[0]), place, on) | _leans(on.candidate(*given[0]), place, on)
    return np.where(leans, np.nan, apart)


def _leans(x: Float64 | None, place: Place, on: Bench) -> npt.NDArray[np.bool_]:
    """Return where a norm's own rounding has a direction `[…, 1]`: its factor is within a roundoff of a power of two.

    x times such a factor is nearer to the number that has x's own digits than to any other, so that every element is
    rounded back to it, all one way. Those rows say nothing of a factor; about one in ninety in bfloat16.
    """
    factor = None if x is None else _norm_factor(x, place, on)
    if factor is None:
        return np.zeros((1,), dtype=bool)
    digits = np.log2(factor)
    return np.asarray(np.abs(np.exp2(digits - np.rint(digits)) - 1.0) <= UNIT_ROUNDOFF[on.facts.dtype])


def _norm_factor(x: Float64, place: Place, on: Bench) -> Float64 | None:
    """Return what a norm multiplies with, one over the root of the mean square `[…, 1]`."""
    _, layer, tensor = place
    eps, centred = (on.constant(layer, f"{tensor}.{name}") for name in ("eps", "centred"))
    if eps is None or centred is None:
        return None
    if float(centred.reshape(-1)[0]):
        x = x - x.mean(axis=-1, keepdims=True)
    return np.asarray(1.0 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + float(eps.reshape(-1)[0])))


def _normed(x: Float64 | None, place: Place, on: Bench) -> Float64 | None:
    _, layer, tensor = place
    names = ("centred", "offset", "weight", "bias")
    centred, offset, weight, bias = (on.constant(layer, f"{tensor}.{name}") for name in names)
    factor = None if x is None else _norm_factor(x, place, on)
    if x is None or factor is None or centred is None or weight is None or weight.shape[-1] != x.shape[-1]:
        return None
    if float(centred.reshape(-1)[0]):
        x = x - x.mean(axis=-1, keepdims=True)
    y = x * factor
    y = y * (weight + (0.0 if offset is None else float(offset.reshape(-1)[0])))
    result: Float64 = y if bias is None else y + bias
    return result


def _scores_apart(place: Place, p: Float64, d: Float64, on: Bench) -> Float64 | None:
    """Return the difference of scores that their own queries and keys do not explain, at prefill's fitted scale."""
    step, layer, _ = place
    mine = _plain_scores(on.reference, step, layer, p.shape)
    other = _plain_scores(on.candidate, step, layer, p.shape)
    if mine is None or other is None:
        return None
    seen = np.isfinite(p) & np.isfinite(d)
    scale = (p[seen] * mine[seen]).sum() / max(np.square(mine[seen]).sum(), 1e-300)
    left = np.abs(p[seen] - scale * mine[seen])
    if float(np.sqrt(np.square(left).mean())) > _FITS * float(np.sqrt(np.square(p[seen]).mean())):
        return None  # not a plain scaled product: a bias, a soft-cap
    with np.errstate(invalid="ignore"):
        apart: Float64 = (d - p) - scale * (other - mine)
    return apart


_Side = Callable[[int, int | None, str], Float64 | None]
_FITS = 0.02
"""How well prefill's own scores must be a scaled product of its query and keys: a few roundings of bfloat16."""


def _plain_scores(side: _Side, step: int, layer: int | None, shape: tuple[int, ...]) -> Float64 | None:
    q, k = side(step, layer, "q_rope"), side(step, layer, "k_cache")
    if q is None or k is None or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        return None
    scores: Float64 = np.einsum("hd,shd->hs", q[0], np.repeat(k, q.shape[1] // k.shape[1], axis=1))[None]
    return scores if scores.shape == shape else None


def _pooled(tensor: str, variant: _Variant, items: list[_Projection], on: Bench) -> Match | None:
    terms = np.concatenate([item.terms for item in items])
    spread = float(np.sqrt(np.square(terms).sum()))
    if spread == 0.0:
        return None
    total, weight = float(terms.sum()), sum(item.weight for item in items)
    z, share = total / spread, total / weight
    if tensor in _TURNED:  # few pairs turn: in units of the roundings of both sides, which no pair's can exceed
        z = max(z, total / (ROUNDINGS * on.roundoff(items[0].place) * weight**0.5), key=abs)
    moved = abs(share) * (max(item.most for item in items) if tensor in _TURNED else 1.0)
    if abs(z) < MIN_Z or moved < LEAST_SHARE.get(tensor, MIN_SHARE) * _coarsest(items[0].place, on):
        return None
    first = _first_of(items, share).place
    named = _NAMES[tensor](share, first, on)
    if named is None:
        return None
    cause, parameters = named
    if isinstance(variant, str) and variant.startswith(BASE):
        cause, parameters = "rope_base", {"factor": math.exp(share)}
    if isinstance(variant, int):
        cause, parameters = "cache_head_scale", {"head": variant, "factor": 1.0 + share}
    return Match(tensor, first[0], first[1], cause, parameters, share, abs(share / z), z, tuple(i.place for i in items))


def _coarsest(place: Place, on: Bench) -> float:
    """Return the roundoff that a change is held to: a tap kept in float32 comes from a coarser dtype all the same.

    A norm that computes in float32 has one factor for all elements, whose own rounding moves them all one way.
    """
    return max(on.roundoff(place), UNIT_ROUNDOFF[on.facts.dtype])


def _first_of(items: list[_Projection], share: float) -> _Projection:
    """Return the first tap that moves as the pool does, by over two of its own standard errors; else the clearest."""
    own = [(item, float(item.terms.sum())) for item in items]
    clear = [
        (abs(total) / max(float(np.sqrt(np.square(item.terms).sum())), 1e-300), item)
        for item, total in own
        if total * share > 0 and abs(total) > abs(share) * item.weight / 2
    ]
    return next((item for z, item in clear if z > 2), max(clear, key=lambda pair: pair[0])[1] if clear else items[0])


_Named = Callable[[float, Place, Bench], tuple[str, Parameters] | None]
"""The cause that a change along a direction has, with its parameter; None where it has none."""


def _factor(cause: str) -> _Named:
    return lambda share, _place, _on: (cause, {"factor": 1.0 + share})


def _epsilon(share: float, place: Place, on: Bench) -> tuple[str, Parameters] | None:
    """Return the change of epsilon that scales a norm's result by 1 + share: (ms + e)/(1 + share)² − (ms + e).

    None where nothing is left of the result: no epsilon does that.
    """
    if share <= -1.0:
        return None
    given = next((on.reference(*source) for source in sources(place, on.pairs)), None)
    epsilon = on.constant(place[1], f"{place[2]}.eps")
    square = 0.0 if given is None else float(np.square(given).mean())
    size = square + (0.0 if epsilon is None else float(epsilon.reshape(-1)[0]))
    return "norm_epsilon", {"delta": size * ((1.0 + share) ** -2 - 1.0)}


def _scaled(share: float, _place: Place, _on: Bench) -> tuple[str, Parameters]:
    return "projection_scale", {"error": share}


_NORMS = ("attn_norm", "ffn_norm", "q_norm", "k_norm", "final_norm")
_TURNED = ("q_rope", "k_rope")
_ALONE = {"attn_scores", "logits", "mlp_out"} | CACHE_TAPS
"""Tensors of which one tap can tell by itself: no rounding is shared by all its elements."""
_NAMES: dict[str, _Named] = {
    "attn_scores": _factor("score_scale"),
    "k_cache": _factor("cache_scale"),
    "v_cache": _factor("cache_scale"),
    "logits": _factor("logit_scale"),
    "mlp_out": _scaled,
    **dict.fromkeys(_TURNED, _factor("rope_scaling")),
    **dict.fromkeys(_NORMS, _epsilon),
}
"""Tap -> the cause that moves it along its direction."""
