"""The root causes that a diagnosis can name, with their parameters: the vocabulary of the fault dictionary.

A planted fault declares one of these, a diagnosis finds one; both are compared by name and parameters, never by words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Parameter = int | float | str | tuple[int, ...]
Parameters = Mapping[str, Parameter]


@dataclass(frozen=True, slots=True)
class Cause:
    """One root cause."""

    name: str
    family: str
    words: str
    """A sentence with the parameters in braces."""
    parameters: tuple[str, ...] = ()
    tolerance: float = 0.0
    """How far a float parameter may be from the truth, relative, to count as named (integers and words: exactly)."""

    def say(self, parameters: Parameters) -> str:
        """Return the sentence with these parameters filled in."""
        return self.words.format(**{name: _shown(value) for name, value in parameters.items()})


def _shown(value: Parameter) -> str:
    if isinstance(value, tuple):
        return _rows(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _rows(numbers: tuple[int, ...]) -> str:
    if len(numbers) > 2 and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(map(str, numbers[:8])) + ("…" if len(numbers) > 8 else "")


CAUSES: dict[str, Cause] = {
    cause.name: cause
    for cause in (
        Cause("rope_position", "positions", "rotated for position {used}, not {expected}", ("used", "expected")),
        Cause("rope_base", "positions", "rotary base × {factor}", ("factor",), 0.002),
        Cause("rope_pairing", "positions", "rotary pairs taken {pairing}", ("pairing",)),
        Cause("rope_dims", "positions", "only {dims} of the head's dimensions rotated", ("dims",)),
        Cause("rope_scaling", "positions", "rotary positions scaled by {factor}", ("factor",), 0.0005),
        Cause("rope_missing", "positions", "{of} is not rotated", ("of",)),
        Cause("rope_twice", "positions", "{of} is rotated twice", ("of",)),
        Cause("alibi", "positions", "ALiBi distances of the cached keys off by {offset}", ("offset",), 0.02),
        Cause("learned_position", "positions", "position embedding of {used}, not {expected}", ("used", "expected")),
        Cause("cache_shift", "cache contents", "rows stand {offset} slots from where prefill has them", ("offset",)),
        Cause("cache_overwritten", "cache contents", "row {row} was overwritten by the step's own row {source}",
              ("row", "source")),
        Cause("cache_swapped", "cache contents", "rows {rows} stand in each other's place", ("rows",)),
        Cause("cache_blocks", "cache contents", "blocks of {block} rows are in another order: block table", ("block",)),
        Cause("cache_stale", "cache contents", "stale rows, none of this sequence's: {rows}", ("rows",)),
        Cause("cache_zero", "cache contents", "rows {rows} are zero: never written", ("rows",)),
        Cause("cache_duplicated", "cache contents", "row {row} holds row {source} a second time", ("row", "source")),
        Cause("cache_other_layer", "cache contents", "layer {source}'s rows were read", ("source",)),
        Cause("cache_kv_exchanged", "cache contents", "K and V rows are exchanged"),
        Cause("cache_other_sequence", "cache contents", "the rows are another sequence's"),
        Cause("cache_scale", "cache contents", "rows are {factor} × prefill's: quantisation scale", ("factor",), 0.01),
        Cause("cache_head_scale", "cache contents", "rows of KV head {head} are {factor} × prefill's",
              ("head", "factor"), 0.01),
        Cause("cache_unrotated", "cache contents", "rows stand in the cache as they were before rotation"),
        Cause("cache_axes", "cache contents", "head and dimension axes of the rows are exchanged"),
        Cause("keys_masked", "cache extent", "keys {keys} are not seen", ("keys",)),
        Cause("keys_extra", "cache extent", "{count} key rows too many are seen", ("count",)),
        Cause("head_map", "heads", "query heads read KV heads {heads}", ("heads",)),
        Cause("head_order", "heads", "heads stand in another order: {heads}", ("heads",)),
        Cause("head_zero", "heads", "head {head} is zero", ("head",)),
        Cause("score_scale", "scores", "softmax scale × {factor}", ("factor",), 0.0002),
        Cause("score_softcap", "scores", "soft-cap of the scores missing"),
        Cause("sinks_lost", "scores", "the learned sinks are left out of the softmax"),
        Cause("mask_leak", "scores", "masked keys take part with weight: mask value {value}", ("value",), 0.1),
        Cause("norm_epsilon", "norms", "epsilon off by {delta}", ("delta",), 0.05),
        Cause("norm_missing", "norms", "the norm is left out"),
        Cause("norm_offset", "norms", "weight off by {offset}", ("offset",), 0.02),
        Cause("bias_missing", "projections", "the bias is left out"),
        Cause("adapter", "projections", "other weights: a change of rank {rank}, as far as the steps show", ("rank",)),
        Cause("bias_other", "projections", "another bias: one vector everywhere, of {error} of the result's size",
              ("error",), 0.02),
        Cause("outputs_other", "projections", "outputs {outputs} alone are others", ("outputs",)),
        Cause("weights_other", "projections", "other weights: each off by a relative {error} in the root mean square",
              ("error",), 0.3),
        Cause("projection_scale", "projections", "the result is off by {error} times itself", ("error",), 0.02),
        Cause("weights_quantised", "projections", "weights rounded to {bits} bits", ("bits",)),
        Cause("activation", "mlp", "activation {name}", ("name",)),
        Cause("expert_order", "mlp", "chosen experts {chosen}, computed with {used}", ("chosen", "used")),
        Cause("expert_weights", "mlp", "expert weights × {factor}: renormalised in one phase only", ("factor",), 0.01),
        Cause("expert_dropped", "mlp", "expert {expert} left out", ("expert",)),
        Cause("residual_source", "residual", "the residual is taken from {source}", ("source",)),
        Cause("branch_missing", "residual", "{branch} is not added to the residual", ("branch",)),
        Cause("embedding_scale", "residual", "embeddings scaled by {factor}", ("factor",), 0.01),
        Cause("logit_softcap", "logits", "soft-cap of the logits missing"),
        Cause("logit_scale", "logits", "logits × {factor}", ("factor",), 0.01),
        Cause("output_embedding", "logits", "output embedding of tokens {tokens} is another (stale)", ("tokens",)),
        Cause("conv_window", "state-space", "convolution state lacks its {lost} oldest inputs", ("lost",)),
        Cause("state_lost", "state-space", "the recurrent state was not carried over"),
        Cause("state_scaled", "state-space", "the recurrent state was carried over × {factor}", ("factor",), 0.01),
        Cause("prefill_length", "prefill", "prefill itself changes with its length"),
        Cause("precision", "precision", "rounded more coarsely than declared, as {dtype} would", ("dtype",)),
        Cause("tie_flip", "ties", "a near tie between experts that rounding flips"),
    )
}  # fmt: skip
"""By name. `parameters` are what a diagnosis must get right beside the name."""


def agree(cause: str, expected: Parameters, found: Parameters) -> bool:
    """Whether found parameters are the expected ones: every expected one present, and within the cause's tolerance.

    What is found beside them does not count, but for `calls`: said of a fault that has no such bound, it is wrong.
    """
    if found.get("calls") != expected.get("calls"):
        return False
    tolerance = CAUSES[cause].tolerance
    return all(name in found and _close(value, found[name], tolerance) for name, value in expected.items())


def _close(expected: Parameter, found: Parameter, tolerance: float) -> bool:
    if isinstance(expected, float) and isinstance(found, int | float):
        return abs(found - expected) <= tolerance * abs(expected)
    return expected == found
