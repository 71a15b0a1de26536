"""`driftprobe run --host`: the same run on another machine, its progress shown here, its reports written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from driftprobe.artifacts import write_reports
from driftprobe.cli.output import OPTIONS, Output, tell
from driftprobe.cli.progress import PROGRESS
from driftprobe.errors import UsageError
from driftprobe.prompts import read_prompt_file
from driftprobe.remote import plan_of, run_there
from driftprobe.remote_ssh import Node, check_host
from driftprobe.result import Progress, Step, analyze

_F = TypeVar("_F", bound=Callable[..., Any])
_OURS = {
    "host",
    "remote_command",
    "remote_folder",
    "dry_run",
    "date",
    "name",
    "out",
    "quiet",
    "progress",
    "prompt_file",
    "unshown",
    *OPTIONS,
    "browse",
}


def node_options(command: _F) -> _F:
    """Add the options that say where to run."""
    for option in reversed(
        (
            click.option("--host", default=None, help="Run on this machine: [user@]name as your ssh knows it."),
            click.option("--remote-command", default="driftprobe", show_default=True,
                         help="How driftprobe is called there."),
            click.option("--remote-folder", default="", help="Folder there for runs and lock. Default: ~/.driftprobe."),
            click.option("--dry-run", is_flag=True, help="With --host: print what would be done, and do nothing."),
            click.option("--unshown", is_flag=True, hidden=True, help="Show no verdict: it is shown where --host was."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def run_on_node(
    context: click.Context, node: Node, root: Path, prompt_file: Path | None, dry_run: bool, how: Output,
    progress: Progress | None,
) -> int:  # fmt: skip
    """Run on a node, or print what would be done; returns the exit code of the verdict.

    Models and TOML files are named as the node has them; a prompt file is read here and sent along.
    """
    check_host(node.host)
    arguments = given_arguments(context)
    prompts = ""
    if prompt_file is not None:
        prompts = json.dumps(read_prompt_file(prompt_file))
        arguments += ["--prompt-file", "prompts.json"]
    if dry_run:
        for line in plan_of(node, arguments, root.parent.name, root.name):
            click.echo(line)
        return 0
    run_there(node, arguments, root, _silent if how.quiet else _teller(node.host, progress), prompts=prompts)
    result = analyze(root)
    write_reports(root, result.reports())
    facts = result.traces[0].header.engine
    what = f"{facts.model}  {facts.dtype}  {facts.attention}  {facts.version}  on {node.host}"
    return tell(result, how, root, [what], mapped=True, opened=context.params["browse"])


def given_arguments(context: click.Context) -> list[str]:
    """Return the options that the user gave, all but those about where and into what, as words for the same command."""
    words: list[str] = []
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source is click.core.ParameterSource.DEFAULT or option.name in _OURS or source is None:
            continue
        if option.name == "self_test":
            raise UsageError("a self-test on another machine", where="--host", measured="--self-test with --host",
                             allowed="one of the two",
                             next_step="run `driftprobe self-test` on that machine")  # fmt: skip
        value = context.params[option.name or ""]
        if value is True:
            words.append(option.opts[0])
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [option.opts[0], str(item)]
    return words


def _teller(host: str, progress: Progress | None) -> Callable[[str], None]:
    """Return what is told the node's lines: where it is goes to the bar, the rest to the terminal."""

    def told(line: str) -> None:
        if line.startswith(PROGRESS):
            where, _, what = line.removeprefix(PROGRESS).partition(" ")
            done, _, of = where.partition("/")
            if progress is not None and done.isdigit() and of.isdigit():
                progress(Step(int(done), int(of), f"{host}: {what}"))
        elif line.strip():
            click.echo(click.style(f"{host}: ", dim=True) + printable(line), err=True)

    return told


def _silent(_line: str) -> None:
    """Take a line of the node's that nobody asked for; it is in the run log all the same."""


def printable(line: str) -> str:
    """Return a line of the node's without the characters that would drive the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\t" else "�" for letter in line)
