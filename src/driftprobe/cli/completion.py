"""driftprobe completion: the script that lets a shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from driftprobe.errors import UsageError

SHELLS = ("bash", "zsh", "fish")
_EPILOG = """\b
Examples:
  eval "$(driftprobe completion bash)"                                    # in ~/.bashrc
  eval "$(driftprobe completion zsh)"                                     # in ~/.zshrc
  driftprobe completion fish > ~/.config/fish/completions/driftprobe.fish
"""


@click.command(epilog=_EPILOG)
@click.argument("shell")
def command(shell: str) -> None:
    """Print the completion script of SHELL: bash (4.4 or later), zsh or fish."""
    kind = get_completion_class(shell)
    if kind is None:
        raise UsageError("unknown shell", where="completion", measured=shell[:80], allowed=", ".join(SHELLS),
                         next_step="choose one of them")  # fmt: skip
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, "driftprobe", "_DRIFTPROBE_COMPLETE").source())
