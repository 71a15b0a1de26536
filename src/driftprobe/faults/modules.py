"""Faults of modules: norms, projections, MLP and experts, the residual stream, logits."""

from __future__ import annotations

from driftprobe.faults.base import Fault


def _fault(name: str, breaks: str, tensor: str, layer: int | None, cause: str, family: str,
           strengths: tuple[float, ...] = (1.0,), unit: str = "", side: str = "decode") -> Fault:  # fmt: skip
    return Fault(name, breaks, "MISMATCH", tensor, layer, "computation", cause, family, strengths, unit, side=side)


_EPSILON = (0.01, 1e-3, 1e-4, 1e-5)
_RELATIVE = (0.1, 0.01, 1e-3)

FAULTS: tuple[Fault, ...] = (
    _fault("norm_epsilon", "decode adds to the epsilon of every norm in and behind the layers", "attn_norm", 0,
           "norm_epsilon", "norms", _EPSILON, "added to epsilon"),
    _fault("norm_epsilon_prefill", "prefill adds to the epsilon of every norm in and behind the layers", "attn_norm", 0,
           "norm_epsilon", "norms", _EPSILON, "added to epsilon", "prefill"),
    _fault("norm_offset", "decode's norms multiply by weight where prefill has 1 + weight, or the reverse",
           "attn_norm", 0, "norm_offset", "norms", (1.0, *_RELATIVE), "of the one that is lost or added"),
    _fault("qk_norm_missing", "decode leaves out the norms of query and key heads", "q_norm", 0, "norm_missing",
           "norms"),
    _fault("final_norm_missing", "decode leaves out the final norm", "final_norm", None, "norm_missing", "norms"),
    _fault("bias_missing", "decode leaves out the biases of attention's projections", "q_proj", 0, "bias_missing",
           "projections"),
    _fault("bias_missing_prefill", "prefill leaves out the biases of attention's projections", "q_proj", 0,
           "bias_missing", "projections", side="prefill"),
    _fault("adapter_unmerged", "decode's query weights have an adapter of rank 1 in them, prefill's have not",
           "q_proj", 0, "adapter", "projections", _RELATIVE, "of the weights' norm"),
    _fault("weights_quantised", "decode's attention weights are rounded to a few bits", "q_proj", 0,
           "weights_quantised", "projections", (4.0, 8.0), "bits"),
    _fault("weights_quantised_prefill", "prefill's attention weights are rounded to a few bits", "q_proj", 0,
           "weights_quantised", "projections", (4.0, 8.0), "bits", "prefill"),
    _fault("activation_other", "decode's MLP has another activation", "mlp_out", 0, "activation", "mlp"),
    _fault("activation_tanh", "decode takes GELU's tanh approximation for GELU, or the reverse", "mlp_out", 0,
           "activation", "mlp"),
    _fault("experts_swapped", "decode's experts stand in reverse order", "mlp_out", 0, "expert_order", "mlp"),
    _fault("topk_not_renormalised", "decode does not renormalise the chosen experts' weights, or alone does",
           "mlp_out", 0, "expert_weights", "mlp"),
    _fault("expert_dropped", "decode leaves out the chosen expert of least weight", "mlp_out", 0, "expert_dropped",
           "mlp"),
    _fault("residual_from_norm", "decode takes the residual behind the norm, not before it", "x_mid", 0,
           "residual_source", "residual"),
    _fault("residual_skips_attention", "decode does not add attention's result to the residual", "x_mid", 0,
           "branch_missing", "residual"),
    _fault("embedding_scale_missing", "decode does not scale the embeddings", "x_in", 0, "embedding_scale",
           "residual"),
    _fault("learned_position_plus_one", "decode adds the position embedding of n+1, not n", "x_in", 0,
           "learned_position", "positions"),
    _fault("logit_softcap_missing", "decode leaves out the soft-cap of the logits", "logits", None, "logit_softcap",
           "logits"),
    _fault("logit_scale", "decode scales the logits by a factor too much", "logits", None, "logit_scale", "logits",
           (1.05, 1.01, 1.001), "times the scale"),
    _fault("stale_output_embedding", "decode's output embedding of four tokens is an old one", "logits", None,
           "output_embedding", "logits", (1.0, *_RELATIVE), "of the rows' norm"),
    Fault("length_dependent", "the MLP of a prefill of more than 24 tokens is off by a factor", "MISMATCH", "mlp_out",
          0, "H0", "prefill_length", "prefill", _RELATIVE, "relative", sample=32, side="prefill"),
)  # fmt: skip
