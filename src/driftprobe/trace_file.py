"""The trace file: its writer and its reader, and the MUSTs of docs/trace-format.md that one file can show.

Each line is flushed, so a killed process leaves a valid, incomplete trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from driftprobe.errors import OutputError, TraceError
from driftprobe.trace import SCHEMA, Event, Footer, Header, Item, Record, Trace, encode_line
from driftprobe.trace_checks import Fault, header_faults, json_object, record_faults
from driftprobe.written import reader_of

TOGETHER = 1024
"""Lines that are written together at most."""
MAX_LINE = 64 * 1024 * 1024
"""Bytes of the longest line that is read: a K row hash for each of 2 million positions fits."""


@dataclass(slots=True)
class Line:
    """A record's line, ready to be written."""

    raw: bytes
    prompt: str
    key: tuple[object, ...]
    """The record's."""
    faults: list[Fault]
    """What is wrong with it by itself; what disagrees with other lines, its writer finds."""


def line_of(record: Record, sketch_size: int) -> Line:
    """Return a record's line, so that another thread than the writer's can make it."""
    return Line(encode_line("record", record), record.prompt, record.key, record_faults(record, sketch_size))


def faults_of(item: Item, sketch_size: int | None) -> list[Fault]:
    """Return what is wrong with the content of a line by itself."""
    if isinstance(item, Header):
        return header_faults(item)
    return record_faults(item, sketch_size) if isinstance(item, Record) else []


class TraceWriter:
    """Write one trace; a context manager whose clean end writes the footer.

    Each line passes the reader's checks before it is written, so that no trace is written that cannot be
    read: JSON would turn a NaN statistic into null without a word. Raises TraceError for such a line, and
    OutputError where the file cannot be written.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self._lines = 0
        self._checks = Checks(path.name)
        first = self._checked("header", header)
        with _Writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb", buffering=0)  # nothing is left to flush when a full disk closes it
            self._write(first)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._write(self._checked("footer", self._checks.footer()))
        self._file.close()

    def record(self, record: Record) -> None:
        """Append a record and flush it."""
        self._write(self._checked("record", record))

    def event(self, event: Event) -> None:
        """Append an event and flush it."""
        self._write(self._checked("event", event))

    def group(self, items: Iterable[Line | Event]) -> None:
        """Append records and events and flush them together; those before one that is refused are written."""
        whole: list[bytes] = []
        try:
            for item in items:
                if isinstance(item, Event):
                    self._write_lines(whole)
                    self.event(item)
                else:
                    whole.append(self._taken(item))
                    if len(whole) >= TOGETHER:
                        self._write_lines(whole)
        finally:
            self._write_lines(whole)

    def _write_lines(self, whole: list[bytes]) -> None:
        """Digest and write the lines of records, which are checked, and leave none in the list."""
        joined = b"".join(whole)
        self._checks.take_in(memoryview(joined), len(whole))
        whole.clear()
        self._write(joined)

    def _checked(self, kind: str, item: Item) -> bytes:
        self._lines += 1
        raw = encode_line(kind, item)
        self._fits(raw)
        for problem in self._checks.item(self._lines, raw, item, self._checks.own_faults(item)):
            raise problem.as_error()
        return raw

    def _taken(self, line: Line) -> bytes:
        self._lines += 1
        self._fits(line.raw)
        for problem in self._checks.line(self._lines, line):
            raise problem.as_error()
        return line.raw

    def _fits(self, raw: bytes) -> None:
        if len(raw) > MAX_LINE:
            raise too_long(self.path.name, self._lines).as_error()

    def _write(self, line: bytes) -> None:
        with _Writing(self.path):
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) or 0 :]


class _Writing:
    """Turn an OSError of a write into the five-part message."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError):
            raise OutputError(
                "cannot write the output", where=str(self.path), measured=error.strerror or str(error),
                allowed="a writable place with room left",
                next_step="free some space or choose another place with --out",
            ) from error  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one line of a trace, and how to mend it."""

    file: str
    line: int
    """0 where the file as a whole is meant."""
    what: str
    measured: str
    allowed: str
    mend: str

    @property
    def where(self) -> str:
        """The place in words."""
        return f"{self.file}, line {self.line}" if self.line else self.file

    def as_error(self) -> TraceError:
        """Return the problem as the error that stops a command."""
        return TraceError(
            self.what, where=self.where, measured=self.measured, allowed=self.allowed,
            next_step=f"{self.mend}; `driftprobe validate` lists every line",
        )  # fmt: skip


_KINDS: dict[str, type[Item]] = {"header": Header, "record": Record, "event": Event, "footer": Footer}


@dataclass(slots=True)
class Scan:
    """A file read line by line: what was understood, what was not."""

    items: list[tuple[int, Item]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    damage: str = ""

    @property
    def header(self) -> Header | None:
        """The header; None where no line is one."""
        return next((item for _, item in self.items if isinstance(item, Header)), None)

    def trace(self, name: str) -> Trace | None:
        """Return what was understood as a trace; None where no line is a header."""
        header = self.header
        if header is None:
            return None
        records = tuple(item for _, item in self.items if isinstance(item, Record))
        events = tuple(item for _, item in self.items if isinstance(item, Event))
        return Trace(header, records, events, name, self.damage)


_as_written = reader_of(Record, "record")

Lines = Iterable[tuple[int, "bytes | None"]]
"""Lines with their numbers, as `lines` yields them."""


def scan(path: Path, content: Lines | None = None) -> Scan:
    """Read a file line by line and check every MUST that one file can show. Never raises for its content.

    `content` are its lines, where they do not stand in it as they are (packed.py).
    """
    found, checks = Scan(), Checks(path.name)
    for number, raw in lines(path) if content is None else content:
        if raw is None:
            found.problems.append(too_long(path.name, number))
            return found
        if not raw.endswith(b"\n") and checks.header is not None and not checks.footer_seen:
            found.damage = f"last line (line {number}) is cut after {len(raw)} bytes"
            break
        item = checks.parse(number, raw)
        if isinstance(item, Problem):
            found.problems.append(item)
            checks.unread = True
            continue
        found.problems += checks.item(number, raw, item, checks.own_faults(item))
        found.items.append((number, item))
    if not found.damage and checks.header is not None and not checks.footer_seen:
        found.damage = f"no footer after line {found.items[-1][0]}: the writer did not finish"
    if checks.header is None and not any(problem.line == 1 for problem in found.problems):
        found.problems.insert(0, Problem(path.name, 1, "no header", "no line of type header",
                                         "a header as the first line", "write the header first"))  # fmt: skip
    return found


def read_trace(path: Path) -> Trace:
    """Return one trace of our own format; a trace that only lacks its end is returned with `damage` set.

    Raises TraceError for anything else that breaks the format.
    """
    found = scan(path)
    if found.problems:
        raise found.problems[0].as_error()
    trace = found.trace(path.name)
    assert trace is not None, "a scan without problems has a header"
    return trace


def lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its number; None in place of one that is longer than MAX_LINE, and then no more."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            yield number, (None if len(raw) > MAX_LINE else raw)
            if len(raw) > MAX_LINE:
                return


def too_long(name: str, number: int) -> Problem:
    """Return the problem of a line that is longer than MAX_LINE."""
    return Problem(name, number, "line too long", f"over {MAX_LINE} bytes", f"{MAX_LINE} bytes a line",
                   "write one record a line")  # fmt: skip


class Checks:
    """The MUSTs of one file, checked as its lines go by."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.header: Header | None = None
        self.footer_seen = self.unread = False
        self._keys: dict[object, int] = {}
        self._counts = {Record: 0, Event: 0}
        self._digest = hashlib.sha256()

    def problem(self, line: int, what: str, measured: str, allowed: str, mend: str) -> Problem:
        return Problem(self.name, line, what, measured[:200], allowed, mend)

    def parse(self, number: int, raw: bytes) -> Item | Problem:
        record = _as_written(raw)
        if record is not None:
            return record
        try:
            body = json_object(raw)
        except ValueError as error:
            return self.problem(number, "invalid JSON", str(error), "one JSON object a line (RFC 8259)",
                                "mend or remove the line")  # fmt: skip
        kind = body.get("type")
        if not isinstance(kind, str) or kind not in _KINDS:
            return self.problem(number, "unknown line type", repr(kind), ", ".join(_KINDS), "correct the type field")
        if kind == "header" and body.get("schema") != SCHEMA:
            return self.problem(number, "unknown schema version", repr(body.get("schema")), SCHEMA,
                                "read it with the driftprobe version that wrote it, or write this schema")  # fmt: skip
        try:
            return msgspec.convert(body, _KINDS[kind])
        except msgspec.ValidationError as error:
            return self.problem(number, f"{kind} does not fit the schema", str(error),
                                "the fields and types of docs/trace-format.md", "correct the field named")  # fmt: skip

    def own_faults(self, item: Item) -> list[Fault]:
        """Return what is wrong with an item by itself, in a trace of this header."""
        return faults_of(item, None if self.header is None else self.header.sketch_size)

    def item(self, number: int, raw: bytes, item: Item, faults: list[Fault]) -> list[Problem]:
        """Check an understood line, whose own faults are known, against the lines before it, and take it in."""
        if self.footer_seen:
            return [self.problem(number, "line after the footer", "one more line", "the footer is the last line",
                                 "write the footer when all records are out")]  # fmt: skip
        found: list[Problem] = []
        if isinstance(item, Header):
            if number != 1:
                found.append(self.problem(number, "header out of place", f"line {number}", "line 1", "write it first"))
            self.header = self.header or item
        elif isinstance(item, Footer):
            found += self._footer(number, item)
        else:
            self._counts[type(item)] += 1
            found += self._record(number, item.prompt, item.key) if isinstance(item, Record) else []
        found += [self.problem(number, *parts) for parts in faults]
        self._digest.update(raw)
        return found

    def line(self, number: int, line: Line) -> list[Problem]:
        """Check a record's line against those before it; `take_in` counts it."""
        found = self._record(number, line.prompt, line.key)
        return found + [self.problem(number, *parts) for parts in line.faults] if line.faults else found

    def take_in(self, raw: memoryview, records: int) -> None:
        """Count lines that hold only records, and were checked by others (`line`, `columns.breaks_a_must`)."""
        self._counts[Record] += records
        self._digest.update(raw)

    def footer(self) -> Footer:
        """Return the footer that fits the lines taken in so far."""
        records, events = self._counts[Record], self._counts[Event]
        return Footer(records=records, events=events, sha256=self._digest.hexdigest())

    def _footer(self, number: int, item: Footer) -> list[Problem]:
        self.footer_seen = True
        measured, stated = asdict(self.footer()), asdict(item)
        if measured == stated or self.unread:  # a line that was not understood has been told, and is not counted
            return []
        wrong = ", ".join(f"{n} {m}, footer says {stated[n]}" for n, m in measured.items() if m != stated[n])
        return [self.problem(number, "footer disagrees with the lines before it", wrong, "equal counts and digest",
                             "write the trace again; a line was lost, added or changed")]  # fmt: skip

    def _record(self, number: int, prompt: str, own: tuple[object, ...]) -> list[Problem]:
        found = []
        key = (prompt, *own)
        first = self._keys.setdefault(key, number)
        if first != number:
            found.append(self.problem(number, "duplicated key", f"{key}, first on line {first}",
                                      "one record for arm, phase, step, layer, tensor and position",
                                      "remove one of the two, or give them different keys"))  # fmt: skip
        if self.header and prompt != self.header.prompt:
            found.append(self.problem(number, "record of another prompt", repr(prompt), repr(self.header.prompt),
                                      "write one file for each prompt"))  # fmt: skip
        return found


def read_header(path: Path) -> Header | None:
    """Return the header of a trace of our own, or None where the first line is none."""
    first = next(iter(lines(path)), (1, None))[1]
    if first is None:
        return None
    item = Checks(path.name).parse(1, first)
    return item if isinstance(item, Header) else None
