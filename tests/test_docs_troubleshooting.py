"""docs/troubleshooting.md: every message listed is one that the source prints, every error of the source is listed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import driftprobe
from test_gates import ORDER

PACKAGE = Path(driftprobe.__file__).parent
PAGE = (Path(__file__).resolve().parents[1] / "docs/troubleshooting.md").read_text(encoding="utf-8")
HOLE = "…"
"""Stands for what a message fills in, on the page as in what `flat` makes of the source."""
TREES = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]


def flat(node: ast.AST | None) -> str:
    """A text of the source, with a hole for each value that is filled in; empty for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(flat(part) or HOLE for part in node.values)
    return ""


TEXTS = {flat(node) for tree in TREES for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)}


def listed() -> Iterator[str]:
    """Every message of the page: code in the first column, of the gates' table in the second."""
    for line in PAGE.splitlines():
        cells = line.split(" | ")
        if line.startswith("| ") and len(cells) > 2:
            yield from re.findall(r"`([^`]* [^`]*|[^`]{12,})`", cells[1] if len(cells) == 4 else cells[0])


def errors() -> Iterator[str]:
    """What each five-part error of the source says is wrong."""
    for tree in TREES:
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "id", "")
            if call.args and (any(word.arg == "next_step" for word in call.keywords) or name in {"_no_traces"}):
                yield flat(call.args[0])
            elif name == "_bad" and len(call.args) > 1:
                yield flat(call.args[1])


def test_every_listed_message_is_in_the_source() -> None:
    found = list(listed())
    assert len(found) > 120
    for message in found:
        assert message in TEXTS or (HOLE in message and any(message in text for text in TEXTS)), message


def test_every_error_of_the_source_is_listed() -> None:
    found, messages = {what for what in errors() if what}, set(listed())
    assert len(found) > 90
    shown = {what for what in found if what in messages or what.startswith("unknown ")}
    assert found == shown, sorted(found - shown)


def test_every_gate_is_listed_in_its_order() -> None:
    gates = re.findall(rf"^\| ({'|'.join(ORDER)}) \|", PAGE, flags=re.MULTILINE)
    assert list(dict.fromkeys(gates)) == ORDER


def test_the_example_is_what_is_printed() -> None:
    (example,) = re.findall(r"^```text\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    from driftprobe.errors import UsageError
    from driftprobe.faults import find_fault

    try:
        find_fault("rope_plus_on")
    except UsageError as error:
        assert re.fullmatch(re.escape(example.strip()).replace(re.escape(HOLE), ".*"), error.render())
