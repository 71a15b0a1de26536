"""Where the rows of one forward call stand: their absolute positions in the sequence, told by the call and its tokens.

A call names positions in many ways (position ids, a cache's length, a padding mask) or in none. Each is a guess until
the call's tokens agree with the reference's sequence; the first guess that agrees is taken.

Axes: B batch rows, T tokens of this call, S columns of an attention mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor
Locate = Callable[[dict[str, Any]], Any]
"""A call's arguments by name -> the absolute position of its first token (int), or of every token (`[T]`)."""
_CACHES = ("past_key_values", "cache_params", "past_key_value", "cache", "state", "past")


@dataclass(frozen=True, slots=True)
class Call:
    """What one forward call of the whole model says of its tokens."""

    tokens_BT: list[list[int]] | None
    """None where the model was given embeddings."""
    rows: int
    count: int
    """T: tokens in each batch row, padding included."""
    mask_BS: list[list[int]] | None = None
    positions_BT: list[list[int]] | None = None
    located: list[int] | None = None
    """Positions `[T]` that hold for every batch row: `cache_position`, or the user's `locate`."""
    past: int | None = None
    """Positions that the cache already holds; None where there is no cache that tells."""
    cache: Any = None
    kept: int = 0
    """How many of the last positions the output head computes; 0 is all."""


@dataclass(frozen=True, slots=True)
class Placed:
    """The rows of one call that belong to the sequence."""

    row: int
    """Which batch row."""
    positions: tuple[tuple[int, int], ...]
    """(column of the call, absolute position), for rows whose token and context are the reference's."""
    stray: int | None = None
    """The first position whose token is not the reference's while all before it are; None without one."""
    moved: int = 0
    """Rows whose position by their tokens is not the one that the call named."""
    count: int = 0
    """How many tokens of its batch row the call has, padding included."""
    beyond: int = 0
    """Rows of the cache beyond the positions before the call's first; 0 where padding is hidden."""


def read_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], locate: Locate | None) -> Call | None:
    """Return what a call's arguments say, or None where it has neither token ids nor embeddings."""
    given = _by_name(model, args, kwargs)
    ids, embeddings = _token_ids(given), given.get("inputs_embeds")
    if ids is not None:
        rows, count = (1, len(ids)) if ids.dim() == 1 else (ids.shape[0], ids.shape[1])
        tokens = [ids.tolist()] if ids.dim() == 1 else ids.tolist()
    elif isinstance(embeddings, Tensor) and embeddings.dim() == 3:
        (rows, count), tokens = embeddings.shape[:2], None
    else:
        return None
    cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
    kept = next((k for name in ("logits_to_keep", "num_logits_to_keep") if isinstance(k := given.get(name), int)), 0)
    return Call(
        tokens_BT=tokens,
        rows=rows,
        count=count,
        mask_BS=_mask(given.get("attention_mask"), rows),
        positions_BT=_position_ids(given.get("position_ids"), rows, count),
        located=_located(given, count, locate),
        past=_past_length(given),
        cache=cache,
        kept=kept,
    )


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return {f"_{i}": value for i, value in enumerate(args)} | kwargs
    flat: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            flat |= {f"_{i}": item for i, item in enumerate(value)}
        else:
            flat[name] = value
    return flat


def _token_ids(given: dict[str, Any]) -> Tensor | None:
    """Return the token ids: `input_ids`, or the first tensor of integers with one or two axes."""
    candidates = [given.get("input_ids"), *(v for k, v in given.items() if k not in ("attention_mask", "position_ids"))]
    return next((value for value in candidates if isinstance(value, Tensor) and value.dim() in (1, 2)
                 and value.dtype in (torch.int64, torch.int32)), None)  # fmt: skip


def _mask(mask: Any, rows: int) -> list[list[int]] | None:
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows:
        return None
    return [[int(bool(m)) for m in row] for row in mask.tolist()]


def _position_ids(positions: Any, rows: int, count: int) -> list[list[int]] | None:
    if not isinstance(positions, Tensor):
        return None
    if positions.dim() == 3:  # multimodal rotary embeddings have three axes of position; text has them equal
        positions = positions[0]
    if positions.dim() == 1:
        positions = positions[None]
    if positions.dim() != 2 or positions.shape[1] != count or positions.shape[0] not in (1, rows):
        return None
    found: list[list[int]] = positions.expand(rows, count).tolist()
    return found


def _located(given: dict[str, Any], count: int, locate: Locate | None) -> list[int] | None:
    told = locate(given) if locate is not None else given.get("cache_position")
    if told is None:
        return None
    values = [int(v) for v in torch.as_tensor(told).reshape(-1).tolist()]
    if len(values) == count:
        return values
    return [values[0] + i for i in range(count)] if len(values) == 1 else None


def _past_length(given: dict[str, Any]) -> int | None:
    past = given.get("past_key_values")
    if isinstance(past, tuple | list):
        rows = next((item for item in past if item is not None), None)
        return int(rows[1].shape[-2]) if rows is not None and isinstance(rows[1], Tensor) else 0
    if past is None or not hasattr(past, "get_seq_length"):
        return None
    try:
        return int(past.get_seq_length())
    except Exception:  # a cache without attention layers may not know
        return None


@dataclass(slots=True)
class _Context:
    """One sequence as it has been fed so far: the token at every position, None where nobody saw it go in."""

    tokens: list[int | None] = field(default_factory=list)

    def feed(self, positions: Sequence[int], tokens: Sequence[int | None]) -> None:
        for position, token in zip(positions, tokens, strict=True):
            self.tokens += [None] * (position - len(self.tokens))
            self.tokens[position:] = [token]


class Placer:
    """Follows the calls of one run and tells where their rows stand.

    `sequence` is the reference's token at every position; without it the calls themselves are believed, and
    `sequence_of_last_call` is what they fed. `row` names the batch row; None takes the one whose tokens agree best.
    """

    def __init__(self, sequence: Sequence[int | None] | None = None, row: int | None = None) -> None:
        self.sequence, self.row = sequence, row
        self.sequence_of_last_call: list[int | None] = []
        self._contexts: dict[object, list[_Context]] = {}
        self._latest: list[_Context] = []
        self._held: list[Any] = []  # caches, so that no other object takes their id
        self._last_row = 0

    def place(self, call: Call) -> Placed:
        """Return where a call's rows stand, and take its tokens in."""
        before = self._contexts_of(call)
        found = [self._place_row(call, b, before[b]) for b in range(call.rows)]
        row = self._choose(found)
        after = [context for context, _ in found]
        self._latest = after
        if call.cache is not None:
            self._remember(call.cache, after)
        self._last_row = row
        self.sequence_of_last_call = after[row].tokens
        return found[row][1]

    def called(self, output: Any) -> None:
        """Take note of the cache that a call made for itself."""
        cache = next((c for name in _CACHES if (c := getattr(output, name, None)) is not None), None)
        if cache is not None and not isinstance(cache, tuple | list | Tensor):
            self._remember(cache, self._latest)

    def _remember(self, cache: Any, contexts: list[_Context]) -> None:
        if id(cache) not in self._contexts:
            self._held.append(cache)
        self._contexts[id(cache)] = contexts

    def _contexts_of(self, call: Call) -> list[_Context]:
        """Return each batch row's context: of its cache, else (a copied cache, a state) the latest, as it is."""
        known = self._contexts.get(id(call.cache)) if call.cache is not None else None
        known = known if known is not None else self._latest
        if len(known) != call.rows:
            source = known[self._last_row] if self._last_row < len(known) else _Context()
            return [_Context(list(source.tokens)) for _ in range(call.rows)]
        return [_Context(list(context.tokens)) for context in known]

    def _choose(self, found: Sequence[tuple[_Context, Placed]]) -> int:
        if self.row is not None:
            return min(self.row, len(found) - 1)
        if self.sequence is None:
            return 0
        return max(range(len(found)), key=lambda b: (len(found[b][1].positions), b == self._last_row, -b))

    def _place_row(self, call: Call, row: int, context: _Context) -> tuple[_Context, Placed]:
        columns = _real_columns(call, row)
        ids = None if call.tokens_BT is None else call.tokens_BT[row]
        tokens: list[int | None] = [None if ids is None else ids[column] for column in columns]
        guesses = list(_guesses(call, row, columns, context, tokens))
        positions = _without_hole(call, context, guesses[0])
        if self.sequence is not None:
            agreeing = [guess for guess in guesses if self._agrees(context, guess, tokens)]
            known = bool(agreeing) or _continues(call, context, guesses[0])
            searched = [] if known else [self._searched(context, tokens, guesses[0])]
            positions = [*agreeing, *filter(None, searched), guesses[0]][0]
        good = self._matching(context) if self.sequence is not None else 0
        kept, stray = [], None
        for column, position, token in zip(columns, positions, tokens, strict=True):
            if self.sequence is None:
                kept.append((column, position))
                continue
            good = min(good, position) if position <= len(context.tokens) else good
            context.feed([position], [token])
            if position >= len(self.sequence) or good < position:
                continue
            if _same(token, self.sequence[position]):
                kept.append((column, position))
                good = position + 1
            elif stray is None and position:
                stray = position
        if self.sequence is None:
            context.feed(positions, tokens)
        moved = sum(a != b for a, b in zip(positions, guesses[0], strict=True))
        return context, Placed(row, tuple(kept), stray, moved, call.count, _beyond(call, row, positions))

    def _matching(self, context: _Context) -> int:
        """Return how many of a context's first tokens are the reference's."""
        assert self.sequence is not None
        pairs = zip(context.tokens, self.sequence, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if not _same(a, b)),
                    min(len(context.tokens), len(self.sequence)))  # fmt: skip

    def _agrees(self, context: _Context, positions: Sequence[int], tokens: Sequence[int | None]) -> bool:
        assert self.sequence is not None
        if not positions or (positions[0] > self._matching(context) and positions[0] <= len(context.tokens)):
            return False
        known = [(p, t) for p, t in zip(positions, tokens, strict=True) if p < len(self.sequence)]
        return bool(known) and all(_same(t, self.sequence[p]) for p, t in known)

    def _searched(self, context: _Context, tokens: Sequence[int | None], named: Sequence[int]) -> list[int] | None:
        """Return the run of positions nearest to those named at which the tokens are the reference's."""
        assert self.sequence is not None
        starts = range(min(self._matching(context), len(self.sequence)) + 1)
        runs = [[start + i for i in range(len(tokens))] for start in starts]
        fitting = [run for run in runs if self._agrees(context, run, tokens)]
        if not named or not fitting:
            return None
        return min(fitting, key=lambda run: abs(run[0] - named[0]))


def _beyond(call: Call, row: int, positions: Sequence[int]) -> int:
    hidden = call.mask_BS is not None and not all(call.mask_BS[row])
    if hidden or call.past is None or not positions:
        return 0
    return max(0, call.past - positions[0])


def _continues(call: Call, context: _Context, named: list[int]) -> bool:
    """Whether a call goes on right behind what its cache was fed: another token there is another text.

    A cache that tells no length is believed where the call names its positions.
    """
    told = call.past if call.past is not None else named[0] if named and call.located is not None else None
    return call.cache is not None and bool(named) and told == named[0] == len(context.tokens)


def _without_hole(call: Call, context: _Context, named: list[int]) -> list[int]:
    """Return the positions that a call names, or those right behind its context where the named ones leave a hole.

    A cache that holds just the tokens that were fed shows that nothing stands in between: the positions are wrong, and
    the rows are the text's next all the same.
    """
    fed = len(context.tokens)
    if named and call.past == fed > 0 and named[0] > fed:
        return [fed + position - named[0] for position in named]
    return named


def _same(left: int | None, right: int | None) -> bool:
    return left is None or right is None or left == right


def _real_columns(call: Call, row: int) -> list[int]:
    """Return the columns of a call that are no padding."""
    here = _mask_here(call, row)
    return [column for column in range(call.count) if here is None or here[column]]


def _mask_here(call: Call, row: int) -> list[int] | None:
    """Return the part of the mask that covers this call's tokens, or None where it does not."""
    if call.mask_BS is None:
        return None
    mask, past = call.mask_BS[row], call.past or 0
    if len(mask) < call.count:
        return None
    start = past if past + call.count <= len(mask) else len(mask) - call.count
    return mask[start : start + call.count]


def _guesses(
    call: Call, row: int, columns: Sequence[int], context: _Context, tokens: Sequence[int | None]
) -> Iterator[list[int]]:
    """Yield where the real tokens may stand, the most telling first."""
    mask = None if call.mask_BS is None else call.mask_BS[row]
    if mask is not None and not all(mask) and len(mask) >= call.count:
        past = call.past or 0
        start = past if past + call.count <= len(mask) else len(mask) - call.count
        yield [sum(mask[: start + column]) for column in columns]
    if call.positions_BT is not None:
        yield [call.positions_BT[row][column] for column in columns]
    if call.located is not None:
        yield [call.located[column] for column in columns]
    if call.past is not None:
        yield [call.past + i for i in range(len(columns))]
    restart, after = ([start + i for i in range(len(columns))] for start in (0, len(context.tokens)))
    grown = len(tokens) >= len(context.tokens) > 0 and list(tokens[: len(context.tokens)]) == context.tokens
    grown = grown and tokens != [None] * len(tokens)
    yield from (restart, after) if grown else (after, restart)
