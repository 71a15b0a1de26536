"""Reads a line that stands as our own writers write it, and has no row hashes, sooner than the reader of any line.

The pattern knows a kind of line and its fields in the format's order, each at most once and without escapes, so that
what it matches has no key twice; msgspec then reads it and refuses numbers that are none. What does not match, or
cannot be read, is left to the reader of any JSON, and to its words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TypeVar

import msgspec

T = TypeVar("T")

_TEXT = r'"[^"\\]*"'
_NUMBER = r"-?[0-9][0-9.eE+-]{0,39}"
_NUMBERS = r'\[[^\[\]{}"]*\]'
_TOP = rf'\{{"ids":{_NUMBERS},"values":{_NUMBERS},"logsumexp":{_NUMBER}\}}'
_ANY = f"(?:{_TEXT}|{_NUMBER}|{_NUMBERS}|null|{_TOP})"


def reader_of(kind: type[T], word: str) -> Callable[[bytes], T | None]:
    """Return what reads lines of type `word` as a dataclass, or returns None for one that it leaves to others.

    What it returns is what `msgspec.convert` makes of the line's JSON object.
    """
    matches, read = _pattern(word, (spec.name for spec in fields(kind))).fullmatch, msgspec.json.Decoder(kind).decode  # type: ignore[arg-type]

    def reader(raw: bytes) -> T | None:
        if matches(raw) is None:
            return None
        try:
            return read(raw)
        except msgspec.DecodeError:  # a number that is none, text that is not UTF-8, a field of another type
            return None

    return reader


def _pattern(word: str, names: Iterable[str]) -> re.Pattern[bytes]:
    told = "".join(f'(?:,"{name}":{_ANY})?' for name in names)
    return re.compile(rf'\{{"type":"{word}"{told}\}}\n'.encode())
