"""assert_equivalent(): a test's assertion that a model's prefill and decode differ by arithmetic alone.

Light until it is called: the pytest plugin imports this module in every test session.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from driftprobe.accepted import MISMATCH, Accepted, Finding
from driftprobe.errors import UsageError

if TYPE_CHECKING:
    from driftprobe.result import Result

PASSING = ("NO_DRIFT", "STRUCTURAL_DRIFT")
"""The verdicts that an assertion holds with."""


class NotEquivalentError(AssertionError):
    """The assertion's failure; its text is what a person needs to see. `result` is the whole of it."""

    def __init__(self, text: str, result: Result) -> None:
        self.result = result
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one check, as the session hears of it."""

    name: str
    finding: Finding
    accepted: bool = False
    """A known mismatch, as the file has it."""
    accept_now: bool = False
    """A mismatch that this session was asked to accept."""


@dataclass(slots=True)
class Session:
    """What a running test tells each of its checks; the pytest plugin sets it."""

    name: str
    """Of the test."""
    folder_of: Callable[[str], Path]
    """The artifacts folder of a check, by its name."""
    known: Callable[[], Mapping[str, Accepted]]
    accept: frozenset[str]
    """Names of checks whose mismatch is to be accepted."""
    told: Callable[[Outcome], None]
    checks: int = 0
    """Checks made so far; the second of a test is `NAME#2`."""
    results: list[Any] = field(default_factory=list)
    """Their results."""

    def name_of(self, given: str | None) -> str:
        """Return the name of the next check."""
        self.checks += 1
        return given or (self.name if self.checks == 1 else f"{self.name}#{self.checks}")


class _Running:
    """The session of the test that runs in this process, if one does."""

    session: Session | None = None


def set_session(session: Session | None) -> None:
    """Say which test runs now; None after it."""
    _Running.session = session


def assert_equivalent(
    model: Any,
    prompts: Any = None,
    *,
    modes: str | Iterable[str] = "both",
    name: str | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Result:
    """Probe a model and return the result; raise NotEquivalentError unless prefill and decode agree up to rounding.

    `model`, `prompts` and `options` are those of `driftprobe.probe` (dtype, attn, steps, tokenizer, ladder, …), `modes`
    is `both`, a mode or a list of them. `N/A` is no agreement and fails as well. `name` names the check in the file of
    accepted mismatches; it is the test's id where it is not given. `out` is the artifacts folder; in a test of pytest
    it lies below `--driftprobe-dir`, and otherwise it is kept only where the assertion fails.

    Raises UsageError for input that cannot be used, EngineError where the model fails while it runs.
    """
    __tracebackhide__ = True
    from driftprobe.api import probe

    session = _Running.session
    called = session.name_of(name) if session else name or "the check"
    result = probe(model, prompts, mode=_mode(modes), **options)
    finding = finding_of(result)
    if session:
        session.results.append(result)
        out = out or session.folder_of(called)
    passed = finding.verdict in PASSING
    if out is None and not passed:
        out = tempfile.mkdtemp(prefix="driftprobe-")
    report = None if out is None else result.write(out)
    outcome = _outcome(called, finding, session)
    if session:
        session.told(outcome)
    if not passed and not (outcome.accepted or outcome.accept_now):
        assert report is not None, "what fails is written"
        raise NotEquivalentError(failure_text(result, report, called, session), result)
    return result


def _mode(modes: str | Iterable[str]) -> str:
    """Return the word of `probe`. Raises UsageError for no mode; `probe` does for an unknown one."""
    if isinstance(modes, str):
        return modes
    chosen = sorted(set(modes))
    if not chosen:
        raise UsageError(
            "no mode to run", where="modes", measured="an empty list",
            allowed="both, as_designed, kv_aligned, or a list of them", next_step="leave modes out",
        )  # fmt: skip
    return "both" if chosen == ["as_designed", "kv_aligned"] else chosen[0] if len(chosen) == 1 else ",".join(chosen)


def finding_of(result: Result) -> Finding:
    """Return what must stay the same for a mismatch to stay accepted."""
    from driftprobe.taps import place

    first = result.first_failure
    if first is None:
        return Finding(result.verdict.value, "", "")
    cause = first.diagnosis.cause if first.diagnosis is not None else ""
    return Finding(result.verdict.value, place(first.layer, first.tensor), cause)


def _outcome(name: str, finding: Finding, session: Session | None) -> Outcome:
    if session is None or finding.verdict in PASSING:
        return Outcome(name, finding)
    entry = session.known().get(name)
    accepted = entry is not None and entry.finding == finding
    now = not accepted and name in session.accept and finding.verdict == MISMATCH
    return Outcome(name, finding, accepted, now)


def failure_text(result: Result, report: Path, name: str, session: Session | None) -> str:
    """Return what a failing assertion prints: verdict, first failure, cause, report, and what can be done."""
    first, finding = result.first_failure, finding_of(result)
    lines = [f"driftprobe: {finding.verdict}: prefill and decode do not agree", f"  why:            {result.reason}"]
    if first is not None:
        lines.append(
            f"  first failure:  {finding.first_tap} (prompt {first.prompt}, step {first.step}): "
            f"drift {first.drift:.2e}, floor {first.floor:.2e}, ×{first.excess:.3g}"
        )
        lines.append(f"  cause:          {first.root_cause}")
    lines.append(f"  report:         {report.as_posix()}")
    entry = session.known().get(name) if session else None
    if entry is not None:
        lines.append(f"  accepted was:   {entry.finding} ({entry.reason}); this is another one")
    if session and finding.verdict == MISMATCH:
        accept = f"--driftprobe-accept {shlex.quote(name)} --driftprobe-reason WHY"
        first_remove = "" if entry is None else ", once the old entry is removed"
        lines.append(f"  next:           mend it; or accept it: {accept}{first_remove}")
    else:
        lines.append("  next:           read the report: its last section says what to do")
    return "\n".join("".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines)
