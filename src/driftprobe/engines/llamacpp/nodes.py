"""From nodes of llama.cpp's graph to taps: which node is which tap, and which of its rows were asked for.

A node's name repeats (`Qcur-0` is a matrix product, a reshape and a rotation), so a node is known by name and op, and
where that is not enough by which time it comes. Axes: T tokens, C channels, H query heads, G key/value heads, D head
dimension, S cache rows; arrays are outermost first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from driftprobe.engines.llamacpp.ggml import Tensor
from driftprobe.fingerprint import Array, to_float64

_PRODUCT = frozenset({"MUL_MAT", "ADD"})
_NORM = frozenset({"MUL", "ADD"})
_ANY: frozenset[str] = frozenset()
_BY_NAME: dict[str, tuple[tuple[frozenset[str], str], ...]] = {
    "attn_norm": ((_NORM, "attn_norm"),),
    "Qcur": ((_PRODUCT, "q_proj"), (frozenset({"ROPE"}), "q_rope")),
    "Kcur": ((_PRODUCT, "k_proj"), (frozenset({"ROPE"}), "k_rope")),
    "Vcur": ((_PRODUCT, "v_proj"),),
    "Qcur_normed": ((_NORM, "q_norm"),),
    "Kcur_normed": ((_NORM, "k_norm"),),
    "kqv_out": ((frozenset({"CONT", "RESHAPE"}), "attn_ctx"),),
    "ffn_inp": ((_ANY, "x_mid"),),
    "ffn_norm": ((_NORM, "ffn_norm"),),
    "ffn_moe_logits": ((_PRODUCT, "router_logits"),),
    "ffn_out": ((_ANY, "mlp_out"),),
    "ffn_moe_out": ((_ANY, "mlp_out"),),
    "l_out": ((_ANY, "x_out"),),
    "result_norm": ((_ANY, "final_norm"),),
    "result_output": ((_ANY, "logits"),),
}
"""Name without its layer -> ops and the tap that their result is; a later node of the same tap (a bias) wins."""
_BY_WEIGHT = re.compile(r"blk\.(\d+)\.attn_output\.(weight|bias)")
_TURN = re.compile(r"attn_inp_([kv])_rot\b")
"""An orthogonal matrix by which heads are turned in front of a quantised cache, where their size is one of its own."""
_CONTEXT = re.compile(r"kqv_out-(\d+)\b")
_CACHE = re.compile(r"cache_[kv]_l(\d+)\b")
_QUERY_TAPS = frozenset({"q_proj", "q_norm", "q_rope", "attn_ctx"})
_KEY_TAPS = frozenset({"k_proj", "v_proj", "k_norm", "k_rope"})
_NORM_OPS = frozenset({"RMS_NORM", "NORM"})
_COPIES = frozenset({"CPY", "CONT", "DUP"})

Place = tuple[int | None, str]


@dataclass(frozen=True, slots=True)
class Node:
    """What a node of the graph is to us."""

    layer: int | None
    tap: str
    """A tap's name, or one of `kq`, `softmax`, `kqv`, `flash`, `norm`, `turn`, `outputs`, which need more thought."""


def node_of(tensor: Tensor) -> Node | None:
    """Return what a node is, or None for one that nobody needs."""
    base, layer = _split(tensor.name)
    op = tensor.op
    if op == "GET_ROWS":
        return _lookup(tensor)
    if op == "FLASH_ATTN_EXT":
        return Node(_cache_layer(tensor, 1), "flash")
    if op in {"MUL_MAT", "ADD"}:
        found = next((m for m in (_BY_WEIGHT.search(name) for name in _source_names(tensor)) if m), None)
        if found:
            return Node(int(found[1]), "attn_out")
        if op == "MUL_MAT" and _TURN.match(_source_names(tensor)[0]):
            return _turned(tensor)
    if layer is not None and base.startswith("kq") and base != "kqv_out":
        return _attention(base, layer, op)
    if layer is not None and base == "norm" and op in _NORM_OPS:
        return Node(layer, "norm")
    for ops, tap in _BY_NAME.get(base, ()):
        if not ops or op in ops:
            return Node(layer, tap)
    return None


def _turned(tensor: Tensor) -> Node:
    """Return what a turn by an orthogonal matrix is: that of attention's result turns it back, which is the tap."""
    context = _CONTEXT.match(_source_names(tensor)[1])
    return Node(int(context[1]), "attn_ctx") if context else Node(None, "turn")


def _split(name: str) -> tuple[str, int | None]:
    base, dash, number = name.rpartition("-")
    return (base, int(number)) if dash and number.isdigit() else (name, None)


def _source_names(tensor: Tensor) -> list[str]:
    sources = (tensor.source(i) for i in range(2))
    return [source.name for source in sources if source is not None]


def _lookup(tensor: Tensor) -> Node | None:
    """GET_ROWS looks tokens up, or keeps the rows that the caller wants an output of."""
    indices = tensor.source(1)
    name = "" if indices is None else indices.name
    if name.startswith("inp_tokens"):
        return Node(None, "embed")
    return Node(None, "outputs") if "out_ids" in name else None


def _attention(base: str, layer: int, op: str) -> Node | None:
    if op == "SOFT_MAX":
        return Node(layer, "softmax")
    if base == "kqv" and op == "MUL_MAT":
        return Node(layer, "kqv")
    return Node(layer, "kq") if base != "kqv" and op in {"MUL_MAT", "SCALE", "TANH", "ADD"} else None


def _cache_layer(tensor: Tensor, index: int) -> int | None:
    source = tensor.source(index)
    found = None if source is None else _CACHE.search(stored(source).owner.name)
    return int(found[1]) if found else None


def stored(tensor: Tensor) -> Tensor:
    """Return the view of the cache that a tensor is a copy of, in another dtype say; itself where it is none."""
    source = tensor.source(0)
    while tensor.op in _COPIES and source is not None:
        tensor, source = source, source.source(0)
    return tensor


@dataclass(frozen=True, slots=True)
class CacheTensors:
    """Where a layer keeps its keys and values, as long as its context lives."""

    keys: Tensor
    values: Tensor
    transposed: bool
    """Whether values stand channel by channel, as they do without flash attention."""


@dataclass
class Heard:
    """What was heard in one call: for each read, the tensors at its taps."""

    rows: tuple[int, ...]
    """The tokens that were asked for, counted from the call's first; they are the outputs too."""
    heads: int
    kv_heads: int
    layers: frozenset[int]
    start: int = 0
    """Position of the call's first token."""
    windowed: bool = False
    """Whether old keys may go out of sight."""
    taps: dict[Place, dict[int, Array]] = field(default_factory=dict)
    """Tap -> which read -> its tensor."""
    row_start: dict[Place, dict[int, int]] = field(default_factory=dict)
    recomputed: set[Place] = field(default_factory=set)
    cache: dict[int, CacheTensors] = field(default_factory=dict)
    flash: bool = False
    _seen: int = 0
    _tokens: int = 0
    _outputs: bool = False
    _normed: set[int] = field(default_factory=set)
    _kq: dict[int, Array] = field(default_factory=dict)
    _keys: dict[int, Tensor] = field(default_factory=dict)
    _extent: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)
    _turns: dict[str, Array] = field(default_factory=dict)
    """`k` or `v` -> the matrix `[n, n]` that its heads are turned by before they are cached."""

    def take(self, tensor: Tensor, node: Node) -> None:
        """Take a node's result, which has just been computed."""
        if node.tap == "embed":
            self._begin(tensor)
        if node.tap == "outputs":
            self._outputs = True
        elif node.tap == "turn":
            self._take_turn(tensor)
        elif node.layer is not None and node.layer not in self.layers and node.tap not in {"kq", "kqv", "flash"}:
            return
        elif node.tap == "norm":
            self._take_norm(tensor, node)
        elif node.tap in {"kq", "softmax", "kqv", "flash"}:
            if node.layer is not None:
                getattr(self, f"_take_{node.tap}")(tensor, node.layer)
        else:
            self._keep_rows(tensor, node)

    def _begin(self, embed: Tensor) -> None:
        """A graph begins: a call of many tokens is cut into several (`n_ubatch`)."""
        self._seen += self._tokens
        self._tokens = embed.shape[2]
        self._outputs = False
        self._normed.clear()

    @property
    def _wanted(self) -> list[tuple[int, int]]:
        """Which reads are in this graph, each with its token's place in it."""
        places = [(which, row - self._seen) for which, row in enumerate(self.rows)]
        return [(which, place) for which, place in places if 0 <= place < self._tokens]

    def _keep(self, place: Place, which: int, array: Array, row_start: int | None = None) -> None:
        self.taps.setdefault(place, {})[which] = np.ascontiguousarray(array)
        if row_start is not None:
            self.row_start.setdefault(place, {})[which] = row_start

    def _keep_rows(self, tensor: Tensor, node: Node) -> None:
        """Keep the wanted rows of a tensor that has one for each token, or for each output."""
        wanted = self._wanted
        if not wanted:
            return
        ranks = sorted({place for _, place in wanted})
        count = len(ranks) if self._outputs else self._tokens
        heads = self.heads if node.tap in _QUERY_TAPS else self.kv_heads if node.tap in _KEY_TAPS else 0
        array = tensor.array()
        if not count or array.size % (count * max(heads, 1)):
            return
        rows = array.reshape((count, heads, -1) if heads else (count, -1))
        for which, place in wanted:
            index = ranks.index(place) if self._outputs else place
            self._keep((node.layer, node.tap), which, rows[index : index + 1])

    def _take_norm(self, tensor: Tensor, node: Node) -> None:
        """The first norm of a layer reads the residual stream."""
        source = tensor.source(0)
        if node.layer is not None and source is not None and node.layer not in self._normed:
            self._normed.add(node.layer)
            self._keep_rows(source, Node(node.layer, "x_in"))

    def _take_turn(self, tensor: Tensor) -> None:
        """Learn a turn from the first node that applies it."""
        matrix = tensor.source(0)
        found = None if matrix is None else _TURN.match(matrix.name)
        if matrix is not None and found is not None and found[1] not in self._turns:
            self._turns[found[1]] = to_float64(matrix.array()).reshape(matrix.shape[-2:])

    def _turned_back(self, which: str, rows_SGD: Array) -> Array:
        """Return cache rows as they were before their turn.

        What a grid's blocks stand for sums exactly in float64, so that equal rows stay equal bit for bit.
        """
        matrix = self._turns.get(which)
        if matrix is None:
            return rows_SGD
        flat = to_float64(rows_SGD).reshape(-1, len(matrix)) @ to_float64(matrix)
        back: Array = flat.reshape(rows_SGD.shape).astype(np.float32)
        return back

    def _take_kq(self, tensor: Tensor, layer: int) -> None:
        keys = tensor.source(0)
        if tensor.op == "MUL_MAT" and keys is not None:
            self._keys[layer] = stored(keys)
        if layer in self.layers and self._wanted:
            self._kq[layer] = tensor.array()

    def _take_softmax(self, tensor: Tensor, layer: int) -> None:
        mask, raw_HTS = tensor.source(1), self._kq.pop(layer, None)
        if not self._wanted or mask is None or raw_HTS is None:
            return
        probs_HTS, mask_TS = tensor.array()[0], to_float64(mask.array()[0, 0])
        self._extent[layer] = {}
        for which, place in self._wanted:
            low, high = self._extent[layer][which] = self._extent_of(mask_TS[place], which)
            self._keep((layer, "attn_probs"), which, probs_HTS[None, :, place, low:high], low)
            if tensor.parameter(1) == 0.0:  # no slopes of ALiBi on the mask
                scaled = np.float32(tensor.parameter(0)) * raw_HTS[0, :, place, low:high].astype(np.float32)
                scores_HS = np.where(np.isneginf(mask_TS[place, low:high]), np.float32(-np.inf), scaled)
                self._keep((layer, "attn_scores"), which, scores_HS[None].astype(np.float32), low)
                self.recomputed.add((layer, "attn_scores"))

    def _take_kqv(self, tensor: Tensor, layer: int) -> None:
        values, keys = tensor.source(0), self._keys.get(layer)
        if values is None or keys is None:
            return
        values = stored(values)
        self.cache[layer] = CacheTensors(keys.owner, values.owner, transposed=True)
        if self._wanted and layer in self._extent:
            self._keep_cache(layer, keys.array()[0].swapaxes(0, 1), values.array()[0].transpose(2, 0, 1))

    def _extent_of(self, mask_S: Array, which: int) -> tuple[int, int]:
        """Return the first cache row that counts, and the one behind the last: its own, or further if it sees more.

        Slot k holds position k: one sequence, from an empty cache. Rows behind are padding.
        """
        seen = np.flatnonzero(~np.isneginf(to_float64(mask_S)))
        low = int(seen[0]) if self.windowed and seen.size else 0
        return low, max(int(seen[-1]) if seen.size else 0, self.start + self.rows[which]) + 1

    def _keep_cache(self, layer: int, keys_SGD: Array, values_SGD: Array) -> None:
        for which, (low, high) in self._extent[layer].items():
            self._keep((layer, "k_cache"), which, self._turned_back("k", keys_SGD[low:high]), low)
            self._keep((layer, "v_cache"), which, self._turned_back("v", values_SGD[low:high]), low)

    def _take_flash(self, tensor: Tensor, layer: int) -> None:
        """One node does all of attention: its scores and probabilities are computed again from what it reads."""
        sources = [tensor.source(index) for index in range(4)]
        queries, keys, values, mask = sources
        self.flash = True
        if queries is None or keys is None or values is None:
            return
        keys, values = stored(keys), stored(values)
        self.cache[layer] = CacheTensors(keys.owner, values.owner, transposed=False)
        if not self._wanted or mask is None or layer not in self.layers:
            return
        keys_SGD, values_SGD = (t.array()[0].swapaxes(0, 1) for t in (keys, values))
        mask_TS = to_float64(mask.array()[0, 0])
        self._extent[layer] = {which: self._extent_of(mask_TS[place], which) for which, place in self._wanted}
        self._keep_cache(layer, keys_SGD, values_SGD)
        if tensor.parameter(1) != 0.0:  # ALiBi
            return
        queries_HTD = to_float64(queries.array()[0])
        for which, place in self._wanted:
            low, high = self._extent[layer][which]
            hidden = np.isneginf(mask_TS[place, low:high])
            scores = _scores(queries_HTD[:, place], to_float64(keys_SGD[low:high]), hidden,
                             tensor.parameter(0), tensor.parameter(2))  # fmt: skip
            probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
            probs /= probs.sum(axis=-1, keepdims=True)
            for tap, found in (("attn_scores", scores), ("attn_probs", probs)):
                self._keep((layer, tap), which, found[None].astype(np.float32), low)
                self.recomputed.add((layer, tap))


def _scores(queries_HD: Array, keys_SGD: Array, hidden_S: Array, scale: float, softcap: float) -> Array:
    """Return scaled, capped and masked scores [H, S]."""
    groups = queries_HD.shape[0] // keys_SGD.shape[1]
    keys_SHD = np.repeat(keys_SGD, groups, axis=1)
    scores = np.einsum("hd,shd->hs", to_float64(queries_HD), to_float64(keys_SHD)) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    return np.where(np.asarray(hidden_S, dtype=bool), -np.inf, scores)


def shape_is_sound(tap: str, arrays: Sequence[Array]) -> bool:
    """Whether a tap's tensors are of one token, and of one shape in both phases but for the rows that are seen."""
    if tap in {"k_cache", "v_cache"}:
        return len({array.shape[1:] for array in arrays}) == 1
    if tap in {"attn_scores", "attn_probs"}:
        return len({array.shape[:2] for array in arrays}) == 1
    return len({array.shape for array in arrays}) == 1 and all(array.shape[0] == 1 for array in arrays)
