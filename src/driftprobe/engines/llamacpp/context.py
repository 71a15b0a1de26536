"""A model and a context of llama.cpp, through the low-level interface of llama-cpp-python.

The scheduler asks a callback before each node whether it wants the result, and calls it again when the result is
there. ctypes swallows what a callback raises, so the first exception is kept and raised after the call.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from driftprobe.engines.llamacpp.cache import Cache, read, write
from driftprobe.engines.llamacpp.ggml import TYPE_NUMBERS, Tensor, check_layout, unknown_build
from driftprobe.engines.llamacpp.nodes import CacheTensors, Heard, node_of
from driftprobe.errors import EngineError, ModelError, UsageError
from driftprobe.fingerprint import Array

Before = Callable[[Tensor, "Call"], None]
"""Told of each node before it is computed: a planted fault changes what the node reads."""
UBATCH = 512
"""Tokens of one graph: llama.cpp's own default; a longer call is cut."""
_PAD = 256
_KNOWN_DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "flash_attn_type": -1, "type_k": 1,
                   "type_v": 1, "embeddings": False, "offload_kqv": True, "rope_scaling_type": -1,
                   "pooling_type": -1}  # fmt: skip
"""What llama.cpp's default parameters say; a struct of another layout reads other numbers in these places."""


def check_defaults(defaults: Any | None = None) -> None:
    """Compare the default context parameters with those that are known. Raises ModelError where they differ."""
    parameters = llama_cpp.llama_context_default_params() if defaults is None else defaults
    for name, known in _KNOWN_DEFAULTS.items():
        value = getattr(parameters, name, None)
        if value != known:
            raise unknown_build(f"llama_context_params: default {name} is read as {value}", f"{name} {known}")


_LOG: list[Any] = []


def _quiet() -> None:
    """Keep llama.cpp's own lines, hundreds a model, off the terminal; the function must live as long as they come."""
    if not _LOG:
        _LOG.append(llama_cpp.llama_log_callback(lambda *_: None))
        llama_cpp.llama_log_set(_LOG[0], ctypes.c_void_p(0))


class Model:
    """A GGUF file, loaded."""

    def __init__(self, path: Path) -> None:
        """Load a file. Raises ModelError where llama.cpp cannot."""
        _quiet()
        check_defaults()
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.pointer = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.pointer:
            raise ModelError(
                "the model cannot be loaded", where=str(path), measured="llama.cpp refuses it",
                allowed="a GGUF file of an architecture that this llama.cpp knows",
                next_step="load it with llama.cpp's own llama-cli to read its reasons",
            )  # fmt: skip
        self.vocab = llama_cpp.llama_model_get_vocab(self.pointer)

    def number(self, name: str) -> int:
        """Return one of the model's numbers: `n_layer` for `llama_model_n_layer`."""
        return int(getattr(llama_cpp, f"llama_model_{name}")(self.pointer))

    @property
    def neighbours(self) -> bool:
        """Whether it rotates neighbouring dimensions of a head; else dimension i goes with one half a head away."""
        return int(llama_cpp.llama_model_rope_type(self.pointer)) == int(llama_cpp.LLAMA_ROPE_TYPE_NORM)

    def close(self) -> None:
        """Free the model; nothing may run on it."""
        if self.pointer:
            llama_cpp.llama_model_free(self.pointer)
            self.pointer = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What a context is made with."""

    flash_attn: str | None
    """`on`, `off`, or None for llama.cpp's own choice."""
    cache_type: str
    threads: int


@dataclass(frozen=True, slots=True)
class Call:
    """One call: so many tokens behind so many rows."""

    start: int
    count: int
    changed: set[int]
    """Addresses of what a planted fault has changed in this call."""

    @property
    def is_decode(self) -> bool:
        """Whether it feeds one token to a filled cache."""
        return self.start > 0 and self.count == 1


class Context:
    """One context: a cache, and the graph that runs on it."""

    def __init__(
        self, model: Model, settings: Settings, room: int, *, listens: bool = True, ubatch: int | None = None
    ) -> None:
        """Make a context with a cache of at least `room` slots. Raises UsageError where llama.cpp refuses it.

        Without `listens` it has no callback: for measuring what that costs. `ubatch` is llama.cpp's `n_ubatch`.
        """
        self.model, self.settings, self.listens, self.ubatch = model, settings, listens, ubatch or UBATCH
        self.slots = -(-room // _PAD) * _PAD
        self.error: BaseException | None = None
        self.heard: Heard | None = None
        self.before: list[Before] = []
        self._call = Call(0, 0, set())
        self._checked = False
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._called)
        self.pointer = llama_cpp.llama_init_from_model(model.pointer, self._parameters())
        if not self.pointer or llama_cpp.llama_n_ctx(self.pointer) < self.slots:
            raise UsageError(
                "llama.cpp refuses this context", where="--cache-type, --flash-attn",
                measured=f"cache {settings.cache_type}, flash attention {settings.flash_attn or 'auto'}, "
                f"{self.slots} slots",
                allowed="a quantised cache only with flash attention, and heads that are whole blocks of its type",
                next_step="use --flash-attn on, or --cache-type f16",
            )  # fmt: skip
        self.places: dict[int, CacheTensors] = {}
        self.flash = False
        self._warm_up()

    def _parameters(self) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        number = TYPE_NUMBERS[self.settings.cache_type]
        parameters.n_ctx = parameters.n_batch = self.slots
        parameters.n_ubatch = min(self.ubatch, self.slots)
        parameters.type_k = parameters.type_v = number
        parameters.flash_attn_type = {"on": 1, "off": 0, None: -1}[self.settings.flash_attn]
        parameters.n_threads = parameters.n_threads_batch = self.settings.threads
        if self.listens:
            parameters.cb_eval = self._callback
        parameters.swa_full = True  # every position keeps its slot
        parameters.no_perf = True
        return parameters

    def _warm_up(self) -> None:
        """Run two tokens to learn where the cache is, then empty it."""
        heard = self.listener(())
        self.decode([1, 2], 0, heard)
        self.places, self.flash = heard.cache, heard.flash
        self.clear()

    def listener(self, rows: Sequence[int], layers: frozenset[int] = frozenset(), start: int = 0) -> Heard:
        """Return a listener for one call at a position: to these of its tokens, in these layers."""
        number = self.model.number
        return Heard(tuple(rows), number("n_head"), number("n_head_kv"), layers, start, number("n_swa") > 0)

    def clear(self) -> None:
        """Empty the cache, its numbers too."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.pointer), True)

    def read(self, count: int | None = None) -> Cache:
        """Return every layer's cache rows, or the first `count`."""
        return read(self.places, count)

    def write(self, cache: Cache) -> None:
        """Put whole layers of the cache back."""
        write(self.places, cache)

    def decode(self, token_ids: Sequence[int], start: int, heard: Heard | None = None) -> Array:
        """Feed tokens behind the rows that the cache holds; returns the logits of the last one.

        Outputs are made for the rows that are listened to and for none else; for the last token without a listener.
        """
        outputs = set(heard.rows) if heard is not None and heard.rows else {len(token_ids) - 1}
        batch = llama_cpp.llama_batch_init(len(token_ids), 0, 1)
        try:
            batch.n_tokens = len(token_ids)
            for i, token in enumerate(token_ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, i in outputs
            self.heard, self.error, self._call = heard, None, Call(start, len(token_ids), set())
            code = llama_cpp.llama_decode(self.pointer, batch)
        finally:
            self.heard = None
            llama_cpp.llama_batch_free(batch)
        if self.error is not None:
            raise self.error
        if code != 0:
            raise EngineError(
                "llama.cpp failed while it ran", where=f"tokens {start} to {start + len(token_ids) - 1}",
                measured=f"llama_decode returned {code}", allowed="0",
                next_step="run the model with llama.cpp's own llama-cli to see whether it works there",
            )  # fmt: skip
        count = llama_cpp.llama_vocab_n_tokens(self.model.vocab)
        logits = llama_cpp.llama_get_logits_ith(self.pointer, max(outputs))
        return np.ctypeslib.as_array(logits, shape=(count,)).copy()

    def set_threads(self, threads: int) -> None:
        """Compute with another number of threads from now on."""
        llama_cpp.llama_set_n_threads(self.pointer, threads, threads)

    def close(self) -> None:
        """Free the context."""
        if self.pointer:
            llama_cpp.llama_free(self.pointer)
            self.pointer = None

    def _called(self, address: int, ask: bool, _data: object) -> bool:
        try:
            tensor = Tensor(address)
            if ask:
                for told in self.before:
                    told(tensor, self._call)
            heard = self.heard
            node = None if heard is None or self.error is not None else node_of(tensor)
            if ask or node is None or heard is None:
                return node is not None or not ask
            if not self._checked:
                check_layout(tensor)
                self._checked = True
            heard.take(tensor, node)
        except BaseException as error:  # it would be swallowed here: it is raised after the call
            self.error = self.error or error
        return True
