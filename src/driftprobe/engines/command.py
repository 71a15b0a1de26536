"""Any program as an engine: a TOML file says how it is run, and each call writes one arm's trace (docs/engines.md).

The program is started once for each arm with its placeholders filled in, and writes one trace file, with
include/driftprobe.h or by itself. Its records are taken over as they are; whole tensors come with them where it keeps
payloads. What it prints goes to the run log. A call that fails gives an event `failed: …`, and with it `N/A`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from driftprobe.engines.base import BUILTIN, Ahead, Constant, Recorded
from driftprobe.errors import DriftprobeError, EngineError, ModelError, UsageError
from driftprobe.faults import Expected
from driftprobe.fingerprint import CAST_ROUNDOFF, SKETCH_SIZE, UNIT_ROUNDOFF
from driftprobe.payload import Payloads
from driftprobe.plan import ARMS, KNOBS, Arm, Mode, Plan, Prompt
from driftprobe.subprocesses import run_program
from driftprobe.trace import CONSTANTS, FAILED, EngineFacts, Event, Record, Trace
from driftprobe.trace_file import read_trace

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLACEHOLDERS = ("model", "prompt", "prompt_file", "prompt_len", "tokens", "phase", "mode", "arm", "layers", "seed",
                "steps", "out")  # fmt: skip
"""What may stand in the command between braces; docs/engines.md says what each becomes."""
_BRACES = re.compile(r"\{([A-Za-z_]*)\}")
_LAST_LINES = 5
_SHOWN = 16
"""How many token ids a message shows."""
_PHASES = {"P": "prefill_last", "D": "decode", "A": "decode", "E": "prefill_ext"}
"""First letter of an arm -> what `{phase}` becomes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The TOML file: how a program is run, and what it declares of itself."""

    command: list[str]
    """The program and its arguments, with placeholders in braces; no shell is between."""
    name: str = "command"
    arms: list[str] = field(default_factory=lambda: [*ARMS])
    """Arms that it knows, of `P`, `D`, `A`, `P'`, `D'` and `E`; the first two are needed."""
    knobs: list[str] = field(default_factory=list)
    """Knobs that it can turn, of `plan.KNOBS`: it is then asked for arms `P@threads`, `D@threads`, …"""
    time_limit: float = 600.0
    """Seconds that one call may take."""
    dtype: str = ""
    """What the model computes in; by default what its trace says."""
    max_positions: int = 0
    """The longest sequence in tokens; by default what its trace says."""
    trial: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Token ids of the short call that shows which taps there are."""
    tokenizer: str = ""
    """A tokenizer.json, relative to the TOML file; by default the one in the model's folder, if there is one."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that are set for it, `HIP_LAUNCH_BLOCKING` say; all others are those of this process."""
    casts: dict[str, str] = field(default_factory=dict)
    """Coarser dtypes that it uses on the path, beside those that its trace declares."""


def open_engine(*, model: str = "", config: str | None = None) -> CommandEngine:
    """Return the engine of a TOML file.

    Raises UsageError for a file that cannot be used, EngineError where the program's trial fails.
    """
    if config is None:
        raise UsageError("no description of the program", where="--config", measured="not given",
                         allowed="a TOML file with its command",
                         next_step="write one as docs/engines.md shows")  # fmt: skip
    path = Path(config)
    return CommandEngine(read_program(path), path.resolve().parent, model)


def read_program(path: Path) -> Program:
    """Return a TOML file's program, every field checked. Raises UsageError."""
    try:
        body = tomllib.loads(path.read_text(encoding="utf-8"))
        unknown = sorted(set(body) - _FIELDS)
        program = msgspec.convert(body, Program)
    except (OSError, ValueError) as error:  # msgspec.ValidationError is a ValueError
        raise _bad_file(path, f"{type(error).__name__}: {error}", "a TOML file as docs/engines.md shows") from error
    if unknown:
        raise _bad_file(path, f"unknown field {unknown[0]}", ", ".join(sorted(_FIELDS)))
    for fault, allowed in _faults(program):
        raise _bad_file(path, fault, allowed)
    return program


_FIELDS = frozenset(Program.__dataclass_fields__)


def _faults(program: Program) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a program, and what is allowed."""
    if not program.command:
        yield "an empty command", "the program and its arguments"
    used = {name for part in program.command for name in _BRACES.findall(part)}
    if used - set(PLACEHOLDERS):
        yield f"unknown placeholder {{{sorted(used - set(PLACEHOLDERS))[0]}}}", ", ".join(PLACEHOLDERS)
    if {"out", "tokens", "arm"} - used:
        yield f"no {{{sorted({'out', 'tokens', 'arm'} - used)[0]}}} in the command", "{arm}, {tokens} and {out} in it"
    texts = (*program.command, *program.environment, *program.environment.values())
    if any("\0" in text for text in texts):
        yield "a NUL character in the command or its environment", "text without it"
    odd = [name for name in program.environment if not name or "=" in name]
    if odd:
        yield f"environment variable {odd[0]!r}", "a name without '='"
    if not {"P", "D"} <= set(program.arms) <= set(ARMS):
        yield f"arms {', '.join(program.arms)}", f"P, D, and any of {', '.join(ARMS)}"
    if not set(program.knobs) <= set(KNOBS):
        yield f"knobs {', '.join(program.knobs)}", f"any of {', '.join(KNOBS)}"
    if not 0 < program.time_limit < float("inf"):
        yield f"time_limit {program.time_limit}", "seconds, more than 0"
    if program.dtype and program.dtype not in UNIT_ROUNDOFF:
        yield f"dtype {program.dtype}", ", ".join(UNIT_ROUNDOFF)
    wrong = [dtype for dtype in program.casts.values() if dtype not in CAST_ROUNDOFF]
    if wrong:
        yield f"cast to {wrong[0]}", ", ".join(CAST_ROUNDOFF)
    if len(program.trial) < 2 or any(token < 0 for token in program.trial):
        yield f"trial {program.trial}", "two token ids or more"


def _bad_file(path: Path, measured: str, allowed: str) -> UsageError:
    return UsageError("the program's description cannot be used", where=str(path), measured=measured[:300],
                      allowed=allowed, next_step="correct the file")  # fmt: skip


class CommandEngine:
    """A program that computes one arm a call; see Program."""

    perturbs = False
    alike_in_modes = False  # the program is told the mode, and may do as it likes with it
    rungs: tuple[str, ...] = ()
    parameters = 0

    def __init__(self, program: Program, folder: Path, model: str) -> None:
        """Run the short trial. Raises EngineError where it fails, ModelError for a tokenizer that cannot be read."""
        self.program, self.folder = program, folder
        self.model = str(BUILTIN.get(model, Path(model).resolve())) if model else ""
        self.arms, self.knobs = tuple(program.arms), tuple(program.knobs)
        self._tokenizer = _tokenizer(program, folder, self.model)
        self._made: dict[str, Call] = {}
        self._said: list[str] = []
        self._plan = _plan_of(program.trial[:-1])
        self._temporary = tempfile.TemporaryDirectory(prefix="driftprobe-")
        trial = self._call("P", program.trial)
        if trial.failure:
            raise self._error(trial)
        self._header = trial.trace.header
        promised = {(r.tensor, r.layer) for r in trial.trace.records if r.arm != CONSTANTS}
        names = self._header.taps or {tensor: () for tensor, _ in promised}
        self.taps = {
            name: tuple(sorted(layer for tensor, layer in promised if tensor == name and layer is not None))
            for name in names
        }
        self._made.clear()

    @property
    def facts(self) -> EngineFacts:
        """What the program's trace says of it, and the TOML file beside it."""
        said, program = self._header.engine, self.program
        return replace(
            said,
            name=program.name if said.name in {"", "unknown"} else said.name,
            model=said.model or self.model,
            dtype=program.dtype or said.dtype,
            casts={**said.casts, **program.casts},
            max_positions=program.max_positions or said.max_positions or (1 << 20),
        )

    def tokenize(self, text: str) -> list[int]:
        """Return the text's token ids, or 1, 2, 3, … for the built-in prompts where there is no tokenizer."""
        if self._tokenizer is None:
            raise ModelError("tokenizer missing", where=self.program.name, measured="no tokenizer.json",
                             allowed="a tokenizer.json beside the model, or named in the TOML file",
                             next_step="name one, or give --prompt-file with lists of token ids")  # fmt: skip
        return [int(token) for token in self._tokenizer.encode(text).ids]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, or an empty string without a tokenizer."""
        return "" if self._tokenizer is None else str(self._tokenizer.decode(list(token_ids)))

    def greedy(self, token_ids: Sequence[int], steps: int) -> list[int]:
        """Return the program's own next tokens: the largest logit of a prefill, once for each step."""
        chosen = list(token_ids)
        for _ in range(steps):
            self.begin(_plan_of(chosen[:-1]))
            call = self._call("P", chosen)
            if call.failure:
                raise self._error(call)
            logits = next((r for r in call.trace.records if r.tensor == "logits" and r.arm == "P"), None)
            if logits is None or logits.top is None or not logits.top.ids:
                raise EngineError(
                    "no next token", where=f"{self.program.name}, arm P, position {len(chosen) - 1}",
                    measured="no logits with `top` in its trace", allowed="the largest logits of the last position",
                    next_step="write the tap logits, with its `top` (driftprobe.h does so by itself)",
                )  # fmt: skip
            chosen.append(logits.top.ids[0])
        return chosen[len(token_ids) :]

    def begin(self, plan: Plan, ahead: Ahead | None = None) -> None:
        """Take a plan's prompt, mode and seed for the calls that follow; what earlier calls left is removed."""
        self._plan = plan
        self._made.clear()
        for place in Path(self._temporary.name).iterdir():
            shutil.rmtree(place, ignore_errors=True)

    def said(self) -> list[str]:
        """Return what the program printed since this was last asked."""
        lines, self._said = self._said, []
        return lines

    def run(self, arm: Arm, token_ids: Sequence[int], layers: frozenset[int]) -> Iterator[Recorded | Event]:
        """Return one arm's records; all steps of an arm come from one call."""
        call = self._made.get(arm.name)
        if call is None:
            call = self._made[arm.name] = self._call(arm.name, token_ids, layers)
        steps = {read.step for part in arm.passes for read in part.reads}
        if call.failure:
            yield Event(event=f"{FAILED}{call.failure}", arm=arm.name, step=min(steps))
            return
        for record in call.trace.records:
            if record.arm == arm.name and record.step in steps:
                yield Recorded(record, call.payloads.get(record))
        yield from (event for event in call.trace.events if event.arm == arm.name and event.step in steps)

    def constants(self, layers: frozenset[int]) -> Iterator[Constant]:
        """Return the constants that the program wrote with arm P, where it keeps their numbers."""
        call = self._made.get("P")
        if call is None or call.failure:
            return
        for record in call.trace.records:
            if record.arm == CONSTANTS and (record.layer is None or record.layer in layers):
                array = call.payloads.get(record)
                if array is not None:
                    yield Constant(record.layer, record.tensor, array)

    def weights(self, layer: int | None, tensor: str) -> Iterator[Constant]:
        """Return nothing: the program writes what it wants to be known with arm P."""
        yield from ()

    def at(self, rung: str) -> AbstractContextManager[None]:
        """Refuse: a program has no higher precision that we could ask for."""
        raise UsageError("no precision ladder here", where=self.program.name, measured=rung, allowed="--ladder off",
                         next_step="run with --ladder off")  # fmt: skip

    def plant(self, fault: str, strength: float | None = None) -> AbstractContextManager[Expected]:
        """Refuse: a fault in a program is planted by the program."""
        raise UsageError("no fault can be planted here", where=self.program.name, measured=fault,
                         allowed="engine hf", next_step="let the program itself plant it, by an option in the TOML "
                         "file's command")  # fmt: skip

    def _call(self, arm: str, tokens: Sequence[int], layers: frozenset[int] | None = None) -> Call:
        place = Path(tempfile.mkdtemp(dir=self._temporary.name))
        values = self._values(arm, tokens, layers, place)
        command = [_BRACES.sub(lambda found: values[found[1]], part) for part in self.program.command]
        self._said.append(f"$ {shlex.join(command)}")
        failure, lines = run_program(command, self.folder, self.program.environment, self.program.time_limit)
        self._said += lines
        trace, out = None, Path(values["out"])
        if not failure:
            trace, failure = _read(out, arm, tokens)
        if failure and lines:
            failure += f"; its last lines: {' | '.join(lines[-_LAST_LINES:])}"
        return Call(arm, failure[:2000], trace, Payloads(out.parent), shlex.join(command), tuple(tokens))

    def _values(self, arm: str, tokens: Sequence[int], layers: frozenset[int] | None, place: Path) -> Mapping[str, str]:
        plan, traces = self._plan, place / "traces"
        traces.mkdir()
        (place / "tokens.txt").write_text(" ".join(map(str, tokens)) + "\n", encoding="utf-8")
        (place / "prompt.txt").write_text(plan.prompt.text, encoding="utf-8")
        return {
            "model": self.model,
            "prompt": plan.prompt.name,
            "prompt_file": str(place / "prompt.txt"),
            "prompt_len": str(len(plan.prompt.token_ids)),
            "tokens": str(place / "tokens.txt"),
            "phase": _PHASES.get(arm[0], "prefill_last"),
            "mode": plan.mode.value,
            "arm": arm,
            "layers": "all" if plan.layers is None else ",".join(map(str, sorted(layers or plan.layers))),
            "seed": str(plan.seed),
            "steps": str(plan.steps),
            "out": str(traces / f"{plan.prompt.name}_{plan.mode.value}.jsonl"),
        }

    def _error(self, call: Call) -> EngineError:
        some = f"{' '.join(map(str, call.tokens[:_SHOWN]))}{' …' if len(call.tokens) > _SHOWN else ''}"
        return EngineError(
            "the program failed", where=f"{self.program.name}, arm {call.arm}", measured=call.failure,
            allowed="exit code 0 and a whole trace",
            next_step=f"see docs/engines.md, and run it by hand in {self.folder} with a {{tokens}} file of {some}: "
            f"{call.command}",
        )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of the program, and what came of it."""

    arm: str
    failure: str
    """Empty, or why there is no trace."""
    _trace: Trace | None
    payloads: Payloads
    command: str
    """As a shell would take it."""
    tokens: tuple[int, ...]

    @property
    def trace(self) -> Trace:
        """The trace; only where there is no failure."""
        assert self._trace is not None
        return self._trace


def _plan_of(token_ids: Sequence[int]) -> Plan:
    """Return the plan of a call beside a run: one prefill, its last position read."""
    return Plan(Mode.AS_DESIGNED, Prompt("p0", tuple(token_ids)), 1, 0, ())


def _read(path: Path, arm: str, tokens: Sequence[int]) -> tuple[Trace | None, str]:
    """Return the trace that a call left, or why it cannot be used."""
    if not path.is_file():
        return None, f"no trace was written to {{out}} ({path.name})"
    try:
        trace = read_trace(path)
        payloads = Payloads(path.parent)
        for record in trace.records:
            payloads.get(record)  # a payload that is not its record's is told here, not while a verdict is made
    except DriftprobeError as error:
        return None, f"its trace does not validate: {error.what}: {error.measured} ({error.where})"
    if trace.damage:
        return None, f"its trace is incomplete: {trace.damage}"
    return trace, _disagreement(trace.records, arm, tokens)


def _disagreement(records: Sequence[Record], arm: str, tokens: Sequence[int]) -> str:
    """Return in what a call's records are not what it was asked for, or nothing."""
    own = [record for record in records if record.arm != CONSTANTS]
    if not own:
        return "its trace holds no record"
    for record in own:
        if record.sketch is not None and len(record.sketch) != SKETCH_SIZE:
            return f"its trace has sketch_size {len(record.sketch)}; {SKETCH_SIZE} is needed"
        if record.arm != arm:
            return f"asked for arm {arm}, it wrote a record of arm {record.arm} ({record.tensor})"
        at = record.logical_tok_idx
        if at is None:
            return f"its record of {record.tensor} names no position (logical_tok_idx)"
        if at >= len(tokens) or record.token_id not in (None, tokens[at]):
            asked = tokens[at] if at < len(tokens) else "none"
            return f"token {record.token_id} at position {at}, where {{tokens}} has {asked}"
    return ""


def _tokenizer(program: Program, folder: Path, model: str) -> Any:
    named = folder / program.tokenizer if program.tokenizer else Path(model or ".") / "tokenizer.json"
    if not named.is_file():
        if program.tokenizer:
            raise ModelError("tokenizer missing", where=str(named), measured="no such file",
                             allowed="a tokenizer.json", next_step="correct `tokenizer` in the TOML file")  # fmt: skip
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        return Tokenizer.from_file(str(named))
    except Exception as error:  # the library raises Exception itself
        raise ModelError("tokenizer cannot be read", where=str(named), measured=str(error)[:200],
                         allowed="a tokenizer.json", next_step="copy it again") from error  # fmt: skip
