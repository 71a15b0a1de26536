"""What several reports say of a run: its date, paths, prompts, modes, and the commands that repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from driftprobe.climb import sharper_words
from driftprobe.floor import LIMIT
from driftprobe.judgement import Cell, Failure, Judgement, ModeJudgement, Outcome, Status, TraceJudgement, Verdict
from driftprobe.local import LOCAL_LIMIT
from driftprobe.report.text import NOT_TOLD, count, number, printable, times
from driftprobe.taps import CANDIDATE, PATHS, REFERENCE, execution_order, place
from driftprobe.trace import Header, Trace

MODES = ("as_designed", "kv_aligned")
"""The two modes that every report speaks of, run or not."""
FILES = {
    "html": "report.html",
    "final": "B3_66_V2_FINAL_REPORT.md",
    "analysis": "B3_66_V2_ANALYSIS.md",
    "tsv": "B3_66_V2_ANALYSIS.tsv",
    "verdict": "verdict.json",
}
"""The files that a report folder holds beside `run/` and `traces/`."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
STANDARD_PROMPTS = ("p0_short", "p6_len_16", "p6_len_32")


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """One prompt as its trace header states it."""

    name: str
    length: int
    text: str
    token_ids: tuple[int, ...]
    """The prompt's own tokens, then one for each decoded step; empty where the trace does not say."""
    paths: bool = False
    """Whether two callables were fed it, and nothing was decoded after it by us."""


def mode_names(judgement: Judgement) -> tuple[str, ...]:
    """Return the two modes of the design, then any other that a trace names; mode `paths` alone stands for itself."""
    if only_paths(judgement):
        return (PATHS,)
    return (*MODES, *(name for name in judgement.modes if name not in MODES))


def only_paths(judgement: Judgement) -> bool:
    """Whether this is a comparison of two callables and nothing else, in which the two modes have no part."""
    return tuple(judgement.modes) == (PATHS,)


def sides(judgement: Judgement) -> tuple[str, str]:
    """Return what the two sides of a comparison are called."""
    return (REFERENCE, CANDIDATE) if only_paths(judgement) else ("prefill", "decode")


def main_mode(judgement: Judgement) -> str:
    """Return the mode that looks deepest of those that were run."""
    return next((name for name in reversed(mode_names(judgement)) if name in judgement.modes), "")


def all_prompts(judgement: Judgement) -> tuple[TraceJudgement, ...]:
    """Return every prompt of every mode."""
    return tuple(item for name in mode_names(judgement) if name in judgement.modes
                 for item in judgement.modes[name].prompts)  # fmt: skip


def status(judgement: Judgement) -> str:
    """Return INCOMPLETE where a trace has no end or nothing was run, PARTIAL where one mode was not, else COMPLETE."""
    if not judgement.modes or any(mode.status != "COMPLETE" for mode in judgement.modes.values()):
        return "INCOMPLETE"
    return "COMPLETE" if all(name in judgement.modes for name in mode_names(judgement)) else "PARTIAL"


def date(traces: Sequence[Trace]) -> str:
    """Return the date or dates that the headers carry."""
    return ", ".join(_unique(trace.header.date for trace in traces)) or "not recorded in the traces"


def generated(traces: Sequence[Trace]) -> str:
    """Return the date as the last line has it. It is the run's: a rebuilt report is the same, byte for byte."""
    return date(traces) if any(trace.header.date for trace in traces) else "undated, as the traces are,"


def runs(traces: Sequence[Trace]) -> tuple[str, ...]:
    """Return the run ids that the headers carry."""
    return _unique(trace.header.run for trace in traces)


def faults(traces: Sequence[Trace]) -> tuple[str, ...]:
    """Return the names of planted faults."""
    return _unique(trace.header.labels.get("fault", "") for trace in traces)


def output(traces: Sequence[Trace]) -> str:
    """Return the report folder as it was named when the run was made; empty where the traces do not say."""
    return next(iter(_unique(trace.header.labels.get("output", "") for trace in traces)), "")


def path(traces: Sequence[Trace], name: str) -> str:
    """Return a file's path below the report folder; relative to the report itself where the traces do not say."""
    folder = output(traces).rstrip("/")
    return f"{folder}/{name}" if folder else name


def prompts(traces: Sequence[Trace]) -> tuple[PromptFacts, ...]:
    """Return each prompt once, in the order in which the traces hold them."""
    found: dict[tuple[str, int, str], PromptFacts] = {}
    for header in (trace.header for trace in traces):
        own = header.token_ids[: header.prompt_len + header.steps] if header.prompt_len else ()
        known = PromptFacts(header.prompt, header.prompt_len, header.prompt_text, own, header.mode == PATHS)
        found.setdefault((known.name, known.length, known.text), known)
    return tuple(found.values())


def sort_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Return cells in the order in which the engine computed them."""
    return sorted(cells, key=lambda cell: (cell.step, execution_order(cell.layer, cell.tensor, cell.reference.order)))


def largest(cells: Iterable[Cell]) -> Cell | None:
    """Return the cell with the largest known excess."""
    told = [cell for cell in cells if cell.excess is not None]
    return max(told, key=lambda cell: cell.excess or 0.0, default=None)


def where(item: Cell | Failure) -> str:
    """Return a tap with its prompt and step (its position in mode `paths`), in words."""
    phase = item.phase if isinstance(item, Failure) else item.candidate.phase
    position = item.position if isinstance(item, Failure) else item.candidate.logical_tok_idx
    at = f"position {position}" if phase == CANDIDATE else f"step {item.step}"
    return f"{place(item.layer, item.tensor)} of {item.prompt}, {at}"


def open_gates(item: TraceJudgement) -> bool:
    """Whether every gate let this prompt through, so that its numbers are evidence."""
    return all(gate.passed for gate in item.gates)


def differing(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells that are not bit for bit equal."""
    return [cell for cell in cells if not cell.drift.equal]


def failing(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells beyond their limit."""
    return [cell for cell in cells if cell.status is Status.FAIL]


def sharper(cell: Cell) -> str:
    """Return what told a failing cell that its floor did not, in words; nothing where the floor told it."""
    if cell.status is not Status.FAIL or cell.beyond_floor:
        return ""
    by_rounding = cell.local is not None and cell.local.excess > LOCAL_LIMIT
    return sharper_words(cell.local, None) if by_rounding else sharper_words(None, cell.match)


def size_words(failure: Failure) -> str:
    """Return a failure's drift against its floor; where that told nothing, what did."""
    found = f"drift {number(failure.drift)}, floor {number(failure.floor)} ({times(failure.excess)})"
    told = sharper_words(failure.local, failure.match)
    return f"{found}, but {told}" if told else found


def pass_fail(mode: ModeJudgement) -> str:
    """Return the seed's Pass/Fail count, with what is neither."""
    more = [(mode.count(Status.UNKNOWN), "not told"), (mode.unpaired, "unpaired")]
    counts = [f"{mode.count(Status.PASS)} pass / {mode.count(Status.FAIL)} fail"]
    sharper = [item.ladder for item in mode.prompts if item.ladder and item.decided_by is not item]
    if sharper:
        counts.append(f"{sum(len(failing(ladder.judged.cells)) for ladder in sharper)} fail in {sharper[0].rung}")
    return ", ".join(counts + [f"{amount} {word}" for amount, word in more if amount])


def no_failure(mode: ModeJudgement) -> str:
    """Return what stands in place of a first failure where there is none."""
    return "not decided" if mode.verdict is Verdict.NOT_AVAILABLE else "none"


def shut_words(judgement: Judgement) -> str:
    """Return a warning where a gate is shut: numbers behind it are no evidence."""
    names = dict.fromkeys(g.name for item in all_prompts(judgement) for g in item.gates if not g.passed)
    if not names:
        return ""
    listing = ", ".join(f"'{name}'" for name in names)
    return f"Gate {listing} is shut for some prompt: its figures here say what was recorded, and prove nothing."


def drift_words(cell: Cell) -> str:
    """Return how far a cell's two sides are from each other, in words."""
    if cell.drift.equal:
        return "equal bit for bit"
    if cell.drift.value is None or (cell.status is Status.UNKNOWN and cell.drift.value == 0):
        return f"differs, by how much is {NOT_TOLD}"
    kind = "drift at least" if cell.drift.lower_bound else "drift"
    failing = "MORE THAN ROUNDING" if sharper(cell) else "BEYOND THE FLOOR"
    lead = {Status.PASS: "differs within the floor", Status.FAIL: failing}.get(cell.status, "differs")
    return f"{lead}: {kind} {number(cell.drift.value)} ({times(cell.excess)})"


def run_command(
    mode: str, traces: Sequence[Trace], *more: str, fault: bool = True, dtype: str = "", suffix: str = ""
) -> str:
    """Return the command that runs a mode as these traces were run, with further options.

    `dtype` takes the place of the run's own; `suffix` is put behind the run's name where the command is another
    experiment, which must not take this run's place.
    """
    words = ["driftprobe", "run"]
    if traces and not is_foreign(traces):
        header = traces[0].header
        words += ["--mode", mode, *_same_engine(header, dtype), *_same_plan(traces)]
        words += [word for name in faults(traces)[:1] if fault for word in ("--fault", name)]
        strengths = _unique(trace.header.labels.get("strength", "") for trace in traces)
        words += [word for strength in strengths[:1] if fault for word in ("--fault-strength", strength)]
    else:
        words += ["--mode", mode, "--model", "DIR"]
    return printable(shlex.join([*words, *more, *_folder(traces, suffix)]))


def _folder(traces: Sequence[Trace], suffix: str = "") -> list[str]:
    """Return the options that name a run's folder, `out/date/name`, where the traces know it."""
    parts = output(traces).rstrip("/").split("/")
    if len(parts) < 3 or is_foreign(traces):
        return []
    *out, date, name = parts
    where_to = "/".join(out)
    return ["--date", date, "--name", name + suffix, *(["--out", where_to] if where_to != "artifacts" else [])]


def other_prompts(traces: Sequence[Trace]) -> tuple[str, ...]:
    """Return the prompts that the user brought along, which a command has to be given again."""
    return tuple(known.name for known in prompts(traces) if known.name not in STANDARD_PROMPTS)


def report_command(traces: Sequence[Trace]) -> str:
    """Return the command that rebuilds every report from the traces."""
    return printable(shlex.join(["driftprobe", "report", output(traces) or "DIR"]))


def _same_engine(header: Header, dtype: str) -> list[str]:
    facts = header.engine
    dtype = dtype or facts.dtype
    words = ["--engine", facts.name] if facts.name != "hf" else []
    words += ["--model", "DIR" if facts.model.startswith("object:") else facts.model or "DIR"]
    words += ["--dtype", dtype] if dtype else []
    return words + (["--attn", facts.attention] if facts.attention else [])


def _same_plan(traces: Sequence[Trace]) -> list[str]:
    header = traces[0].header
    named = [known.name for known in prompts(traces)]
    words = ["--steps", str(header.steps), "--seed", str(header.seed)]
    if set(named) < set(STANDARD_PROMPTS):
        words = ["--prompts", ",".join(named), *words]
    return words


def is_foreign(traces: Sequence[Trace]) -> bool:
    """Whether another program wrote a trace."""
    return any(trace.foreign for trace in traces)


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for item in items if item))


def limits_words(judgement: Judgement) -> str:
    """Return the detection limit in a sentence or two."""
    limits = judgement.limits
    if limits is None:
        return "There is no detection limit: these traces show whether tensors are equal, not how far apart they are."
    return (
        f"The smallest relative error that this run could have told from rounding is {number(limits.smallest)} "
        f"(at {limits.smallest_at}); at its least sensitive tap it is {number(limits.largest)} "
        f"(at {limits.largest_at})."
    )


def reason(found: Judgement | ModeJudgement) -> str:
    """Return why the verdict is what it is, over every prompt: a judgement's own reason names one prompt alone."""
    cells = found.cells if isinstance(found, ModeJudgement) else every_cell(found)
    worst = largest(cells)
    prompts = found.prompts if isinstance(found, ModeJudgement) else all_prompts(found)
    if any(item.ladder is not None and item.ladder.outcome is Outcome.SCALES for item in prompts) or (
        found.verdict is Verdict.STRUCTURAL_DRIFT and any(item.flips for item in prompts)
    ):
        return found.reason
    if found.verdict is Verdict.STRUCTURAL_DRIFT and worst is not None:
        return f"largest excess {times(worst.excess)}, at {where(worst)}; limit {LIMIT:g}"
    if found.verdict is Verdict.NO_DRIFT:
        return f"all {count(len(cells), 'pair')} are bit for bit equal"
    return found.reason


def every_cell(judgement: Judgement) -> tuple[Cell, ...]:
    """Return every decode cell of every prompt and mode."""
    return tuple(cell for item in all_prompts(judgement) for cell in item.cells)
