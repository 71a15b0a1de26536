"""The Hugging Face engine: runs arms on a transformers causal language model and hands out its taps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from driftprobe.engines.base import Tapped
from driftprobe.engines.hf.anatomy import dissect, text_config
from driftprobe.engines.hf.cache import new_cache, stored_rows, updates_heard
from driftprobe.engines.hf.noise import rounding_noise
from driftprobe.engines.hf.planting import plant
from driftprobe.engines.hf.spy import Heard, Place, Rows, Spy
from driftprobe.errors import EngineError, ModelError
from driftprobe.fingerprint import DTYPES, Array
from driftprobe.plan import Arm, Pass, Phase, Read
from driftprobe.taps import BY_NAME, execution_order
from driftprobe.trace import EngineFacts, Event

_TRIAL_TOKENS = 2
NO_LIMIT = 1 << 20
"""Positions allowed where a model states no limit of its own (ALiBi, state-space)."""


class HFEngine:
    """A transformers causal language model, run one sequence at a time.

    `model` is any causal language model of transformers 4.40 or later, in evaluation mode while it is run; its code,
    weights and attention kernel stay as they are.
    """

    perturbs = True

    def __init__(self, model: Any, tokenizer: Any = None, *, label: str = "") -> None:
        self.model, self.tokenizer = model, tokenizer
        self.anatomy = dissect(model)
        self._label = label or type(model).__name__
        self._kept: dict[int, dict[int, Rows]] = {}
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.taps = self._trial()

    @property
    def facts(self) -> EngineFacts:
        """What is known of this model; see EngineFacts."""
        import transformers

        config = text_config(self.model)
        return EngineFacts(
            name="hf",
            version=f"transformers {transformers.__version__}, torch {torch.__version__}",
            model=self._label,
            dtype=str(self.model.dtype).removeprefix("torch."),
            casts=_casts(self.model),
            attention=str(getattr(config, "_attn_implementation", None) or "eager"),
            layers=len(self.anatomy.layers),
            heads=self.anatomy.heads,
            kv_heads=self.anatomy.kv_heads,
            vocabulary=int(getattr(config, "vocab_size", 0) or 0),
            max_positions=int(getattr(config, "max_position_embeddings", 0) or NO_LIMIT),
            device=str(self.model.device),
        )

    def tokenize(self, text: str) -> list[int]:
        """Return the text's token ids. Raises ModelError where the model came without a tokenizer."""
        if self.tokenizer is None:
            raise ModelError(
                "tokenizer missing", where=self._label, measured="no tokenizer files beside the model",
                allowed="tokenizer.json or its like, or prompts given as token ids",
                next_step="copy the tokenizer into the model folder, or use --prompt-file with lists of token ids",
            )  # fmt: skip
        return [int(i) for i in self.tokenizer(text)["input_ids"]]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, or an empty string without a tokenizer."""
        return "" if self.tokenizer is None else str(self.tokenizer.decode(list(token_ids)))

    def greedy(self, token_ids: Sequence[int], steps: int) -> list[int]:
        """Return the model's own next tokens from a cached run (smallest id where logits tie)."""
        with self._evaluating():
            cache, chosen = new_cache(self.model), list(token_ids)
            output = self._forward(chosen, 0, cache)
            for step in range(steps):
                chosen.append(int(torch.nan_to_num(output.logits[0, -1]).argmax()))
                if step + 1 < steps:
                    output = self._forward(chosen[-1:], len(chosen) - 1, cache)
        return chosen[len(token_ids) :]

    def run(self, arm: Arm, token_ids: Sequence[int], layers: frozenset[int]) -> Iterator[Tapped | Event]:
        """Run one arm on a fresh cache; see Engine.run."""
        spy = Spy(self.anatomy, layers)
        with self._evaluating(), self._noise(arm), spy.installed():
            cache = new_cache(self.model)
            for call in arm.passes:
                if call.aligned_to is not None:
                    yield self._align(arm, call, cache)
                listens = bool(call.reads) or arm.keeps_rows_for is not None
                heard = self._listen(spy, call, token_ids, cache) if listens else None
                if heard is None:
                    self._forward(token_ids[call.start : call.stop], call.start, cache)
                    continue
                if arm.keeps_rows_for is not None:
                    self._kept[arm.keeps_rows_for] = heard.cache
                yield from _hand_out(heard, call.reads, self.anatomy.layers)

    def plant(self, fault: str) -> AbstractContextManager[None]:
        """Plant a fault in this model while the context lasts; see planting.py."""
        return plant(fault, self.model, self.anatomy)

    def _listen(self, spy: Spy, call: Pass, token_ids: Sequence[int], cache: Any) -> Heard:
        wanted = tuple(read.position - call.start for read in call.reads)
        heard = Heard(wanted, call.start, call.stop - call.start)
        spy.heard = heard
        with updates_heard(cache, spy):
            output = self._forward(token_ids[call.start : call.stop], call.start, cache)
        spy.take(None, "logits", output.logits)
        spy.heard = None
        return heard

    def _forward(self, token_ids: Sequence[int], start: int, cache: Any) -> Any:
        device = self.model.device
        arguments: dict[str, Any] = {"input_ids": torch.tensor([list(token_ids)], device=device)}
        if self._takes_positions:
            arguments["position_ids"] = torch.arange(start, start + len(token_ids), device=device)[None]
        try:
            return self.model(**arguments, past_key_values=cache, use_cache=True)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise EngineError(
                "the model failed while it ran", where=f"{self._label}, tokens {start} to {start + len(token_ids) - 1}",
                measured=f"{type(error).__name__}: {error}", allowed="a forward call with a cache",
                next_step="try --attn eager or another --dtype; run the model alone to see whether it works there",
            ) from error  # fmt: skip

    def _align(self, arm: Arm, call: Pass, cache: Any) -> Event:
        """Replace cache rows [0, call.start) by P's, then read every layer back and count what differs."""
        assert call.aligned_to is not None
        kept, different, rows = self._kept[call.aligned_to], 0, 0
        for layer, source in kept.items():
            for stored, wanted in zip(stored_rows(cache, layer), (source.keys_GSD, source.values_GSD), strict=True):
                aligned = wanted[:, : call.start][:, -stored.shape[2] :]
                stored[0].copy_(aligned)
                back = stored_rows(cache, layer)[0 if wanted is source.keys_GSD else 1][0]
                different += int((back != aligned).any(dim=-1).any(dim=0).sum())
                rows += aligned.shape[1]
        return Event(
            event="cache_readback", arm=arm.name, step=call.aligned_to, measured={"rows": rows, "different": different}
        )

    def _trial(self) -> dict[str, tuple[int, ...]]:
        """Run a few tokens and one decode step, and return the taps that fired in both and fit their place."""
        limit = self.facts.vocabulary or 1
        tokens = [1 % limit] * (_TRIAL_TOKENS + 1)
        spy = Spy(self.anatomy)
        with self._evaluating(), spy.installed():
            cache = new_cache(self.model)
            read = Read("P", Phase.PREFILL_LAST, 0, _TRIAL_TOKENS - 1)
            prefill = self._listen(spy, Pass(0, _TRIAL_TOKENS, (read,)), tokens, cache)
            read = Read("D", Phase.DECODE, 0, _TRIAL_TOKENS)
            decode = self._listen(spy, Pass(_TRIAL_TOKENS, _TRIAL_TOKENS + 1, (read,)), tokens, cache)
        found: dict[str, list[int]] = {}
        for layer, tensor in sorted(prefill.taps.keys() & decode.taps.keys(), key=lambda p: execution_order(*p)):
            if tensor in BY_NAME and _fits((layer, tensor), prefill) and _fits((layer, tensor), decode):
                found.setdefault(tensor, []).extend([] if layer is None else [layer])
        return {tensor: tuple(where) for tensor, where in found.items()}

    def _noise(self, arm: Arm) -> AbstractContextManager[None]:
        if arm.noise_seed is None:
            return nullcontext()
        return rounding_noise(self.model, arm.noise_seed, _casts(self.model))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)


def to_array(tensor: torch.Tensor) -> Array:
    """Return a tensor as a NumPy array on the host, in its own dtype (bfloat16 and float8 through ml_dtypes)."""
    host = tensor.detach().cpu().contiguous()
    name = str(host.dtype).removeprefix("torch.")
    if name.startswith(("bfloat16", "float8")):
        width = torch.int16 if name == "bfloat16" else torch.uint8
        return host.view(width).numpy().view(DTYPES[name])
    array: Array = host.numpy()
    return array


def _hand_out(heard: Heard, reads: Sequence[Read], layers: Sequence[Any]) -> Iterator[Tapped]:
    for which, read in enumerate(reads):
        for place in sorted(heard.taps, key=lambda p: execution_order(*p)):
            layer, tensor = place
            if tensor in BY_NAME:
                yield Tapped(
                    read=read,
                    layer=layer,
                    tensor=tensor,
                    array=to_array(heard.taps[place][which]),
                    pos_id=read.position,
                    row_start=heard.row_start.get(place, [0] * len(reads))[which],
                    source="recomputed" if place in heard.recomputed else "captured",
                )


def _fits(place: Place, heard: Heard) -> bool:
    """Whether a tap found by its module's name stands where the tap's definition says."""
    layer, tensor = place
    same = {
        "attn_norm": "_attention_in",  # the norm must feed attention
        "ffn_norm": "_mlp_in",  # and this one the MLP
    }.get(tensor)
    if same is not None:
        return heard.identity.get(place) == heard.identity.get((layer, same))
    if tensor == "x_mid":  # a parallel block has no stream between attention and MLP
        return heard.identity.get(place) != heard.identity.get((layer, "x_in")) and _fits((layer, "ffn_norm"), heard)
    return True


def _casts(model: Any) -> dict[str, str]:
    """Return the casts coarser than the model's dtype that this process has switched on for float32 matmuls."""
    if model.dtype != torch.float32:
        return {}
    if model.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return {"matmul": "tfloat32"}
    precision = torch.get_float32_matmul_precision()
    return {} if precision == "highest" else {"matmul": "tfloat32" if precision == "high" else "bfloat16"}
