"""The pytest plugin: the fixture and the mark `driftprobe`, and the accepted mismatches of a test suite.

It is loaded in every session of an environment that has driftprobe, so it imports nothing heavy: numpy comes with the
first check, torch with the engine. With pytest-xdist a worker tells its findings in its reports' properties, and the
controller alone writes and sums up.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import pytest

from driftprobe.accepted import ACCEPTED_FILE, Accepted, Finding, add_accepted, read_accepted
from driftprobe.errors import DriftprobeError
from driftprobe.expect import PASSING, NotEquivalentError, Outcome, Session, assert_equivalent, set_session

PROPERTY = "driftprobe"
"""Name of the report's property that carries an outcome; pytest writes it into its JUnit XML as well."""
_DEFAULT_DIR = "artifacts/driftprobe"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options and the settings."""
    group = parser.getgroup("driftprobe", "driftprobe: does decode agree with prefill?")
    group.addoption("--driftprobe-dir", default=None, metavar="DIR",
                    help="where each check's reports go, below the root of the suite")  # fmt: skip
    group.addoption("--driftprobe-accept", action="append", default=[], metavar="NAME",
                    help="accept this check's mismatch from now on (with --driftprobe-reason); repeatable")  # fmt: skip
    group.addoption("--driftprobe-reason", default="", metavar="TEXT", help="why it is accepted, for the reviewer")
    parser.addini("driftprobe_dir", f"where each check's reports go (default: {_DEFAULT_DIR})", default=_DEFAULT_DIR)
    parser.addini("driftprobe_accepted", f"the file of accepted mismatches (default: {ACCEPTED_FILE})",
                  default=ACCEPTED_FILE)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark and the session's plugin. Raises pytest's UsageError for an acceptance without a reason."""
    config.addinivalue_line(
        "markers",
        "driftprobe(model, prompts=None, modes='both', **options): before the test runs, assert that the model's "
        "prefill and decode agree (driftprobe.assert_equivalent)",
    )
    if config.getoption("driftprobe_accept") and not config.getoption("driftprobe_reason").strip():
        raise pytest.UsageError("--driftprobe-accept needs --driftprobe-reason TEXT: why is this mismatch accepted?")
    config.pluginmanager.register(_Suite(config), "driftprobe-suite")


@pytest.fixture
def driftprobe(request: pytest.FixtureRequest) -> Checker:
    """Checks of this test: `driftprobe.assert_equivalent(model, prompts=…, dtype=…)`, and their results."""
    suite: _Suite = request.config.pluginmanager.get_plugin("driftprobe-suite")  # type: ignore[assignment]
    assert suite.running is not None, "a fixture is set up inside a test's run"
    return Checker(suite.running)


class Checker:
    """What the fixture gives."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def results(self) -> list[Any]:
        """The results of this test's checks so far, those of its marks first."""
        return list(self._session.results)

    def assert_equivalent(self, model: Any, prompts: Any = None, **options: Any) -> Any:
        """Probe a model and return the result; fail unless prefill and decode agree (driftprobe.assert_equivalent)."""
        __tracebackhide__ = True
        return assert_equivalent(model, prompts, **options)


class _Suite:
    """One test session: where its checks write, what it accepts, and what it has heard."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._file = config.rootpath / config.getini("driftprobe_accepted")
        self._folder: Path = config.rootpath / (config.getoption("driftprobe_dir") or config.getini("driftprobe_dir"))
        self._accept = frozenset(config.getoption("driftprobe_accept"))
        self._known: Mapping[str, Accepted] | None = None
        self._heard: dict[str, Outcome] = {}
        self._told: list[tuple[str, bool]] = []
        self.running: Session | None = None

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, None, None]:
        """Tell the checks of a test which test they belong to."""

        def told(outcome: Outcome) -> None:
            item.user_properties.append((PROPERTY, json.dumps(asdict(outcome))))

        self.running = Session(item.nodeid, self._folder_of, self._read, self._accept, told)
        set_session(self.running)
        yield
        set_session(None)
        self.running = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> None:
        """Make the checks of a test's marks, the outermost first; then the test itself runs."""
        __tracebackhide__ = True
        for mark in reversed(list(pyfuncitem.iter_markers("driftprobe"))):
            options = dict(mark.kwargs)
            if mark.args or "model" not in options:
                pytest.fail("@pytest.mark.driftprobe takes names alone, model=… among them", pytrace=False)
            try:
                assert_equivalent(_made(options.pop("model")), **options)
            except (NotEquivalentError, DriftprobeError) as error:
                pytest.fail(str(error), pytrace=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Hear the outcomes of a test; runs where tests run and, with xdist, on the controller."""
        if report.when == "teardown":
            for name, value in report.user_properties:
                if name == PROPERTY:
                    body = json.loads(str(value))
                    outcome = Outcome(**{**body, "finding": Finding(**body["finding"])})
                    self._heard[outcome.name] = outcome

    def pytest_sessionfinish(self) -> None:
        """Write what was accepted now, once, on the controller."""
        if hasattr(self._config, "workerinput"):
            return
        reason = self._config.getoption("driftprobe_reason")
        new = [Accepted(o.name, reason, o.finding) for o in self._heard.values() if o.accept_now]
        if new:
            add_accepted(self._file, new)
        self._told = list(self._lines())

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what was accepted, and what no longer needs to be."""
        if self._told:
            terminalreporter.section("driftprobe")
        for line, warns in self._told:
            terminalreporter.write_line(line, yellow=warns)

    def _lines(self) -> Iterator[tuple[str, bool]]:
        if not self._heard and not self._accept:
            return
        known, file = self._read(), self._file.name
        for outcome in self._heard.values():
            if outcome.accept_now:
                yield f"accepted from now on, in {file}: {outcome.name}: {outcome.finding}", True
            elif outcome.accepted:
                yield f"accepted: {outcome.name}: {outcome.finding}: {known[outcome.name].reason}", False
            elif outcome.name in known and outcome.finding.verdict in PASSING:
                yield (f"no longer happens: {outcome.name}: {known[outcome.name].finding}; now "
                       f"{outcome.finding.verdict}; remove its entry from {file}", True)  # fmt: skip
        for name in sorted(self._accept - self._heard.keys()):
            yield f"nothing to accept: no check of this run is called {name}", True
        for name in sorted(self._accept & self._heard.keys()):
            if not (self._heard[name].accept_now or self._heard[name].accepted):
                yield f"nothing to accept: {name} is {self._heard[name].finding.verdict}", True

    def _read(self) -> Mapping[str, Accepted]:
        if self._known is None:
            self._known = read_accepted(self._file)
        return self._known

    def _folder_of(self, name: str) -> Path:
        return self._folder / folder_name(name)


def folder_name(check: str) -> str:
    """Return a folder's name for a check's: its readable letters, and a digest that keeps two checks apart."""
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", check.replace(".py::", "-")).strip("-.")[-80:].lstrip("-.") or "check"
    return f"{plain}-{hashlib.sha256(check.encode('utf-8', 'replace')).hexdigest()[:8]}"


def _made(model: Any) -> Any:
    """Return a mark's model: a function is called for it, so that nothing is loaded while tests are collected."""
    return model() if isinstance(model, FunctionType | MethodType) else model
