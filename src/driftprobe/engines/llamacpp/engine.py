"""The llama.cpp engine: runs arms on a GGUF model and hands out its taps."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np

from driftprobe.engines.base import BUILTIN, Ahead, Constant, Tapped
from driftprobe.engines.llamacpp.cache import Cache
from driftprobe.engines.llamacpp.context import Context, Model, Settings
from driftprobe.engines.llamacpp.file import File
from driftprobe.engines.llamacpp.ggml import TYPE_NUMBERS
from driftprobe.engines.llamacpp.nodes import Heard, shape_is_sound
from driftprobe.engines.llamacpp.planting import STRANGER, Planted, Strangers, plant
from driftprobe.engines.llamacpp.rotary import order_of, put_back, rows_put_back
from driftprobe.errors import ModelError, UsageError
from driftprobe.faults import Expected
from driftprobe.fingerprint import Array
from driftprobe.plan import ARMS, Arm, Pass, Phase, Plan, Read, tokens_needed
from driftprobe.taps import BY_NAME, execution_order
from driftprobe.trace import EngineFacts, Event

FLASH_ATTN = ("on", "off")
FLASH_TILE = 64
"""Query rows from which llama.cpp's flash attention on a CPU is another kernel."""
_WEIGHT_CASTS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CACHE_CASTS = {"f16": "float16", "q8_0": "int8", "q4_0": "int8"}
"""Type of a cache -> the dtype whose roundoff covers what is between the phases.

Both read the same rounded rows: the rounding itself cancels, and single elements that fall one step to the other side
are left. For q4_0, whose step is an eighth of a block's largest value, half a step (int4) would put the limit at 230 %
of the cache, and no wrong row would be found. For q8_0 float16 is too fine: a softmax over large scores drifted by
4.0e-2 in a healthy run, where the limit was 3.1e-2. `python -m benchmarks.llamacpp_table flips` and `casts` measure it.
"""
_COARSENESS = ("float32", "float16", "bfloat16", "int8")
_DEFAULT_THREADS = 4


class LlamaCppEngine:
    """A GGUF model under llama.cpp on the CPU, run one sequence at a time."""

    perturbs = False
    alike_in_modes = True
    arms = ARMS
    knobs: tuple[str, ...] = ("threads", "chunks")
    rungs: tuple[str, ...] = ()

    def __init__(self, path: Path, settings: Settings) -> None:
        """Load a model and run a few tokens. Raises ModelError or UsageError where that cannot be."""
        self.path, self.settings = path, settings
        self._file = File(path)
        self._model = Model(path)
        self._context = Context(self._model, settings, 1)
        self._kept: dict[int, Cache] = {}
        self._planted = Planted()
        self._context.before = self._planted.before
        self._order = order_of(self._file.head_size, self._file.rotated, self._model.neighbours)
        self.taps = self._trial()

    @property
    def parameters(self) -> int:
        """How many numbers the model's parameters hold."""
        return self._model.number("n_params")

    @property
    def facts(self) -> EngineFacts:
        """What is known of this model; see EngineFacts."""
        model, flash = self._model, self._context.flash
        window = model.number("n_swa")
        switches = {"positions": model.number("n_ctx_train")}
        switches |= {"window": window} if window else {}
        switches |= {"tile": FLASH_TILE} if flash else {}
        return EngineFacts(
            name="llamacpp",
            version=f"llama-cpp-python {llama_cpp.__version__}",
            model=self.path.name,
            dtype="float32",
            casts=self._casts,
            attention=f"{'flash' if flash else 'matmul'}, cache {self.settings.cache_type}, weights "
            f"{'+'.join(self._file.matrix_types)}, {self.settings.threads} threads",
            layers=model.number("n_layer"),
            heads=model.number("n_head"),
            kv_heads=model.number("n_head_kv"),
            vocabulary=self.vocabulary,
            max_positions=model.number("n_ctx_train"),
            switches=switches,
            device="cpu",
        )

    @property
    def _casts(self) -> dict[str, str]:
        """Coarser dtypes on the path: what a matrix product makes of its activations, the cache's, flash attention's.

        llama.cpp rounds the activations of a product to the type that the weights are multiplied in: float16 for
        float16, blocks of int8 for everything quantised, whatever the weights' bits.
        """
        product = max((_WEIGHT_CASTS.get(kind, "int8") for kind in self._file.matrix_types), key=_COARSENESS.index)
        cache = CACHE_CASTS.get(self.settings.cache_type)
        casts = {} if product == "float32" else {"q_proj": product}
        casts |= {} if cache is None else {"k_cache": cache, "v_cache": cache}
        return casts | ({"attn_ctx": "float16"} if self._context.flash else {})

    def tokenize(self, text: str) -> list[int]:
        """Return the text's token ids. Raises ModelError where the file has no vocabulary."""
        vocab = self._model.vocab
        if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            raise ModelError(
                "tokenizer missing", where=str(self.path), measured="a GGUF file without a vocabulary",
                allowed="a vocabulary in the file, or prompts given as token ids",
                next_step="use --prompt-file with lists of token ids",
            )  # fmt: skip
        content = text.encode("utf-8")
        room = len(content) + 8
        found = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(vocab, content, len(content), found, room, True, False)
        return list(found[: max(count, 0)])

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, or an empty string without a vocabulary."""
        vocab = self._model.vocab
        if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            return ""
        return b"".join(map(self._piece, token_ids)).decode("utf-8", "replace")

    def _piece(self, token: int) -> bytes:
        held = ctypes.create_string_buffer(256)
        count = llama_cpp.llama_token_to_piece(self._model.vocab, token, held, len(held), 0, True)
        return held.raw[: max(count, 0)]

    def greedy(self, token_ids: Sequence[int], steps: int) -> list[int]:
        """Return the model's own next tokens from a cached run (smallest id where logits tie)."""
        self._make_room(len(token_ids) + steps)
        context, chosen = self._context, list(token_ids)
        context.clear()
        logits = context.decode(chosen, 0)
        for step in range(steps):
            chosen.append(int(np.nan_to_num(logits).argmax()))
            if step + 1 < steps:
                logits = context.decode(chosen[-1:], len(chosen) - 1)
        return chosen[len(token_ids) :]

    def begin(self, plan: Plan, ahead: Ahead | None = None) -> None:
        """Make room for a plan's longest arm."""
        self._kept.clear()
        self._make_room(tokens_needed(plan))

    def said(self) -> list[str]:
        """See Engine.said: llama.cpp's own lines are kept off the log."""
        return []

    def run(self, arm: Arm, token_ids: Sequence[int], layers: frozenset[int]) -> Iterator[Tapped | Event]:
        """Run one arm on an empty cache; see Engine.run."""
        context = self._context
        context.clear()
        with self._threads(arm):
            for call in arm.passes:
                if self._planted.write is not None and arm.passes.index(call) == 1 and call.stop - call.start == 1:
                    rows = context.read()
                    self._planted.write(rows, call.start)
                    context.write(rows)
                if call.aligned_to is not None:
                    yield self._align(arm, call)
                heard = self._call(call, token_ids, layers)
                if arm.keeps_rows_for is not None:
                    self._kept[arm.keeps_rows_for] = context.read(call.stop)
                yield from _hand_out(heard, call.reads, self._order)

    def constants(self, layers: frozenset[int]) -> Iterator[Constant]:
        """Return what the file says of rotation, norms and the scale of scores; see Engine.constants."""
        yield from self._file.constants(layers)

    def weights(self, layer: int | None, tensor: str) -> Iterator[Constant]:
        """Return the matrices behind a tap, out of their quantised type; see Engine.weights."""
        for constant in self._file.weights(layer, tensor):
            yield replace(constant, array=rows_put_back(constant.name, constant.array, self._order))

    def at(self, rung: str) -> AbstractContextManager[None]:
        """Refuse: llama.cpp computes in float32 at the most."""
        raise UsageError("no precision ladder here", where=str(self.path), measured=rung, allowed="--ladder off",
                         next_step="run with --ladder off")  # fmt: skip

    def plant(self, fault: str, strength: float | None = None) -> AbstractContextManager[Expected]:
        """Plant a fault while the context lasts and say what must be found; see planting."""
        return plant(fault, strength, self._planted, self._strangers, self._model.number("n_layer"))

    def _strangers(self) -> Strangers:
        """Return the cache rows of two other requests, so that one of them differs from any prompt."""
        count = min(STRANGER, self._model.number("n_ctx_train"))
        self._make_room(count)
        found = []
        for last in (1, 2):
            self._context.clear()
            ids = [(self.vocabulary - last - 3 * i) % self.vocabulary for i in range(count)]
            self._context.decode(ids, 0)
            found.append(self._context.read(count))
        return tuple(found)

    def close(self) -> None:
        """Free context and model."""
        self._context.close()
        self._model.close()

    def _call(self, call: Pass, token_ids: Sequence[int], layers: frozenset[int]) -> Heard:
        rows = [read.position - call.start for read in call.reads]
        heard = self._context.listener(rows, layers, call.start)
        self._context.decode(token_ids[call.start : call.stop], call.start, heard)
        return heard

    def _align(self, arm: Arm, call: Pass) -> Event:
        """Replace cache rows [0, call.start) by P's, then read every layer back and count what differs."""
        assert call.aligned_to is not None
        kept, now = self._kept[call.aligned_to], self._context.read()
        for layer, rows in kept.items():
            for ours, wanted in zip(now[layer].both, rows.both, strict=True):
                ours[: call.start] = wanted[: call.start]
        self._context.write(now)
        rows_put = different = 0
        for layer, back in self._context.read(call.start).items():
            for ours, wanted in zip(back.both, kept[layer].both, strict=True):
                different += int((ours != wanted[: call.start]).any(axis=1).sum())
                rows_put += len(ours)
        return Event(event="cache_readback", arm=arm.name, step=call.aligned_to,
                     measured={"rows": rows_put, "different": different})  # fmt: skip

    def _make_room(self, tokens: int) -> None:
        if tokens > self._context.slots:
            self._context.close()
            self._context = Context(self._model, self.settings, tokens)
            self._context.before = self._planted.before

    @contextmanager
    def _threads(self, arm: Arm) -> Iterator[None]:
        """Run an arm that asks for it with one thread, or with two where there was one."""
        own = self.settings.threads
        self._context.set_threads((1 if own > 1 else 2) if arm.threads else own)
        try:
            yield
        finally:
            self._context.set_threads(own)

    def _trial(self) -> dict[str, tuple[int, ...]]:
        """Run a few tokens and one decode step, and return the taps that fired in both and fit their place."""
        tokens = [min(1 + i, max(self.vocabulary - 1, 0)) for i in range(4)]
        everything = frozenset(range(self._model.number("n_layer")))
        self._context.clear()
        heard = [self._call(call, tokens, everything) for call in (_call_of(0, 3, 2), _call_of(3, 4, 3))]
        found: dict[str, list[int]] = {}
        for layer, tap in sorted(set(heard[0].taps) & set(heard[1].taps), key=lambda p: execution_order(*p)):
            if tap in BY_NAME and shape_is_sound(tap, [h.taps[(layer, tap)][0] for h in heard]):
                found.setdefault(tap, []).extend([] if layer is None else [layer])
        return {tap: tuple(layers) for tap, layers in found.items()}

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(llama_cpp.llama_vocab_n_tokens(self._model.vocab))


def _call_of(start: int, stop: int, position: int) -> Pass:
    return Pass(start, stop, (Read("P", Phase.PREFILL_LAST, 0, position),))


def _hand_out(heard: Heard, reads: Sequence[Read], order: Array | None) -> Iterator[Tapped]:
    for which, read in enumerate(reads):
        for place in sorted(heard.taps, key=lambda p: execution_order(*p)):
            layer, tensor = place
            if tensor in BY_NAME and which in heard.taps[place]:
                yield Tapped(
                    read=read,
                    layer=layer,
                    tensor=tensor,
                    array=put_back(tensor, heard.taps[place][which], order),
                    pos_id=read.position,
                    row_start=heard.row_start.get(place, {}).get(which, 0),
                    source="recomputed" if place in heard.recomputed else "captured",
                )


def open_engine(
    *, model: str, flash_attn: str | None = None, cache_type: str = "f16", threads: int | None = None
) -> LlamaCppEngine:
    """Return the engine of a GGUF file. Raises UsageError or ModelError for what cannot be used."""
    for option, value, allowed in (
        ("--flash-attn", flash_attn, FLASH_ATTN),
        ("--cache-type", cache_type, TYPE_NUMBERS),
    ):
        if value is not None and value not in allowed:
            raise UsageError(f"unknown {option[2:].replace('-', ' ')}", where=option, measured=value,
                             allowed=", ".join(allowed), next_step="choose one of them")  # fmt: skip
    count = min(_DEFAULT_THREADS, os.cpu_count() or 1) if threads is None else int(threads)
    if count < 1:
        raise UsageError("too few threads", where="--threads", measured=str(count), allowed="1 or more",
                         next_step="ask for at least one")  # fmt: skip
    path = Path(model).expanduser()
    if model in BUILTIN or not path.is_file():
        raise ModelError(
            "no such GGUF file", where="--model", measured=model, allowed="a local GGUF file",
            next_step="check the path; `python tools/gguf_model.py tiny.gguf` writes the built-in model as one",
        )  # fmt: skip
    return LlamaCppEngine(path, Settings(flash_attn, cache_type, count))
