"""The taps: the named points of a forward pass, in execution order, and the op that feeds each.

The names are the contract between engines and judgement. An engine maps its own names to these; a tap that it
lacks is absent, not invented. Axes legend: T tokens, C channels, H query heads, G key/value heads, D head
dimension, S visible cache rows, V vocabulary, X experts, W width of a convolution's window, N state dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Scope(Enum):
    """Where in the model a tap stands; the order of the members is the order of execution."""

    INPUT = 0
    LAYER = 1
    OUTPUT = 2


@dataclass(frozen=True, slots=True)
class Tap:
    """One named point of the forward pass."""

    name: str
    scope: Scope
    axes: str
    """Axes of the recorded tensor, in order; see the module's legend."""
    op: str
    """The operation whose result this is, in a reader's words."""
    inputs: tuple[str, ...] = ()
    """The taps that this op reads; `x_out` of the layer before is `x_in` of this one."""
    suspect: str = ""
    """Where to look when this tap fails first while its inputs agree."""


TAPS: tuple[Tap, ...] = (
    Tap("embed", Scope.INPUT, "TC", "token embedding lookup", (), "token ids, embedding table"),
    Tap(
        "x_in",
        Scope.LAYER,
        "TC",
        "residual stream into the layer",
        ("embed",),
        "learned position embedding, embedding scale",
    ),
    Tap("attn_norm", Scope.LAYER, "TC", "norm before attention", ("x_in",), "norm epsilon, weight offset, cast"),
    Tap("q_proj", Scope.LAYER, "THD", "query projection", ("attn_norm",), "weights, bias, adapter, quantisation"),
    Tap("k_proj", Scope.LAYER, "TGD", "key projection", ("attn_norm",), "weights, bias, adapter, quantisation"),
    Tap("v_proj", Scope.LAYER, "TGD", "value projection", ("attn_norm",), "weights, bias, adapter, quantisation"),
    Tap("q_norm", Scope.LAYER, "THD", "norm of the query heads", ("q_proj",), "q norm missing, epsilon"),
    Tap("k_norm", Scope.LAYER, "TGD", "norm of the key heads", ("k_proj",), "k norm missing, epsilon"),
    Tap(
        "q_rope",
        Scope.LAYER,
        "THD",
        "rotary embedding of the query",
        ("q_norm", "q_proj"),
        "position of q, RoPE base, scaling, pairing of dimensions",
    ),
    Tap(
        "k_rope",
        Scope.LAYER,
        "TGD",
        "rotary embedding of the new key",
        ("k_norm", "k_proj"),
        "position of k, RoPE base, scaling, pairing of dimensions",
    ),
    Tap(
        "k_cache",
        Scope.LAYER,
        "SGD",
        "key rows that this step sees",
        ("k_rope",),
        "cache slot, layer index, block table, stale rows, cache dtype",
    ),
    Tap(
        "v_cache",
        Scope.LAYER,
        "SGD",
        "value rows that this step sees",
        ("v_proj",),
        "cache slot, layer index, block table, stale rows, cache dtype",
    ),
    Tap(
        "attn_scores",
        Scope.LAYER,
        "THS",
        "scaled and masked scores before the softmax",
        ("q_rope", "k_cache"),
        "softmax scale, mask, soft-cap, head mapping (GQA)",
    ),
    Tap("attn_probs", Scope.LAYER, "THS", "softmax", ("attn_scores",), "softmax, its dtype, sinks"),
    Tap(
        "attn_ctx",
        Scope.LAYER,
        "THD",
        "weighted sum of the values",
        ("attn_probs", "v_cache"),
        "head mapping (GQA), value rows, kernel",
    ),
    Tap("attn_out", Scope.LAYER, "TC", "output projection", ("attn_ctx",), "weights, bias, head order"),
    Tap(
        "conv_state",
        Scope.LAYER,
        "CW",
        "convolution state that this token leaves",
        ("attn_norm",),
        "convolution window, state carry",
    ),
    Tap(
        "ssm_state",
        Scope.LAYER,
        "HDN",
        "recurrent state that this token leaves",
        ("attn_norm",),
        "state not carried, scan",
    ),
    Tap(
        "mixer_out",
        Scope.LAYER,
        "TC",
        "state-space, convolution or linear-attention mixer",
        ("attn_norm",),
        "scan, state",
    ),
    Tap("x_mid", Scope.LAYER, "TC", "residual after attention", ("x_in", "attn_out", "mixer_out"), "residual source"),
    Tap("ffn_norm", Scope.LAYER, "TC", "norm before the MLP", ("x_mid",), "norm epsilon, weight offset, cast"),
    Tap("router_logits", Scope.LAYER, "TX", "expert router", ("ffn_norm",), "router weights"),
    Tap("expert_ids", Scope.LAYER, "TX", "choice of experts", ("router_logits",), "top-k, tie between experts"),
    Tap(
        "mlp_out",
        Scope.LAYER,
        "TC",
        "MLP or experts",
        ("ffn_norm", "expert_ids"),
        "activation, expert order, expert weights",
    ),
    Tap(
        "x_out",
        Scope.LAYER,
        "TC",
        "residual stream out of the layer",
        ("x_mid", "mlp_out", "mixer_out"),
        "residual source",
    ),
    Tap("final_norm", Scope.OUTPUT, "TC", "final norm", ("x_out",), "norm epsilon, weight offset"),
    Tap("logits", Scope.OUTPUT, "TV", "output head", ("final_norm",), "tied weights, soft-cap, logit scale"),
)

BY_NAME: dict[str, Tap] = {tap.name: tap for tap in TAPS}
_RANK: dict[str, int] = {tap.name: rank for rank, tap in enumerate(TAPS)}
CACHE_TAPS: frozenset[str] = frozenset({"k_cache", "v_cache"})
"""Taps that hold one row a position, hashed row by row."""
SCORE_TAPS: frozenset[str] = frozenset({"attn_scores", "attn_probs"})
"""Taps that a fused kernel hides: they are computed once more, where a plan asks for them."""
STATE_TAPS: frozenset[str] = frozenset({"conv_state", "ssm_state"})
"""Taps that hold what a call leaves behind for the next: there are none for a position before the call's last, so the
longer prefills E have none."""

PATHS = "paths"
"""The mode in which two callables run one model as they please."""
REFERENCE, CANDIDATE = "reference", "candidate"
"""Its phases: two ways to run a model that their user claims to be equal."""
ExecutionOrder = tuple[int, int, int, str]


def execution_order(layer: int | None, tensor: str, rank: int | None = None) -> ExecutionOrder:
    """Return the sort key of a tap: scope, layer, op. Unknown names come last in their layer, by name.

    `rank` is the place that a run has measured (`Record.order`); where it is known, names do not count.
    """
    if rank is not None:
        return (0, rank, 0, tensor)
    tap = BY_NAME.get(tensor)
    if tap is None:
        return (Scope.LAYER.value if layer is not None else Scope.OUTPUT.value, layer or 0, len(TAPS), tensor)
    return (tap.scope.value, layer or 0, _RANK[tensor], tensor)


def place(layer: int | None, tensor: str) -> str:
    """Return the place of a tap in words: `layer 3 q_rope`, or `logits` for one outside the layers."""
    return tensor if layer is None else f"layer {layer} {tensor}"


def input_of(tensor: str) -> str:
    """Return the name of the tap of what a module was given, from that of what it gave; `#2` is its second run."""
    name, mark, time = tensor.partition("#")
    return f"{name}.in{mark}{time}"


LINEAR_INPUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("attn_norm", "x_in")),
    "attn_out": ("attn_ctx",),
    "router_logits": ("ffn_norm", "x_mid", "attn_norm"),
    "logits": ("final_norm",),
}
"""The taps that may stand before a matrix product, the likeliest first."""


def linear_taps(tensor: str) -> tuple[str, ...]:
    """Return the taps that may hold what a projection was given: its own input where that is a tap."""
    return (input_of(tensor), *LINEAR_INPUTS.get(tensor, ()))
