"""The exception tree. Every message has five parts, so that nobody has to guess what to do next.

DriftprobeError            the base: five parts and an exit code
├── UsageError             exit 2: a wrong option, name or value
│   ├── ModelError         a model folder or object that cannot be used
│   └── OutputError        an output place that cannot be written, or holds somebody's files
├── TraceError             exit 2: a trace that breaks the format
└── EngineError            exit 3: the engine failed while it ran; nothing can be told
"""

from __future__ import annotations


class DriftprobeError(Exception):
    """An error in five parts: what is wrong, where, what was measured, what is allowed, what to do next."""

    exit_code: int = 2

    def __init__(self, what: str, *, where: str, measured: str, allowed: str, next_step: str) -> None:
        self.what, self.where, self.measured = what, where, measured
        self.allowed, self.next_step = allowed, next_step
        super().__init__(self.render())

    def render(self) -> str:
        """Return the message as the terminal shows it: one line a part."""
        return (
            f"error: {self.what}\n  where:    {self.where}\n  measured: {self.measured}\n"
            f"  allowed:  {self.allowed}\n  next:     {self.next_step}"
        )


class UsageError(DriftprobeError):
    """A wrong option, name or value."""


class ModelError(UsageError):
    """A model folder or model object that cannot be used."""


class OutputError(UsageError):
    """An output place that cannot be written, or that holds files which are not ours."""


class TraceError(DriftprobeError):
    """A trace that breaks a MUST of docs/trace-format.md."""


class EngineError(DriftprobeError):
    """The engine failed while it ran, so nothing can be told (exit 3, like `N/A`)."""

    exit_code = 3
