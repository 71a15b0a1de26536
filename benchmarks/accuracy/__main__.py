"""The command: choose cases, measure them, write docs/accuracy.md and docs/accuracy.json."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import click  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

from benchmarks.accuracy import cases, report, run, store  # noqa: E402
from benchmarks.accuracy.cases import Case  # noqa: E402
from benchmarks.accuracy.outcome import Outcome  # noqa: E402
from benchmarks.accuracy.score import Scored  # noqa: E402


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="A small fixed choice of cases.")
@click.option("--sample", type=int, help="So many faults, and so many clean and benign cases, drawn from all.")
@click.option("--faults", type=int, help="With --sample: so many faults instead.")
@click.option("--after", type=click.Path(path_type=Path, exists=True),
              help="With --sample: an earlier accuracy.json, whose cases are drawn last.")  # fmt: skip
@click.option("--only", multiple=True, help="Only cases whose id holds this text; may be given several times.")
@click.option("--limit", type=int, help="At most so many cases of those chosen.")
@click.option("--jobs", type=int, default=os.cpu_count() or 1, show_default=True, help="Processes.")
@click.option("--results", type=click.Path(path_type=Path), default=ROOT / "build" / "accuracy.jsonl",
              help="Where outcomes are kept between runs.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "docs", help="Where the two files go.")
@click.option("--report-only", is_flag=True, help="Measure nothing; write the files from what is there.")
@click.option("--sources", help="With --report-only: the digest of the sources that were measured. Default: these.")
@click.option("--commit", help="With --sources: the git commit that holds them.")
@click.option("--replay", metavar="ID", help="Run one case and print all of it.")
def main(
    quick: bool, sample: int | None, faults: int | None, after: Path | None, only: tuple[str, ...], limit: int | None,
    jobs: int, results: Path, out: Path, report_only: bool, sources: str | None, commit: str | None, replay: str | None,
) -> None:  # fmt: skip
    """Run the command."""
    if replay is not None:
        _replay(replay)
        return
    everything = cases.quick() if quick else cases.full()
    seen = store.measured_in(after) if after is not None else frozenset[str]()
    among = everything if sample is None or quick else cases.sample(sample, faults, seen)
    chosen = [case for case in among if not only or any(text in case.id for text in only)][:limit]
    console = Console(stderr=True)
    if (sources or commit) and not report_only:
        raise click.UsageError("--sources and --commit go with --report-only: what is measured is what is here")
    if report_only:
        done = store.read(results, sources or store.digest())
    else:
        done = _run(chosen, results, jobs, console)
    scored = [Scored(case, done[case.id]) for case in chosen if case.id in done]
    report.write(scored, versions(sources, commit), len(everything) - len(scored), out)
    console.print(f"{len(scored)} of {len(everything)} cases in {out / 'accuracy.md'}")


def _run(chosen: list[Case], results: Path, jobs: int, console: Console) -> dict[str, Outcome]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TimeRemainingColumn(elapsed_when_finished=True))  # fmt: skip
    known = len(set(store.read(results, store.digest())) & {case.id for case in chosen})
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("measuring", total=len(chosen), completed=known, rate="")

        def told(outcome: Outcome) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, advance=1, rate=f"{speed:.1f}/s" if speed else "")
            if outcome.status == "error":
                bar.console.print(f"{outcome.case}: {outcome.detail}")

        return run.run(chosen, results, jobs, told)


def versions(sources: str | None = None, commit: str | None = None) -> str:
    """Return what was measured, and with what: versions, git commit, digest of the sources.

    Sources that are not those of this checkout have the commit that they are said to have, or an unknown one.
    """
    from importlib.metadata import version

    from driftprobe.version import __version__

    names = ("torch", "transformers", "numpy")
    found = [f"driftprobe {__version__}", *(f"{name} {version(name)}" for name in names)]
    here = store.digest()
    if commit is None:
        commit = _commit() if sources in {None, here} else "unknown"
    return ", ".join([*found, f"git commit {commit}", f"sources {sources or here}"])


def _commit() -> str:
    """Return the checkout's commit, with `+` where its files differ from it; `unknown` without a checkout."""
    try:
        found = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", *store.SOURCES])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found[0] + ("+" if found[1] else "")


def _replay(case_id: str) -> None:
    import msgspec

    from benchmarks.accuracy.measure import measure

    run._start()
    outcome = measure(cases.find(case_id))
    click.echo(msgspec.json.format(store.as_json(outcome), indent=2).decode())


if __name__ == "__main__":
    main()
