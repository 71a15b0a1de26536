"""Faults on one side of a pair of paths; each says where it must show first, and its cause where the dictionary has it.

A fault of a module is kept while the faulty side runs; a fault of a call is in the path itself, as a user would write
it by mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.accuracy.paths import PADS, PAIRS, Pair, Path, Text, cannot, padded, pieces, second_prompt
from driftprobe.engines.hf import HFEngine
from driftprobe.engines.hf.paths.names import name_points
from driftprobe.engines.hf.states import stored_states
from driftprobe.faults import Expected

CANDIDATE, REFERENCE = "candidate", "reference"
LAYER, ROW, EXPERT = 1, 2, 0
Kept = Callable[[Any], AbstractContextManager[None]]
"""Changes a model while the context lasts."""


class Names:
    """What a model's modules are called, by the anatomy that canonical taps come from."""

    def __init__(self, model: Any) -> None:
        engine = HFEngine(model)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._naming = name_points(model, engine.anatomy, engine.taps)
        self.layers, self.rotary = engine.anatomy.layers, engine.anatomy.rotary
        self._model = model

    def of(self, module: Any) -> str:
        """Return a module's qualified name."""
        if module is None:
            raise cannot("this model has no such module")
        return self._names[id(module)]

    def module(self, name: str) -> Any:
        """Return a module by its qualified name."""
        return self._model.get_submodule(name)

    def expected(self, name: str, side: str = "output", cause: str = "", **parameters: Any) -> Expected:
        """Return what must be found where a module's output (or input) is the first that differs."""
        layer, tensor = self._naming.place(name, side, 0)
        return Expected(layer=layer, tensor=tensor, reading="", cause=cause, parameters=parameters)

    def ending(self, *ends: str) -> str:
        """Return the first module whose name ends so."""
        for name, _ in self._model.named_modules():
            if name.rsplit(".", 1)[-1] in ends:
                return name
        raise cannot(f"no module is called {' or '.join(ends)}")

    def ending_in(self, layer: int, *ends: str, within: str = "") -> str:
        """Return the last module of a layer whose name ends with the first of these words that any does."""
        inside = [self._names[id(module)] for module in self.layers[layer].module.modules()]
        for end in ends:
            found = [n for n in inside if n.rsplit(".", 1)[-1] == end and f".{within}" in n.rsplit(".", 1)[0]]
            if found:
                return found[-1]
        raise cannot(f"no module of layer {layer} is called {' or '.join(ends)}")


Plant = Callable[[Names, Text, str, float], tuple[Path | Kept, Expected]]


@dataclass(frozen=True)
class PathFault:
    """One fault on one side of a pair of paths."""

    name: str
    breaks: str
    pairs: tuple[str, ...]
    plant: Plant
    """`plant(names, text, pair, strength)`: the wrong path, or what is kept while the faulty side runs."""
    of_steps: bool = True
    """Whether it acts in the path of smaller calls (else in the one of the larger ones: the prefill's)."""
    strengths: tuple[float, ...] = (1.0,)
    sides: tuple[str, ...] = (CANDIDATE, REFERENCE)
    is_path: bool = False
    architectures: tuple[str, ...] = ()
    """Where it can act; empty for everywhere."""


def faulty(fault: PathFault, names: Names, text: Text, pair: str, side: str, strength: float) -> tuple[Pair, Expected]:
    """Return reference and candidate with the fault on one side of them; the pair's roles are exchanged for that."""
    large, small = PAIRS[pair](text)
    made, expected = fault.plant(names, text, pair, strength)
    wrong = made if fault.is_path else _during(small if fault.of_steps else large, made)
    right = large if fault.of_steps else small
    if expected.cause:
        expected = replace(expected, parameters={**expected.parameters, "side": side})
    return ((right, wrong) if side == CANDIDATE else (wrong, right)), expected  # type: ignore[return-value]


def _during(path: Path, kept: Any) -> Path:
    def run(model: Any) -> None:
        with kept(model):
            path(model)

    return run


def _hooked(name: str, change: Callable[[torch.Tensor], torch.Tensor], most: int | None) -> Kept:
    """Keep a module's output changed, in calls of at most so many tokens."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        if most is not None and value.numel() // value.shape[-1] > most:
            return output
        return (change(value), *output[1:]) if isinstance(output, tuple) else change(value)

    @contextmanager
    def kept(model: Any) -> Iterator[None]:
        handle = model.get_submodule(name).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    return kept


def _one_token(names: Names, _text: Text, _pair: str, strength: float) -> tuple[Kept, Expected]:
    """Its calls stand behind all others: a fault from there on looks alike, and no calls are to be named."""
    layer = names.layers[LAYER]
    name = names.of(layer.out_proj) if layer.out_proj is not None else names.ending_in(LAYER, "out_proj")
    expected = names.expected(name, cause="projection_scale", error=strength)
    return _hooked(name, lambda value: value * (1 + strength), 1), expected


def _prefill_weights(names: Names, _text: Text, _pair: str, strength: float) -> tuple[Kept, Expected]:
    name = names.ending_in(LAYER, "down_proj", "c_proj", "dense_4h_to_h", "in_proj", "gate")

    noise = torch.randn(names.module(name).weight.shape, generator=torch.Generator().manual_seed(7))

    @contextmanager
    def kept(model: Any) -> Iterator[None]:
        weight = model.get_submodule(name).weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(before * (1 + strength * noise.to(before.dtype)))
        try:
            yield
        finally:
            with torch.no_grad():
                weight.copy_(before)

    error = strength * float(noise.square().mean().sqrt())
    return kept, names.expected(name, cause="weights_other", error=error)


def _epsilon(names: Names, _text: Text, _pair: str, strength: float) -> tuple[Kept, Expected]:
    name = names.of(names.layers[LAYER].attn_norm)

    @contextmanager
    def kept(model: Any) -> Iterator[None]:
        norm = model.get_submodule(name)
        word = next(word for word in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, word))
        before = getattr(norm, word)
        setattr(norm, word, before + strength)
        try:
            yield
        finally:
            setattr(norm, word, before)

    return kept, names.expected(name, cause="norm_epsilon", delta=strength)


def _positions(names: Names, offset: int) -> Expected:
    """Return what must be found where positions are so much too high: the table of positions is read there."""
    name = names.ending("rotary_emb", "wpe")
    return names.expected(name, cause="learned_position" if name.endswith("wpe") else "rope_position", offset=offset)


def _pad_positions(names: Names, text: Text, _pair: str, _strength: float) -> tuple[Path, Expected]:
    return padded(text, "left", positions="slots"), _positions(names, PADS)


def _pad_seen(names: Names, text: Text, _pair: str, _strength: float) -> tuple[Path, Expected]:
    layer = names.layers[0]
    return padded(text, "left", masked=False), names.expected(names.of(layer.out_proj), "input")


def _chunk_position(names: Names, text: Text, _pair: str, _strength: float) -> tuple[Path, Expected]:
    return pieces(text, text.cuts(), late=1), _positions(names, 1)


def _crop(names: Names, text: Text, _pair: str, _strength: float) -> tuple[Path, Expected]:
    return second_prompt(text, extra=1), names.expected(names.ending("rotary_emb", "wpe"), cause="keys_extra", count=1)


def _row_lost(names: Names, text: Text, _pair: str, _strength: float) -> tuple[Path, Expected]:
    def between(_model: Any, cache: Any) -> None:
        layers = getattr(cache, "layers", None)
        keys = layers[LAYER].keys if layers is not None else cache.key_cache[LAYER]
        keys[:, :, ROW] = 0

    if names.layers[LAYER].attention is None:
        raise cannot("the cache has no rows")
    return pieces(text, text.cuts(), between=between), names.expected(names.of(names.layers[LAYER].out_proj), "input")


def _state_lost(names: Names, text: Text, _pair: str, _strength: float) -> tuple[Path, Expected]:
    def between(_model: Any, cache: Any) -> None:
        states = stored_states(cache, LAYER).recurrent
        if not states:
            raise cannot("the cache holds no states by layer")
        for state in states:
            state.zero_()

    return pieces(text, (0, *text.cuts()[2:]), between=between), names.expected(
        names.ending_in(LAYER, "norm", within="mixer")
    )


def _expert_dropped(names: Names, _text: Text, _pair: str, _strength: float) -> tuple[Kept, Expected]:
    name = names.ending_in(LAYER, "experts")

    def pre_hook(_module: Any, args: Any) -> Any:
        if len(args) < 3 or args[0].numel() // args[0].shape[-1] > 1:
            return args
        hidden, chosen, weights = args[:3]
        return (hidden, chosen, weights.masked_fill(chosen == EXPERT, 0), *args[3:])

    @contextmanager
    def kept(model: Any) -> Iterator[None]:
        handle = model.get_submodule(name).register_forward_pre_hook(pre_hook)
        try:
            yield
        finally:
            handle.remove()

    return kept, names.expected(name)


_STEPPED = ("chunked", "cache_off", "generate", "second_prompt")
_POSITIONS = ("llama", "gpt2", "gemma2", "qwen3_moe", "gpt_neox", "mixtral", "phi3")
_ROWS = (*_POSITIONS, "bloom")

PATH_FAULTS: dict[str, PathFault] = {
    fault.name: fault
    for fault in (
        PathFault("one_token_projection", "an output projection is wrong in calls of one token", _STEPPED, _one_token,
                  strengths=(1e-1, 1e-2, 1e-3)),
        PathFault("prefill_weights", "other weights of a projection in the large calls", tuple(PAIRS),
                  _prefill_weights, of_steps=False, strengths=(1e-1, 1e-2)),
        PathFault("prefill_epsilon", "a norm's epsilon in the large calls", tuple(PAIRS), _epsilon, of_steps=False,
                  strengths=(1e-1, 1e-2)),
        PathFault("pad_positions", "positions count the padding", ("padded_left",), _pad_positions, is_path=True,
                  architectures=_POSITIONS),
        PathFault("pad_seen", "padding is not masked", ("padded_left",), _pad_seen, is_path=True,
                  architectures=_POSITIONS),
        PathFault("chunk_position", "positions one too high from the second chunk on", ("chunked",), _chunk_position,
                  is_path=True, architectures=_POSITIONS),
        PathFault("crop_one_less", "a used cache keeps one row too many", ("second_prompt",), _crop, is_path=True,
                  sides=(CANDIDATE,), architectures=_POSITIONS),
        PathFault("row_lost", "a key row is zero behind the first chunk", ("chunked",), _row_lost, is_path=True,
                  architectures=_ROWS),
        PathFault("state_lost", "the recurrent state is lost behind the prefill", ("cache_off",), _state_lost,
                  is_path=True, architectures=("mamba2",)),
        PathFault("expert_dropped", "one expert is left out in calls of one token", ("chunked", "cache_off"),
                  _expert_dropped, architectures=("mixtral", "qwen3_moe")),
    )
}  # fmt: skip
"""By name. `pad_positions` leaves the results of rotary models as they are: only what depends on positions differs.
`pad_seen` needs position ids: without them and without a mask, padding is text, and the two sides ran other texts."""
