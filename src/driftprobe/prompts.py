"""Prompts: the built-in ones, cut to exact token counts, and a user's own from text or a file."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from driftprobe.boundaries import Boundaries
from driftprobe.engines.base import Engine
from driftprobe.errors import UsageError
from driftprobe.plan import Prompt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = (
    "A decoder reads a prompt in one pass and then writes one token at a time. Both ways compute the same numbers, "
    "up to rounding, unless one of them has a bug. "
)
SHORT_TEXT = "Hi"
LENGTHS = {"p0_short": 2, "p6_len_16": 16, "p6_len_32": 32}
"""Built-in prompts and their token counts; p0_short has at most this many."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")

Source = str | Sequence[int]


def builtin_prompt(name: str, engine: Engine) -> Prompt:
    """Return a built-in prompt, cut to its token count under the model's own tokenizer.

    Without a tokenizer the prompt is token ids 1, 2, 3, … instead. Raises UsageError for an unknown name.
    """
    if name not in LENGTHS:
        raise UsageError(
            "unknown prompt", where="--prompts", measured=name, allowed=", ".join(LENGTHS),
            next_step="choose built-in names, or give your own with --prompt or --prompt-file",
        )  # fmt: skip
    length, text = LENGTHS[name], SHORT_TEXT if name == "p0_short" else TEXT
    tokens = engine.tokenize(text)
    while name != "p0_short" and len(tokens) < length:
        text += TEXT
        tokens = engine.tokenize(text)
    return make_prompt(name, tokens[:length], engine)


def boundary_prompts(found: Boundaries, engine: Engine, given: Sequence[Prompt] = ()) -> list[Prompt]:
    """Return a prompt for each boundary: the given prompts over and over, or the built-in text where none is given."""
    tokens = [token for prompt in given for token in prompt.token_ids] or engine.tokenize(TEXT)
    return [
        make_prompt(b.name, [tokens[i % len(tokens)] for i in range(b.prompt_length)], engine) for b in found.probed
    ]


def make_prompt(name: str, source: Source, engine: Engine) -> Prompt:
    """Return a prompt from text or token ids. Raises UsageError for a bad name, an id outside the vocabulary."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            "prompt name cannot be a file name", where="prompts", measured=repr(name)[:80],
            allowed="1 to 64 letters, digits, '.', '_', '+' or '-', the first a letter or digit",
            next_step="rename the prompt",
        )  # fmt: skip
    if isinstance(source, str) and any("\ud800" <= letter <= "\udfff" for letter in source):
        raise UsageError("text is not Unicode", where=f"prompt {name}", measured=repr(source)[:80],
                         allowed="text that UTF-8 can encode", next_step="correct the text")  # fmt: skip
    tokens = engine.tokenize(source) if isinstance(source, str) else list(source)
    vocabulary = engine.facts.vocabulary
    wrong = [t for t in tokens if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < (vocabulary or t + 1)]
    if wrong:
        raise UsageError(
            "not a token of this model", where=f"prompt {name}", measured=repr(wrong[0])[:80],
            allowed=f"whole numbers from 0 to {vocabulary - 1}", next_step="use ids of this model's own tokenizer",
        )  # fmt: skip
    return Prompt(name, tuple(tokens), engine.detokenize(tokens))


def make_prompts(sources: Mapping[str, Source] | Iterable[Source], engine: Engine) -> list[Prompt]:
    """Return prompts from names to sources, or from sources alone (named p0, p1, …)."""
    if isinstance(sources, str):
        raise UsageError("one text is not a list of prompts", where="prompts", measured=repr(sources)[:80],
                         allowed="names to sources, or a list of sources", next_step="put it in a list")  # fmt: skip
    named = sources if isinstance(sources, Mapping) else {f"p{i}": source for i, source in enumerate(sources)}
    return [make_prompt(name, source, engine) for name, source in named.items()]


def read_prompt_file(path: Path) -> dict[str, Source]:
    """Return names to text or token ids from a JSON or TOML file. Raises UsageError where it says anything else."""
    try:
        text = path.read_text(encoding="utf-8")
        body: Any = (
            tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text, object_pairs_hook=_unique)
        )
    except (OSError, ValueError, RecursionError) as error:
        raise _bad_file(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(body, dict) or not body:
        raise _bad_file(path, f"a {type(body).__name__} of {len(body) if hasattr(body, '__len__') else 0}")
    for name, source in body.items():
        if not isinstance(source, str | list):
            raise _bad_file(path, f"{name} is a {type(source).__name__}")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return dict(pairs)


def _bad_file(path: Path, measured: str) -> UsageError:
    return UsageError(
        "prompt file cannot be used", where=str(path), measured=measured[:300],
        allowed='JSON or TOML that maps names to text or to lists of token ids: {"greeting": "Hello", "ids": [1, 2]}',
        next_step="correct the file",
    )  # fmt: skip
