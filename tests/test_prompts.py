"""Prompts: exact token counts, names that are file names, files that say what they should."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from driftprobe.errors import UsageError
from driftprobe.prompts import LENGTHS, builtin_prompt, make_prompt, make_prompts, read_prompt_file


class Words:
    """A tokenizer of one token a word after a begin token, as some models' own."""

    facts = SimpleNamespace(vocabulary=100)

    def tokenize(self, text: str) -> list[int]:
        return [1, *(2 + len(word) % 90 for word in text.split())]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))


@pytest.mark.parametrize("name", LENGTHS)
def test_builtin_lengths_hold_under_any_tokenizer(name: str) -> None:
    assert len(builtin_prompt(name, Words()).token_ids) == LENGTHS[name]  # type: ignore[arg-type]


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="unknown prompt"):
        builtin_prompt("p9", Words())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a b", "x" * 65, "ä"])
def test_a_name_must_be_a_file_name(name: str) -> None:
    with pytest.raises(UsageError, match="file name"):
        make_prompt(name, [1], Words())  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, 100, 1.5, "1", True, None])
def test_ids_must_be_of_the_vocabulary(token: object) -> None:
    with pytest.raises(UsageError, match="not a token"):
        make_prompt("a", [0, token], Words())  # type: ignore[arg-type, list-item]


def test_files(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"a": "some text", "b": [1, 2]}')
    (tmp_path / "p.toml").write_text('a = "some text"\nb = [1, 2]\n')
    for name in ("p.json", "p.toml"):
        prompts = make_prompts(read_prompt_file(tmp_path / name), Words())  # type: ignore[arg-type]
        assert [(p.name, len(p.token_ids)) for p in prompts] == [("a", 3), ("b", 2)]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"a": 1}', "{", '"x"', '{"a": null}', '{"a": "x", "a": "y"}', "[" * 100_000]
)
def test_a_file_that_says_anything_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UsageError, match="prompt file"):
        read_prompt_file(tmp_path / "p.json")
