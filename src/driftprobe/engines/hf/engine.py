"""The Hugging Face engine: runs arms on a transformers causal language model and hands out its taps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from driftprobe.engines.base import Ahead, Constant, Handed, Tapped
from driftprobe.engines.hf.anatomy import dissect, text_config
from driftprobe.engines.hf.attention import sliding_window
from driftprobe.engines.hf.cache import (
    TupleCache,
    appends,
    filled,
    layer_count,
    new_cache,
    row_layers,
    rows_heard,
    stored_rows,
)
from driftprobe.engines.hf.constants import constants_of
from driftprobe.engines.hf.fused import same_bits
from driftprobe.engines.hf.handing import HandOut
from driftprobe.engines.hf.heard import Heard, Learned, Place, Rows
from driftprobe.engines.hf.host import transfer_for
from driftprobe.engines.hf.lifting import RUNG, Narrowings, lifted
from driftprobe.engines.hf.noise import rounding_noise, with_cast_noise
from driftprobe.engines.hf.planting import Site, cannot_act, plant
from driftprobe.engines.hf.routing import Kept, Routing
from driftprobe.engines.hf.spy import Spy
from driftprobe.engines.hf.states import States, stored_states
from driftprobe.engines.hf.switches import max_positions, switches_of
from driftprobe.engines.hf.trial import learn, taps_of, trial_length
from driftprobe.engines.hf.weights import weights_of
from driftprobe.errors import EngineError, ModelError, UsageError
from driftprobe.faults import Expected, find_fault
from driftprobe.plan import ARMS, Arm, Pass, Phase, Plan, Read
from driftprobe.trace import EngineFacts, Event

_SAMPLE = 6
"""Tokens of the run that shows whether a planted fault changes anything."""
_WIDE_DEVICES = ("cpu", "cuda", "xpu")
"""Devices that compute in float64."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class HFEngine:
    """A transformers causal language model, run one sequence at a time.

    `model` is any causal language model of transformers 4.40 or later, in evaluation mode while it is run; its code,
    weights and attention kernel stay as they are. `casts` declares coarser dtypes that the model's own code puts on the
    path, by tap or by another word: `{"k_cache": "int8", "v_cache": "int8"}` for a quantised cache; see EngineFacts.
    """

    perturbs = True
    alike_in_modes = True
    arms = ARMS

    def __init__(
        self, model: Any, tokenizer: Any = None, *, label: str = "", casts: Mapping[str, str] | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.anatomy = dissect(model)
        self._declared = dict(casts or {})
        self._label = label or f"object:{type(model).__name__}"
        self._kept: dict[int, dict[int, Rows]] = {}
        self._routed: dict[int, Kept] = {}
        self._states: dict[int, dict[int, States]] = {}
        """Count of tokens that were prefilled -> layer -> the states that the last of them left."""
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._past = "cache_params" if "cache_params" in parameters else "past_key_values"
        self._returns_dict = "return_dict" in parameters
        self._learned = Learned()
        self._scores, self._planted = True, False
        self._ahead: Ahead | None = None
        self._makes_tuples = self._hands_back_tuples()
        self._sample_length = _SAMPLE  # longer while a planted fault needs more tokens to act on
        self._inner_cast = self._casts_inside()
        self._promised: set[Place] = set()
        self.taps = self._trial()
        self._promised = {(layer, tensor) for tensor, where in self.taps.items() for layer in where or (None,)}
        self.knobs: tuple[str, ...] = tuple(self._turnable())

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
            casts=self._casts,
            accumulate=_accumulates(self.model),
            attention=str(getattr(config, "_attn_implementation", None) or "eager"),
            layers=len(self.anatomy.layers),
            heads=self.anatomy.heads,
            kv_heads=self.anatomy.kv_heads,
            vocabulary=self._vocabulary,
            max_positions=max_positions(config),
            switches=switches_of(self.model, self.anatomy),
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
            cache, chosen = self._cache(), list(token_ids)
            output = self._forward(chosen, 0, cache)
            for step in range(steps):
                chosen.append(int(torch.nan_to_num(output.logits[0, -1]).argmax()))
                if step + 1 < steps:
                    output = self._forward(chosen[-1:], len(chosen) - 1, cache)
        return chosen[len(token_ids) :]

    def begin(self, plan: Plan, ahead: Ahead | None = None) -> None:
        """See Engine.begin: whether scores are wanted, and who takes tensors ahead; every arm says the rest."""
        self._scores, self._ahead = plan.scores, ahead

    def said(self) -> list[str]:
        """See Engine.said: transformers prints nothing that a log needs."""
        return []

    def run(self, arm: Arm, token_ids: Sequence[int], layers: frozenset[int]) -> Iterator[Handed]:
        """Run one arm on a fresh cache; see Engine.run."""
        spy = Spy(self.anatomy, self._learned, layers, scores=self._scores)
        aligned = any(call.aligned_to is not None for call in arm.passes)
        routing = Routing(self.anatomy.layers)
        with self._evaluating(), self._noise(arm), _threads(arm), spy.installed(), routing.installed():
            cache = self._cache()
            if arm.noise_seed is not None:
                with_cast_noise(cache, arm.noise_seed, self._declared)
            for call in arm.passes:
                if arm.keeps_rows_for is not None:
                    routing.keeps = self._routed.setdefault(arm.keeps_rows_for, {})
                if call.routed_to is not None:
                    routing.forces = (self._routed[call.routed_to], call.start, call.stop)
                if call.aligned_to is not None:
                    yield self._align(arm, call, cache)
                aligns = call.start == 0 and aligned
                if not (call.reads or arm.keeps_rows_for is not None or aligns):
                    self._forward(token_ids[call.start : call.stop], call.start, cache, beside=arm.batch)
                    continue
                lends = not self._planted and arm.noise_seed is None
                lent = {"shared": not aligned, "lends": lends, "beside": arm.batch}
                out = self._listen(spy, call, token_ids, cache, **lent)
                heard = out.heard
                if arm.keeps_rows_for is not None:
                    self._kept[arm.keeps_rows_for] = heard.cache
                if arm.keeps_rows_for is not None or aligns:
                    self._states[call.stop] = heard.states
                yield from out.items()

    def constants(self, layers: frozenset[int]) -> Iterator[Constant]:
        """Return the model's small constants; see Engine.constants."""
        with self._evaluating():
            yield from constants_of(self.model, self.anatomy, self._learned, layers)

    def weights(self, layer: int | None, tensor: str) -> Iterator[Constant]:
        """Return the matrices of the op behind a tap; see Engine.weights."""
        yield from weights_of(self.model, self.anatomy, self._learned, layer, tensor)

    @property
    def rungs(self) -> tuple[str, ...]:
        """`float64`, where all of the model's weights are floats and its device computes in float64."""
        weights = (parameter.dtype for parameter in self.model.parameters())
        wide = self.model.device.type in _WIDE_DEVICES and all(dtype in _FLOATS for dtype in weights)
        return (RUNG,) if wide else ()

    @property
    def parameters(self) -> int:
        """How many numbers the model's parameters hold; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @contextmanager
    def at(self, rung: str) -> Iterator[None]:
        """Run at a rung of the ladder while the context lasts; see Engine.at and lifting."""
        if rung not in self.rungs:
            raise UsageError(
                "no such rung of the precision ladder", where=self._label, measured=rung,
                allowed=", ".join(self.rungs) or "none: this device or these weights know no float64",
                next_step="run with --ladder off",
            )  # fmt: skip
        before = self._inner_cast
        with lifted(self.model):
            try:
                self._inner_cast = self._casts_inside()
                yield
            finally:
                self._inner_cast = before

    @contextmanager
    def plant(self, fault: str, strength: float | None = None) -> Iterator[Expected]:
        """Plant a fault in this model while the context lasts and say what must be found; see planting.

        Raises UsageError where the fault is unknown, cannot act in this model, or changes nothing in a sample run.
        """
        declared = find_fault(fault)
        windows = [sliding_window(layer.attention, layer.index) or 0 for layer in self.anatomy.layers]
        length = max(declared.sample, declared.min_prompt + 1, *(w + 2 for w in windows if declared.beyond_window))
        clean, self._sample_length = self._sample(length), length
        site = Site(self.model, self.anatomy, self.taps, latent=bool(self._learned.expanded))
        with plant(fault, site, strength) as expected:
            try:
                changed = self._sample(length)
            except EngineError as error:
                raise cannot_act(fault, error.measured, "a model that runs with the fault in it") from error
            if all(map(same_bits, clean, changed)):
                raise cannot_act(fault, "not one bit of cache or logits changes in a short run of this model",
                                 "a model that computes what the fault breaks")  # fmt: skip
            self._planted = True  # it may write into a cache whose rows were handed out
            knobs, self.knobs = self.knobs, tuple(knob for knob in self.knobs if knob != "batch")
            try:
                yield expected
            finally:
                self._planted, self._sample_length, self.knobs = False, _SAMPLE, knobs

    def _sample(self, length: int = _SAMPLE) -> list[torch.Tensor]:
        """Return the logits of one decode step after a short prefill, and the cache rows and states that it leaves."""
        tokens = self._some_tokens(length)
        with self._evaluating():
            cache = self._cache()
            self._forward(tokens[:-1], 0, cache)
            logits = self._forward(tokens[-1:], length - 1, cache).logits
        rows = [rows for layer in row_layers(cache) for rows in stored_rows(cache, layer)]
        return [logits, *rows, *(s for layer in range(layer_count(cache)) for s in stored_states(cache, layer).all)]

    def _listen(
        self, spy: Spy, call: Pass, token_ids: Sequence[int], cache: Any, *, shared: bool = False, lends: bool = False,
        beside: bool = False,
    ) -> HandOut:  # fmt: skip
        """Run one call and listen; nobody will write into the cache (`shared`), or into what fires (`lends`).

        `beside` puts another sequence into the batch.
        """
        wanted = tuple(read.position - call.start for read in call.reads)
        heard = Heard(
            wanted,
            call.start,
            call.stop - call.start,
            1 + beside,
            past=cache,
            lends=lends and call.stop - call.start == 1,
        )
        if shared and not self._planted:
            heard.shares = partial(appends, cache)
        out = HandOut(heard, call.reads, self._ahead, transfer_for(self.model.device), self._promised)
        heard.layer_done = out.layer if out.ahead is not None else None
        with spy.listening(heard), rows_heard(self.model, cache, spy, heard):
            output = self._forward(token_ids[call.start : call.stop], call.start, cache, beside=beside)
            spy.take((None, "logits"), output.logits)
        spy.finish(heard)
        out.ends()
        heard.layer_done = None  # else the two would hold each other, and all that was heard, until a collection
        return out

    def _forward(self, token_ids: Sequence[int], start: int, cache: Any, *, beside: bool = False) -> Any:
        device = self.model.device
        rows = [list(token_ids)]
        if beside:  # other tokens, so that rows of the batch that are mixed up show
            rows.append(rows[0][::-1])
        arguments: dict[str, Any] = {"input_ids": torch.tensor(rows, device=device)}
        if self._takes_positions:
            positions = torch.arange(start, start + len(token_ids), device=device)
            arguments["position_ids"] = positions[None].expand(len(rows), -1)
        if self._returns_dict:
            arguments["return_dict"] = True
        past = cache.value if isinstance(cache, TupleCache) else cache
        try:
            output = self.model(**arguments, **{self._past: past}, use_cache=True)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise EngineError(
                "the model failed while it ran", where=f"{self._label}, tokens {start} to {start + len(token_ids) - 1}",
                measured=f"{type(error).__name__}: {error}", allowed="a forward call with a cache",
                next_step="try --attn eager or another --dtype (experts in float64 need a model object with "
                "config._experts_implementation = 'eager'); run the model alone to see whether it works there",
            ) from error  # fmt: skip
        if isinstance(cache, TupleCache):
            cache.value = output.past_key_values
        return output

    def _align(self, arm: Arm, call: Pass, cache: Any) -> Event:
        """Replace cache rows [0, call.start) by P's, then read every layer back and count what differs.

        States are replaced by those that a prefill of tokens [0, call.start) left: a prefill of one token more, as P,
        has rows for the tokens before it but no states.
        """
        assert call.aligned_to is not None
        kept, different, rows = self._kept[call.aligned_to], 0, 0
        for layer, source in kept.items():
            for stored, wanted in zip(stored_rows(cache, layer), (source.keys_GSD, source.values_GSD), strict=True):
                aligned = wanted[:, : call.start][:, -stored.shape[2] :]
                stored[0, :, : aligned.shape[1]].copy_(aligned)  # a cache of fixed size has room behind them
                back = stored_rows(cache, layer)[0 if wanted is source.keys_GSD else 1][0][:, : aligned.shape[1]]
                different += int(_differing(back, aligned).any(dim=-1).any(dim=0).sum())
                rows += aligned.shape[1]
        states, unlike = self._align_states(call.start, cache)
        measured = {"rows": rows, "different": different + unlike} | ({"states": states} if states else {})
        return Event(event="cache_readback", arm=arm.name, step=call.aligned_to, measured=measured)

    def _align_states(self, tokens: int, cache: Any) -> tuple[int, int]:
        """Replace states by those that a prefill of so many tokens left; return how many, and how many differ after."""
        count = different = 0
        for layer, kept in self._states.get(tokens, {}).items():
            for stored, wanted in zip(stored_states(cache, layer).all, kept.all, strict=True):
                stored.copy_(wanted)
            for back, wanted in zip(stored_states(cache, layer).all, kept.all, strict=True):
                count, different = count + 1, different + (not same_bits(back, wanted))
        return count, different

    def _trial(self) -> dict[str, tuple[int, ...]]:
        """Run a few tokens and one decode step, and return the taps that fired in both and fit their place."""
        length = trial_length(self.anatomy)
        tokens = self._some_tokens(length + 1)
        prefill = Pass(0, length, (Read("P", Phase.PREFILL_LAST, 0, length - 1),))
        decode = Pass(length, length + 1, (Read("D", Phase.DECODE, 0, length),))
        with self._evaluating():
            spy = Spy(self.anatomy, self._learned, trial=True)
            with spy.installed():
                learn(self._listen(spy, prefill, tokens, self._cache()).heard, self.anatomy, self._learned)
            spy = Spy(self.anatomy, self._learned, trial=True)
            with spy.installed():
                cache = self._cache()
                return taps_of([self._listen(spy, call, tokens, cache).heard for call in (prefill, decode)])

    def _turnable(self) -> Iterator[str]:
        """Yield the knobs that this model lets us turn.

        Mixers with a state are not promised to take several tokens on a filled cache.
        """
        if self.model.device.type == "cpu":
            yield "threads"
        if "ssm_state" not in self.taps and "conv_state" not in self.taps:
            yield "chunks"
        if self._hears_a_batch():
            yield "batch"

    def _hears_a_batch(self) -> bool:
        """Whether of a batch of two the same taps are heard, in the same shapes, as of one sequence.

        Some models fold the batch into heads or tokens; their own rows could not be told from the others'.
        """
        length = trial_length(self.anatomy)
        tokens = self._some_tokens(length + 1)
        calls = (Pass(0, length, (Read("P", Phase.PREFILL_LAST, 0, length - 1),)),
                 Pass(length, length + 1, (Read("D", Phase.DECODE, 0, length),)))  # fmt: skip
        seen = []
        for beside in (False, True):
            spy, cache = Spy(self.anatomy, self._learned), self._cache()
            try:
                with self._evaluating(), spy.installed():
                    items = [item for call in calls
                             for item in self._listen(spy, call, tokens, cache, beside=beside).items()]  # fmt: skip
            except EngineError:
                return False
            seen.append([(item.layer, item.tensor, item.array.shape) for item in items if isinstance(item, Tapped)])
        return seen[0] == seen[1]

    def _some_tokens(self, count: int) -> list[int]:
        return [1 + i if 1 + i < self._vocabulary else 0 for i in range(count)]

    def make_cache(self) -> Any:
        """Return an empty cache object; another kind of cache is put in by putting another function here."""
        return new_cache(self.model)

    def _cache(self) -> Any:
        return TupleCache() if self._makes_tuples else self.make_cache()

    def _hands_back_tuples(self) -> bool:
        """Whether the model leaves a Cache object empty, or fails on it: it is of the time before those."""
        self._makes_tuples = False
        cache = new_cache(self.model)
        with self._evaluating():
            try:
                self._forward(self._some_tokens(2), 0, cache)
            except Exception:  # whatever an older model does with an object that it does not know
                return True
        return not filled(cache)

    @property
    def _vocabulary(self) -> int:
        return int(getattr(text_config(self.model), "vocab_size", 0) or 0)

    @property
    def _casts(self) -> dict[str, str]:
        return {**_casts(self.model), **self._inner_cast, **self._declared}

    def _casts_inside(self) -> dict[str, str]:
        """Return the coarsest dtype that a float64 model makes of float64 inside; norms, RoPE and softmax may."""
        if self.model.dtype != torch.float64:
            return {}
        tokens = self._some_tokens(self._sample_length)
        with self._evaluating(), Narrowings() as found:
            cache = self._cache()
            self._forward(tokens[:-1], 0, cache)
            self._forward(tokens[-1:], len(tokens) - 1, cache)
        return {} if found.coarsest is None else {"inside ops": found.coarsest}

    def _noise(self, arm: Arm) -> AbstractContextManager[None]:
        if arm.noise_seed is None:
            return nullcontext()
        return rounding_noise(self.model, arm.noise_seed, self._casts)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        before = [module for module in self.model.modules() if module.training]
        if before:
            self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in before:  # one by one: parts of it may have been frozen
                module.training = True


def _differing(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left != right) & ~(left.isnan() & right.isnan())


def _casts(model: Any) -> dict[str, str]:
    """Return the casts coarser than the model's dtype that this process has switched on for float32 matmuls."""
    if model.dtype != torch.float32:
        return {}
    if model.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return {"matmul": "tfloat32"}
    precision = torch.get_float32_matmul_precision()
    return {} if precision == "highest" else {"matmul": "tfloat32" if precision == "high" else "bfloat16"}


@contextmanager
def _threads(arm: Arm) -> Iterator[None]:
    """Run an arm that asks for it with one thread, or with two where there was one."""
    before = torch.get_num_threads()
    torch.set_num_threads((1 if before > 1 else 2) if arm.threads else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _accumulates(model: Any) -> str:
    """Return the dtype that this process sums matrix products in; empty where a kernel may sum coarser parts."""
    own = "float64" if model.dtype == torch.float64 else "float32"
    if model.device.type == "cpu":
        return own
    if model.device.type != "cuda" or _casts(model):
        return ""
    matmul = torch.backends.cuda.matmul
    flags = {torch.bfloat16: "allow_bf16_reduced_precision_reduction",
             torch.float16: "allow_fp16_reduced_precision_reduction"}  # fmt: skip
    reduced = getattr(matmul, flags.get(model.dtype, ""), False)
    return "" if reduced else own
