"""What a row check amounts to: the cause of the fault dictionary with its parameters, and the words for it.

Hashes alone are enough: rows that are bit for bit another row of prefill's, empty, or another layer's, prove the cause.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from driftprobe.causes import Parameters
from driftprobe.judgement import RowCheck

MIN_BLOCK = 2
"""Rows of the smallest block that is called one: two single rows in each other's place are no block table's doing."""


def cause_of_rows(check: RowCheck, newest: int) -> tuple[str, Parameters] | None:
    """Return the one cause that explains every row of a check, with its parameters; None where rows match nothing.

    `newest` is the position of the step's own row, which a check leaves out.
    """
    kinds = [bool(check.moved), bool(check.zero), bool(check.other_layer)]
    if check.changed or not any(kinds):
        return None
    if check.moved:
        return None if check.other_layer else _cause_of_moved(check, newest)
    if check.other_layer:
        sources = {layer for _, layer in check.other_layer}
        return None if check.zero or len(sources) > 1 else ("cache_other_layer", {"source": sources.pop()})
    return "cache_zero", {"rows": tuple(sorted(check.zero))}


def _cause_of_moved(check: RowCheck, newest: int) -> tuple[str, Parameters] | None:
    pairs = dict(check.moved)
    if len(pairs) == 1 and not check.zero:
        ((row, source),) = pairs.items()
        return "cache_overwritten" if source == newest else "cache_duplicated", {"row": row, "source": source}
    offset = offset_of(check)
    if check.zero:
        return None if offset is None else ("cache_shift", {"offset": offset})
    if set(pairs) != set(pairs.values()):
        return None if offset is None else ("cache_shift", {"offset": offset})
    block = block_of(pairs)
    if block >= MIN_BLOCK:
        return "cache_blocks", {"block": block}
    if len(pairs) > 2 and offset is not None:
        return "cache_shift", {"offset": offset}
    return "cache_swapped", {"rows": tuple(sorted(pairs))}


def offset_of(check: RowCheck) -> int | None:
    """Return by how many slots all moved rows are off, if need be round the end of the rows; None if they differ.

    Positive: a row stands behind its own place.
    """
    straight = {position - source for position, source in check.moved}
    if len(straight) == 1:
        return straight.pop()
    count = max(check.compared, 1)
    offsets = {(position - source) % count for position, source in check.moved}
    if len(offsets) != 1:
        return None
    offset = offsets.pop()
    return offset if offset <= count // 2 else offset - count


def block_of(moved: dict[int, int]) -> int:
    """Return the rows of the largest aligned blocks that moved as wholes, 1 where there are none.

    A block of b rows starts at a position that b divides, and all its rows come from one such block, in order.
    """
    apart = math.gcd(*(position - source for position, source in moved.items()))
    sizes = [b for b in range(apart, 0, -1) if apart % b == 0]
    return next((b for b in sizes if all(_whole(moved, position // b * b, b) for position in moved)), 1)


def _whole(moved: dict[int, int], start: int, size: int) -> bool:
    """Whether all rows of one block moved together; rows alike in both places may be missing from `moved`."""
    here = [(i, moved[start + i]) for i in range(size) if start + i in moved]
    return start >= 0 and len(here) * 2 > size and len({source - i for i, source in here}) == 1


def rows_in_words(check: RowCheck) -> str:
    """Return what a check found in a clause, empty where it found every row in its place."""
    letter, layer = "K" if check.tensor == "k_cache" else "V", check.layer
    if check.zero and not check.moved and not check.changed:
        return f"{letter} {_rows(check.zero)} of layer {layer} {_are(check.zero)} zero"
    if check.other_layer and not check.moved:
        source = Counter(other for _, other in check.other_layer).most_common(1)[0][0]
        positions = [position for position, _ in check.other_layer]
        return (
            f"{letter} {_rows(positions)} of layer {layer} {_are(positions)} layer {source}'s: "
            "another layer's cache was read"
        )
    if check.moved:
        return _moved_in_words(check, letter)
    if check.changed:
        return (
            f"{letter} {_rows(check.changed)} of layer {layer} (of {check.compared}) "
            f"{'differs' if len(check.changed) == 1 else 'differ'} from prefill's and match no other row: "
            "overwritten, stale, or coarser than their dtype"
        )
    return ""


def _moved_in_words(check: RowCheck, letter: str) -> str:
    pairs, layer = dict(check.moved), check.layer
    if len(pairs) == 1 and not check.zero:
        ((row, source),) = pairs.items()
        return f"{letter} row {row} of layer {layer} holds prefill's row {source}"
    if len(pairs) == 2 and set(pairs) == set(pairs.values()):
        first, second = sorted(pairs)
        return f"{letter} rows {first} and {second} of layer {layer} stand in each other's place"
    block = block_of(pairs) if set(pairs) == set(pairs.values()) else 1
    if block >= MIN_BLOCK:
        return (
            f"{letter} {_rows(tuple(pairs))} of layer {layer} are prefill's in another order, in blocks of {block}: "
            "wrong block table"
        )
    offset = offset_of(check)
    if offset is not None:
        hold = "holds" if len(check.moved) == 1 else "hold"
        empty = f", and {_rows(check.zero)} {_are(check.zero)} zero" if check.zero else ""
        return (
            f"{letter} {_rows([p for p, _ in check.moved])} of layer {layer} {hold} prefill's rows shifted by "
            f"{'one' if abs(offset) == 1 else abs(offset)} ({'+' if offset > 0 else '−'}{abs(offset)}){empty}: "
            "wrong cache slot"
        )
    shown = ", ".join(f"{position}←{source}" for position, source in check.moved[:4])
    return f"{letter} rows of layer {layer} are prefill's in another order ({shown}): wrong slot or block table"


def _rows(positions: Sequence[int]) -> str:
    if len(positions) == 1:
        return f"row {positions[0]}"
    ordered = sorted(positions)
    if ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"rows {ordered[0]}–{ordered[-1]}"
    return f"{len(ordered)} rows ({', '.join(str(p) for p in ordered[:4])}{'…' if len(ordered) > 4 else ''})"


def _are(positions: Sequence[int]) -> str:
    return "is" if len(positions) == 1 else "are"
