"""The command line: one thin file per command, loaded when it is called."""

from __future__ import annotations

import gc
import os
import signal
import sys
from importlib import import_module
from types import FrameType

import click

from driftprobe.errors import DriftprobeError, EngineError, UsageError
from driftprobe.version import __version__

COMMANDS = {
    "run": "run a model both ways and say what the difference is",
    "self-test": "plant a fault of each family in your model and show that the probe fires",
    "analyze": "judge the traces of a folder",
    "compare": "compare two engines, or two builds of one, on the same tokens",
    "diff": "say what got worse between two runs of one engine",
    "baseline": "keep an accepted run in a small file, and check new runs against it",
    "report": "rebuild every report of a run from its traces",
    "pack": "turn a folder's traces into Parquet, with nothing lost",
    "unpack": "turn packed traces back into JSON Lines, to the byte",
    "validate": "say what is wrong with a trace, line by line",
    "faults": "list the faults that can be planted, and what must be found",
    "engines": "list the engines and how to install them",
    "taps": "list the taps in order of execution",
    "doctor": "say what works here, and how to install the rest",
    "completion": "print the completion script of bash, zsh or fish",
}


class _Lazy(click.Group):
    """A group whose commands are imported when called, so that help needs no engine."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"driftprobe.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  driftprobe run                               the built-in model, both modes
  driftprobe run --model ./my-llama --dtype bfloat16
  driftprobe run --fault rope_plus_one         see what a real bug looks like
  driftprobe analyze artifacts/DATE/b3_66_v2/traces

\b
Exit codes: 0 NO_DRIFT or STRUCTURAL_DRIFT, 1 MISMATCH, 2 bad usage or input, 3 N/A.
""",
)
@click.version_option(__version__, prog_name="driftprobe")
def group() -> None:
    """Prefill and decode give different numbers: is it arithmetic, or a bug, and where does it begin?"""


def main() -> None:
    """Run the command line; every known error becomes its five-part message and exit code."""
    _end_as_if_interrupted()
    # torch and transformers are a million objects, and every full collection visits all of them
    gc.set_threshold(50_000, 20, 50)
    try:
        code = group(prog_name="driftprobe", standalone_mode=False)
    except click.ClickException as error:
        click.echo(str(_of_click(error)), err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except DriftprobeError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
    except Exception as error:  # a crash must not look like exit 1, which means that a bug was found
        if os.environ.get("DRIFTPROBE_TRACEBACK"):
            raise
        click.echo(str(_unforeseen(error)), err=True)
        sys.exit(EngineError.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _end_as_if_interrupted() -> None:
    """Let SIGTERM and SIGHUP end a run like Ctrl-C: an engine then ends the program that it has started."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is signal.SIG_DFL:  # ignored, by nohup say, it stays ignored
            signal.signal(number, end)


def _of_click(error: click.ClickException) -> UsageError:
    """Return what click says of an option or argument in five parts."""
    context = getattr(error, "ctx", None)
    command = "driftprobe" if context is None else context.command_path
    words = error.format_message().strip()
    return UsageError(
        words[:1].lower() + words[1:].removesuffix("."), where=command,
        measured=" ".join(sys.argv[1:])[:200] or "nothing",
        allowed=f"what `{command} --help` lists", next_step=f"{command} --help",
    )  # fmt: skip


def _unforeseen(error: Exception) -> EngineError:
    return EngineError(
        "driftprobe failed in a way that it did not foresee", where=" ".join(sys.argv[1:])[:200] or "driftprobe",
        measured=f"{type(error).__name__}: {error}"[:400], allowed="a verdict or a clear error",
        next_step="set DRIFTPROBE_TRACEBACK=1, run again, and report what it prints",
    )  # fmt: skip
