"""A seal on a packed file: a hash of all its bytes, looked at before a library parses them.

A reader of Parquet may end the whole process on a file that was damaged. The hash stands in the file's own metadata, in
a field of fixed width that counts as zeros where the hash is taken. It tells damage; whoever makes a file can seal it.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import xxhash

OPEN = "0" * 16
"""What stands in the field `seal` before a file is sealed: the hash is sixteen hexadecimal digits."""
_FIELD = b'"seal": "'


def seal(path: Path) -> None:
    """Write the hash of a file's bytes (XXH3-64) into its field. Raises ValueError where it has none, and OSError."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as body:
        at = _place(body)
        body[at : at + len(OPEN)] = _hash(body, at).encode()


def is_sealed(path: Path) -> bool:
    """Whether a file has the bytes that it was sealed with. Raises OSError."""
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as body:
        try:
            at = _place(body)
        except ValueError:
            return False
        return body[at : at + len(OPEN)] == _hash(body, at).encode()


def _place(body: mmap.mmap) -> int:
    """Return where the last field's value begins: the metadata stands at a Parquet file's end."""
    found = body.rfind(_FIELD)
    if found < 0 or found + len(_FIELD) + len(OPEN) > len(body):
        raise ValueError("no field for a seal")
    return found + len(_FIELD)


def _hash(body: mmap.mmap, at: int) -> str:
    digest = xxhash.xxh3_64()
    with memoryview(body) as view, view[:at] as before, view[at + len(OPEN) :] as behind:
        for part in (before, OPEN.encode(), behind):
            digest.update(part)
    return f"{digest.intdigest():016x}"
