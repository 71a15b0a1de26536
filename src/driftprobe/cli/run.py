"""driftprobe run: the whole experiment, from a model to a verdict and its reports."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date as calendar
from pathlib import Path

import click
from rich.console import Console

from driftprobe.api import builtin_prompts, find_boundaries, run
from driftprobe.artifacts import check_place, place_of, stage_of
from driftprobe.boundaries import LONGEST, Boundaries
from driftprobe.cli.engine_options import engine_options, opened
from driftprobe.cli.on_a_node import node_options, run_on_node
from driftprobe.cli.output import OPTIONS, Output, output_options, tell
from driftprobe.cli.progress import progress as shown_progress
from driftprobe.cli.show import EXIT_CODES
from driftprobe.engines.base import Engine
from driftprobe.errors import UsageError
from driftprobe.faults import find_fault
from driftprobe.options import RunOptions
from driftprobe.plan import Prompt, parse_mode
from driftprobe.prompts import LENGTHS, boundary_prompts, make_prompt, make_prompts, read_prompt_file
from driftprobe.remote_ssh import Node
from driftprobe.result import Result

_EPILOG = """\b
Examples:
  driftprobe run
  driftprobe run --model ./my-llama --dtype bfloat16 --attn eager --steps 8
  driftprobe run --mode kv_aligned --prompt "The quick brown fox"
  driftprobe run --fault cache_shift --name shifted
  driftprobe run --host gpu01 --model /models/my-llama

\b
Reports go to OUT/DATE/NAME. Exit codes: 0 NO_DRIFT or STRUCTURAL_DRIFT, 1 MISMATCH, 2 bad input, 3 N/A.
"""


@click.command(epilog=_EPILOG)
@engine_options
@click.option("--mode", default="both", show_default=True, help="as_designed, kv_aligned or both.")
@click.option("--prompts", default=None, help=f"Built-in prompts, comma-separated: {','.join(LENGTHS)}. Default: all.")
@click.option("--prompt", "texts", multiple=True, help="A prompt of your own; may be given several times.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="JSON or TOML: names to text or token ids.")
@click.option("--boundaries", is_flag=True, help="Add prompts at the lengths where the model switches, at -1, 0, +1.")
@click.option("--longest", type=int, default=LONGEST, show_default=True, help="Longest boundary in tokens.")
@click.option("--layers", default="all", show_default=True, help="Layers to record: all, or e.g. 0,1,2,4,8.")
@click.option("--steps", type=int, default=1, show_default=True, help="Decode steps to compare.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the rounding noise of arms N.")
@click.option("--payload", default="failing", show_default=True, help="Whole tensors to keep: none, failing, all.")
@click.option("--self-test", is_flag=True, help="Plant one fault of each family instead (see `driftprobe self-test`).")
@click.option("--fault", default=None, help="Plant a fault (see `driftprobe faults`).")
@click.option("--fault-strength", "strength", type=float, default=None, help="How strong. Default: the fault's own.")
@click.option("--ladder", default="auto", show_default=True, help="Run all again in float64: auto, on or off.")
@click.option("--scores", default="on", show_default=True, help="Record attention's scores (costs time): on or off.")
@click.option("--date", default=None, help="Folder of the run under OUT. Default: today.")
@click.option("--name", default="b3_66_v2", show_default=True, help="Name of the run.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("artifacts"), show_default=True, help="Where runs go."
)
@node_options
@click.option("--progress", default="auto", show_default=True, help="auto (a bar on a terminal), lines or none.")
@click.option("--open", "browse", is_flag=True, help="Open report.html in the browser.")
@output_options
def command(
    engine: str,
    model: str,
    mode: str,
    prompts: str | None,
    texts: tuple[str, ...],
    prompt_file: Path | None,
    boundaries: bool,
    longest: int,
    dtype: str | None,
    attn: str | None,
    config: str | None,
    flash_attn: str | None,
    cache_type: str | None,
    threads: int | None,
    layers: str,
    steps: int,
    seed: int,
    payload: str,
    self_test: bool,
    fault: str | None,
    strength: float | None,
    ladder: str,
    scores: str,
    date: str | None,
    name: str,
    out: Path,
    host: str | None,
    remote_command: str,
    remote_folder: str,
    dry_run: bool,
    unshown: bool,
    progress: str,
    browse: bool,
    how: Output,
) -> None:
    """Run a model's prefill and decode on the same tokens and say whether they differ by arithmetic or by a bug."""
    if self_test:
        _check_alone()
    day = date or calendar.today().isoformat()
    root = place_of(out, day, name)
    chosen_engine = {"dtype": dtype, "attn": attn, "config": config, "flash_attn": flash_attn, "cache_type": cache_type,
                     "threads": threads}  # fmt: skip
    options = RunOptions(
        modes=parse_mode(mode), steps=steps, seed=seed, layers=_layers(layers), payload=payload, fault=fault,
        strength=strength, ladder=ladder, scores=scores, date=day, output=root.as_posix(),
    )  # fmt: skip
    if fault is not None:
        find_fault(fault)
    if host is not None:
        node = Node(host, remote_command, remote_folder)
        with shown_progress("none" if how.quiet else progress, f"connecting to {host}") as told:
            code = run_on_node(click.get_current_context(), node, root, prompt_file, dry_run, how, told)
        click.get_current_context().exit(code)
    _check_dry(dry_run)
    check_place(root)
    if self_test:
        from driftprobe.cli.self_test import run_and_show

        loaded = opened(engine, model, **chosen_engine)
        click.get_current_context().exit(run_and_show(loaded, root, ladder, how.quiet))
    with shown_progress("none" if how.quiet else progress, "loading the model") as told, _kept_on_interrupt(root):
        loaded = opened(engine, model, **chosen_engine)
        chosen = _prompts(loaded, prompts, texts, prompt_file)
        if boundaries:
            found = find_boundaries(loaded, steps, longest)
            _show_boundaries(found, Console(highlight=False, stderr=how.format == "json", quiet=how.quiet))
            chosen += boundary_prompts(found, loaded)
        result = run(loaded, chosen, options, root, told)
    click.get_current_context().exit(
        EXIT_CODES[result.verdict] if unshown else _shown(result, loaded, fault, root, how)
    )


def _check_dry(dry_run: bool) -> None:
    """Refuse a dry run here: what a run does on this machine needs no announcement."""
    if dry_run:
        raise UsageError("nothing to run dry", where="--dry-run", measured="no --host", allowed="only with --host",
                         next_step="add --host, or leave --dry-run out")  # fmt: skip


def _shown(result: Result, loaded: Engine, fault: str | None, root: Path, how: Output) -> int:
    """Tell what was run, the verdict and where the report lies; return the exit code."""
    facts = loaded.facts
    before = [f"{facts.model}  {facts.dtype}  {facts.attention}  {facts.version}"]
    if fault is not None:
        before.append(f"planted fault: {fault} — {find_fault(fault).breaks}")
    browse = click.get_current_context().params["browse"]
    return tell(result, how, root, before, mapped=True, opened=browse)


_NOT_OF_SELF_TEST = {
    "mode", "prompts", "texts", "prompt_file", "boundaries", "longest", "layers", "steps", "seed", "payload", "fault",
    "strength", "scores", *OPTIONS,
}  # fmt: skip


def _check_alone() -> None:
    """Refuse the options that a self-test has no use for: it chooses its own prompt, mode and faults."""
    context = click.get_current_context()
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name in _NOT_OF_SELF_TEST
        and context.get_parameter_source(option.name) is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        raise UsageError("an option that the self-test does not have", where="--self-test", measured=", ".join(given),
                         allowed="--engine and its options, --model, --ladder, --date, --name, --out, --quiet",
                         next_step=f"leave out {', '.join(given)}, or --self-test")  # fmt: skip


def _prompts(engine: Engine, names: str | None, texts: tuple[str, ...], prompt_file: Path | None) -> list[Prompt]:
    chosen = [] if names is None else builtin_prompts(engine, [n.strip() for n in names.split(",")])
    if names is None and not texts and prompt_file is None:
        chosen = builtin_prompts(engine)
    chosen += [make_prompt("prompt" if i == 0 else f"prompt{i + 1}", text, engine) for i, text in enumerate(texts)]
    if prompt_file is not None:
        chosen += make_prompts(read_prompt_file(prompt_file), engine)
    seen = [prompt.name for prompt in chosen]
    twice = next((name for name in seen if seen.count(name) > 1), None)
    if twice is not None:
        raise UsageError("two prompts of one name", where="prompts", measured=twice, allowed="each name once",
                         next_step="rename one of them")  # fmt: skip
    return chosen


def _show_boundaries(found: Boundaries, console: Console) -> None:
    """Say which lengths are probed and why, and which are not."""
    if not found.probed:
        console.print("boundaries: the model states no length at which it switches and that fits", style="yellow")
    for words, items in (("boundary", found.probed), ("left out", found.left_out)):
        for item in items:
            console.print(f"{words} {item.name}: {item.length} tokens in all; {item.why}", style="dim", soft_wrap=True)


def _layers(word: str) -> tuple[int, ...] | None:
    if word == "all":
        return None
    try:
        return tuple(sorted({int(part) for part in word.split(",")}))
    except ValueError:
        raise UsageError("unknown layer", where="--layers", measured=word, allowed="all, or numbers such as 0,1,2,4,8",
                         next_step="choose layers by number") from None  # fmt: skip


@contextmanager
def _kept_on_interrupt(root: Path) -> Iterator[None]:
    """Say where an interrupted run's traces are; each is valid, the last one incomplete."""
    before = stage_of(root).exists()
    try:
        yield
    except KeyboardInterrupt:
        if stage_of(root).exists() and not before:
            click.echo(f"traces so far: `driftprobe analyze {stage_of(root).as_posix()}` judges them", err=True)
            again = shlex.join(["driftprobe", *sys.argv[1:]])
            click.echo(
                f"to go on: `{again}` runs all of it again; until it is done nothing in {root} changes", err=True
            )
        raise
