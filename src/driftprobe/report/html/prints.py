"""Both fingerprints of a cell, for the page: each kept once, the gravest cells first while there is room."""

from __future__ import annotations

from collections.abc import Sequence

from driftprobe.judgement import Cell, Status
from driftprobe.report.html.pool import Words, encode, name, short
from driftprobe.report.html.views import View
from driftprobe.trace import Record


class Prints:
    """Fingerprints by number, `budget` bytes of them."""

    def __init__(self, words: Words, budget: int) -> None:
        self.encoded: list[str] = []
        self.left_out = 0
        self._words, self._room = words, budget
        self._known: dict[str, int] = {}
        self._seen: dict[int, int] = {}
        """Record, by its id, -> number; the views hold every record for as long as this lives."""

    def take(self, views: Sequence[View]) -> None:
        """Take both sides of every cell while there is room: what fails first, then what differs, then the rest."""
        for cell in sorted((cell for view in views for cell in view.cells), key=_order):
            for record in (cell.reference, cell.candidate):
                self._add(record)

    def number(self, record: Record) -> int:
        """Return the number of a record's fingerprint, -1 where it was left out."""
        return self._seen.get(id(record), -1)

    def json(self) -> str:
        """Return all fingerprints as one JSON array."""
        return "[" + ",".join(self.encoded) + "]"

    def _add(self, record: Record) -> None:
        if id(record) in self._seen:
            return
        text = self._text(record)
        if text in self._known:
            self._seen[id(record)] = self._known[text]
            return
        if self._room < len(text) + 1:
            self.left_out += 1
            return
        self._room -= len(text) + 1
        self._known[text] = self._seen[id(record)] = len(self.encoded)
        self.encoded.append(text)

    def _text(self, r: Record) -> str:
        shape = None if r.shape is None else "×".join(map(str, r.shape))
        return encode([
            r.hash[2:] if r.hash.startswith("0x") and len(r.hash) == 18 else [name(r.hash)],
            None if r.dtype is None else self._words.add(r.dtype),
            None if shape is None else self._words.add(shape),
            *(short(value, 6) for value in (r.l2, r.abs_sum, r.min, r.max, r.mean)),
            r.nz_count, r.nan_count, r.inf_count, r.source[:1], r.token_id, r.logical_tok_idx, r.pos_id,
        ])  # fmt: skip


def _order(cell: Cell) -> tuple[bool, bool]:
    return (cell.status is not Status.FAIL, cell.drift.equal)
