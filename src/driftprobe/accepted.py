"""Known mismatches that a test suite accepts: a TOML file under review, with a reason for each.

Accepted is a finding, not a test: another verdict, first tap or cause under the same name is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from driftprobe.errors import OutputError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ACCEPTED_FILE = "driftprobe-accepted.toml"
"""Where accepted mismatches stand, below the root of the test suite."""
MISMATCH = "MISMATCH"
"""The one verdict that can be accepted: `N/A` says that nothing is known, and nothing known is nothing to accept."""
MAX_BYTES = 1 << 20
"""Size of the longest file that is read."""
_HEAD = """\
# Mismatches that this project knows and accepts, each with its reason. One whose verdict, first tap or cause changes is
# no longer accepted; one that no longer happens is told, and its entry should go.
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, as far as it must stay the same to stay accepted."""

    verdict: str
    first_tap: str
    """`layer 0 q_rope`; empty where nothing failed."""
    cause: str
    """The diagnosis' name in the vocabulary of causes; empty where no known cause explains the failure."""

    def __str__(self) -> str:
        return ", ".join((self.verdict, self.first_tap or "no tap", self.cause or "no known cause"))


@dataclass(frozen=True, slots=True)
class Accepted:
    """One entry of the file."""

    name: str
    """Of the check: its test's id, or the name that it was given."""
    reason: str
    finding: Finding


def read_accepted(path: Path) -> dict[str, Accepted]:
    """Return the entries of a file by name; none where there is no file. Raises UsageError for a bad one."""
    if not path.exists():
        return {}
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        body = tomllib.loads(raw.decode("utf-8"))
        entries = body.pop("accepted", [])
        if body or not isinstance(entries, list):
            raise ValueError(f"{next(iter(body), 'accepted')!r} is not a list of tables [[accepted]]")
        found = [_entry(item) for item in entries]
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            "the file of accepted mismatches cannot be used", where=str(path), measured=str(error)[:300],
            allowed=f"tables [[accepted]] of texts: name, reason, {', '.join(spec.name for spec in fields(Finding))}",
            next_step="correct the file, or take it from version control again",
        ) from error  # fmt: skip
    names = [entry.name for entry in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError("a name is accepted twice", where=str(path), measured=twice[:200], allowed="each name once",
                         next_step="remove one of the two entries")  # fmt: skip
    return {entry.name: entry for entry in found}


def _entry(item: Any) -> Accepted:
    wanted = {"name", "reason", *(spec.name for spec in fields(Finding))}
    if not isinstance(item, Mapping) or set(item) != wanted or not all(isinstance(v, str) for v in item.values()):
        raise ValueError(f"an entry that has not exactly the texts {', '.join(sorted(wanted))}")
    if not item["name"].strip() or not item["reason"].strip():
        raise ValueError(f"entry {item['name']!r} lacks its name or its reason")
    if item["verdict"] != MISMATCH:
        raise ValueError(f"entry {item['name']!r} accepts {item['verdict']!r}; only {MISMATCH} can be accepted")
    return Accepted(item["name"], item["reason"], Finding(**{spec.name: item[spec.name] for spec in fields(Finding)}))


def add_accepted(path: Path, entries: list[Accepted]) -> None:
    """Append entries to the file, which is made where it is missing; what stands there stays as it is.

    Raises UsageError where a name is accepted already (as something else, or it would not have been asked for) or has
    no reason, OutputError where the file cannot be written.
    """
    known = read_accepted(path)
    for entry in entries:
        if entry.name in known:
            raise UsageError(
                "a mismatch of this name is accepted already", where=f"{path}, {entry.name}",
                measured=f"accepted {known[entry.name].finding}; now {entry.finding}",
                allowed="one entry for each name",
                next_step="look at what changed; then remove the old entry and accept again",
            )  # fmt: skip
        if not entry.reason.strip():
            raise UsageError(
                "accepted without a reason", where=entry.name, measured="an empty reason",
                allowed="a sentence for the reviewer", next_step="add --driftprobe-reason TEXT",
            )  # fmt: skip
    text = "".join(map(_table, entries))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text if path.stat().st_size else _HEAD + text)
    except OSError as error:
        raise OutputError("cannot write the file of accepted mismatches", where=str(path),
                          measured=error.strerror or str(error), allowed="a writable file with room left",
                          next_step="correct the permissions, or set `driftprobe_accepted` to another file",
                          ) from error  # fmt: skip


def _table(entry: Accepted) -> str:
    body = {"name": entry.name, "reason": entry.reason, **asdict(entry.finding)}
    return "\n[[accepted]]\n" + "".join(f"{key} = {_quoted(value)}\n" for key, value in body.items())


def _quoted(text: str) -> str:
    """Return a TOML basic string: JSON's, whose escapes TOML has too, with DEL escaped and no half of a surrogate."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return json.dumps(whole, ensure_ascii=False).replace("\x7f", "\\u007f")
