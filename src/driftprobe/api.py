"""probe(), run() and compare(): run the experiment, or put two runs side by side, and judge what came of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import date as calendar
from pathlib import Path
from typing import Any

from driftprobe.artifacts import (
    Layout,
    check_comparison_place,
    check_place,
    keep_other_modes,
    staged,
    write_reports,
)
from driftprobe.boundaries import LONGEST, Boundaries
from driftprobe.boundaries import boundaries as derive
from driftprobe.capture import CaptureOptions, capture_once, choose_tokens, trace_name
from driftprobe.constants import add_constants
from driftprobe.diagnose import diagnose
from driftprobe.engines import open_engine
from driftprobe.engines.base import Constant, Engine
from driftprobe.errors import EngineError, UsageError
from driftprobe.judgement import Judgement, TraceJudgement
from driftprobe.load import load_traces, traces_folder
from driftprobe.options import RunOptions, Weighed, make_plans, rung_of
from driftprobe.payload import Payloads
from driftprobe.plan import Arm, Plan, Prompt, at_rung, parse_mode, together
from driftprobe.products import LOOKS, Wanted, wanted_matrices
from driftprobe.prompts import LENGTHS, Source, boundary_prompts, builtin_prompt, make_prompts
from driftprobe.prune import prune_payloads
from driftprobe.result import Progress, Result, Step, analyze
from driftprobe.side_by_side import side_of, write_comparison
from driftprobe.taps import place
from driftprobe.trace import Trace
from driftprobe.trace_file import read_header, read_trace
from driftprobe.verdict import judge, judge_trace

Prompts = Mapping[str, Source] | Iterable[Source]


def probe(
    model: Any = "builtin:tiny",
    prompts: Prompts | None = None,
    *,
    mode: str = "both",
    steps: int = 1,
    seed: int = 0,
    dtype: str | None = None,
    attn: str | None = None,
    tokenizer: Any = None,
    layers: Sequence[int] | None = None,
    payload: str = "failing",
    fault: str | None = None,
    strength: float | None = None,
    boundaries: bool = False,
    longest: int = LONGEST,
    ladder: str = "auto",
    scores: str = "on",
    out: str | Path | None = None,
) -> Result:
    """Run a model both ways and return the verdict.

    `model` is a local folder, `builtin:tiny`, or a causal language model object of transformers (its dtype and
    attention kernel stay as they are). `prompts` maps names to text or token ids, or lists them; token ids need no
    tokenizer. The default is the three built-in prompts. `ladder` says whether all is run again in float64: `auto`
    (where the model is small enough), `on` or `off`; `scores` whether attention's are recorded, `on` or `off`: where a
    fused kernel hides them, they cost another product of query and keys. `out` is the artifacts folder to write;
    without it traces live in a temporary folder as long as the result does, and `Result.write` keeps them. `boundaries`
    adds prompts at the lengths where the model itself switches, up to `longest` tokens (see `driftprobe.boundaries`).

    Raises UsageError (or a subclass) for input that cannot be used, EngineError where the model fails while it runs.
    """
    modes = parse_mode(mode)
    engine = make_engine(model, dtype=dtype, attn=attn, tokenizer=tokenizer)
    chosen = builtin_prompts(engine) if prompts is None else make_prompts(prompts, engine)
    if boundaries:
        chosen += boundary_prompts(find_boundaries(engine, steps, longest), engine, () if prompts is None else chosen)
    options = RunOptions(
        modes=modes, steps=steps, seed=seed, layers=None if layers is None else tuple(layers), payload=payload,
        fault=fault, strength=strength, ladder=ladder, scores=scores, date=calendar.today().isoformat(),
        output="" if out is None else str(out),
    )  # fmt: skip
    if out is not None:
        return run(engine, chosen, options, Path(out))
    temporary = tempfile.TemporaryDirectory(prefix="driftprobe-")
    result = run(engine, chosen, options, Path(temporary.name) / "run")
    return replace(result, _temporary=temporary)


def make_engine(model: Any, *, dtype: str | None, attn: str | None, tokenizer: Any) -> Engine:
    """Return the engine of a model folder, `builtin:tiny`, or a model object of transformers."""
    if isinstance(model, str | Path):
        return open_engine("hf", model=str(model), dtype=dtype or "float32", attn=attn)
    _reject_for_objects(dtype, attn)
    from driftprobe.engines.hf import HFEngine

    return HFEngine(model, tokenizer)


def compare(
    left: str | Path, right: str | Path, root: Path, *, date: str = "", progress: Progress | None = None
) -> tuple[Result, list[str]]:
    """Compare two runs, prefill with prefill and decode with decode, and write traces and reports into `root`.

    `left` and `right` are folders as `analyze` takes them. Returns the verdict, and a line for each prompt that could
    not be compared. Raises UsageError where nothing could, OutputError where `root` overlaps a side or holds another
    run than an earlier comparison, TraceError for a trace that breaks the format.
    """
    check_comparison_place(root, [Path(left), Path(right)])
    sides = [side_of(Path(folder), load_traces(Path(folder)), traces_folder(Path(folder))) for folder in (left, right)]
    with staged(root) as stage:
        left_out = write_comparison(sides[0], sides[1], stage, date, root.as_posix())
        result = analyze(stage.root, progress=progress)
        write_reports(stage.root, result.reports())
    return replace(result, folder=root / "traces"), left_out


def run(
    engine: Engine, prompts: Sequence[Prompt], options: RunOptions, root: Path, progress: Progress | None = None
) -> Result:
    """Run every prompt in every mode, judge, and write traces, logs and reports into `root`.

    Nothing is touched before all input is checked; `root` changes only when everything is written.
    """
    plans = make_plans(engine, prompts, options)
    check_place(root)
    planted = engine.plant(options.fault, options.strength) if options.fault else nullcontext()
    with planted as expected, staged(root) as stage:
        _capture_all(plans, engine, stage, options, progress or (lambda _step: None))
        headers = (read_header(path) for path in sorted(stage.traces.glob("*.jsonl")))
        keep_other_modes(root, stage, [header for header in headers if header is not None])
        result = finish(engine, stage, options.payload)
        write_reports(stage.root, result.reports())
    return Result(result.judgement, result.traces, root / "traces", expected=expected)


def finish(engine: Weighed, stage: Layout, payload: str) -> Result:
    """Judge what was captured, add matrices that would tell more, judge again, and keep the payloads that are needed.

    The result is what `analyze` says of the folder as it then is. A trace is read and judged again only where it has
    gained a matrix, and judged again where it has lost payloads.

    Raises TraceError for a trace that breaks the format, OutputError where it cannot be written.
    """
    traces = {trace.path: trace for trace in load_traces(stage.root)}
    ready: dict[str, TraceJudgement] = {}
    judged = _judge_again(traces, ready, stage)
    for looks in (LOOKS, 0) if payload != "none" else ():  # the second time for a failure that the first has found
        grown = add_matrices(engine, wanted_matrices(judged, looks), tuple(traces.values()), stage)
        if grown:
            for name in grown:
                traces[name] = read_trace(stage.traces / name)
                del ready[name]
            judged = _judge_again(traces, ready, stage)
    if payload == "failing" and _pruned(judged, traces, ready, stage):
        judged = _judge_again(traces, ready, stage)
    return Result(judged, tuple(traces.values()), traces_folder(stage.root))


def _judge_again(traces: Mapping[str, Trace], ready: dict[str, TraceJudgement], stage: Layout) -> Judgement:
    """Judge the traces that `ready` lacks, put them there, and return the judgement of all."""
    payloads, every = Payloads(stage.traces), tuple(traces.values())
    for name, trace in traces.items():
        if name not in ready:
            ready[name] = judge_trace(trace, payloads)
    return diagnose(judge(every, payloads, ready), every, payloads)


def _pruned(judged: Judgement, traces: dict[str, Trace], ready: dict[str, TraceJudgement], stage: Layout) -> bool:
    """Prune every trace; one that loses payloads takes the old one's place, unjudged. Returns whether any did."""
    before = len(ready)
    for mode in judged.modes.values():
        for prompt in mode.prompts:
            for item in (prompt, *([prompt.ladder.judged] if prompt.ladder else [])):
                kept = prune_payloads(traces[item.file], item, stage.traces)
                if kept is not traces[item.file]:
                    traces[item.file] = kept
                    del ready[item.file]
    return len(ready) < before


def add_matrices(engine: Weighed, wanted: Wanted, traces: Sequence[Trace], stage: Layout) -> list[str]:
    """Add the matrices that a judgement asks for to its traces; returns the files that grew: judge those again.

    What the budget leaves out is said in the log. Raises OutputError where a trace cannot be written.
    """
    grown = []
    for file, places in wanted.items():
        trace, lines = next(t for t in traces if t.path == file), list[str]()
        new, left_out = add_constants(trace, _weights(engine, places, lines), stage.traces)
        grown += [file] if new else []
        if lines or left_out:
            stage.logs.mkdir(parents=True, exist_ok=True)
            with (stage.logs / file.replace(".jsonl", ".log")).open("a", encoding="utf-8") as log:
                log.writelines(f"{line}\n" for line in (*lines, *left_out))
    return grown


def _weights(engine: Weighed, places: Iterable[tuple[int | None, str]], lines: list[str]) -> Iterator[Constant]:
    """Yield the matrices of ops; one that cannot be read, on a meta device say, loses no run: `lines` says which."""
    for layer, tensor in places:
        try:
            yield from engine.weights(layer, tensor)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            lines.append(f"the matrix of {place(layer, tensor)} cannot be read: {type(error).__name__}: {error}")


def builtin_prompts(engine: Engine, names: Iterable[str] = tuple(LENGTHS)) -> list[Prompt]:
    """Return built-in prompts by name."""
    return [builtin_prompt(name, engine) for name in names]


def find_boundaries(engine: Engine, steps: int = 1, longest: int = LONGEST) -> Boundaries:
    """Return the lengths at which the engine's model switches, and which of them are probed.

    Raises UsageError where `longest` leaves none.
    """
    if longest < 2:  # a prompt of one token and the step's own
        raise UsageError("nothing to probe", where="--longest", measured=str(longest), allowed="2 tokens or more",
                         next_step="leave --longest out, or give the longest total that is worth its time")  # fmt: skip
    facts = engine.facts
    return derive(facts.switches, max_positions=facts.max_positions, steps=steps, longest=longest)


def _reject_for_objects(dtype: str | None, attn: str | None) -> None:
    given = [name for name, value in (("dtype", dtype), ("attn", attn)) if value is not None]
    if given:
        raise UsageError(
            "a model object keeps its own dtype and attention", where=", ".join(given),
            measured="given with a model object",
            allowed="only with a model folder", next_step="convert the model before you hand it over",
        )  # fmt: skip


def _capture_all(plans: Sequence[Plan], engine: Engine, stage: Layout, options: RunOptions, progress: Progress) -> None:
    """Capture every plan, then every plan again at the ladder's rung; plans that may be, each arm once for all."""
    rung = rung_of(engine, options.ladder)
    groups = together(plans) if engine.alike_in_modes else [(plan,) for plan in plans]
    again = [tuple(at_rung(plan, rung) for plan in group) for group in groups] if rung else []
    total, done = sum(len(group[0].arms) for group in (*groups, *again)) + 1, 0  # one for the judgement

    def told(what: str) -> None:
        nonlocal done
        done += 1
        progress(Step(done, total, what))

    tokens = []
    for group in groups:
        tokens.append(choose_tokens(group[0], engine))
        _capture(group, engine, tokens[-1], stage, options, told)
    try:
        with engine.at(rung) if again else nullcontext():
            for group, chosen in zip(again, tokens, strict=bool(again)):
                _capture(group, engine, chosen, stage, options, told)
    except EngineError as error:  # the run itself stands; what was captured at the rung is an incomplete trace
        (stage.logs / f"ladder_{rung}.log").write_text(error.render() + "\n", encoding="utf-8")
    progress(Step(total - 1, total, "judging"))


def _capture(
    plans: Sequence[Plan], engine: Engine, tokens: tuple[int, ...], stage: Layout, options: RunOptions,
    progress: Callable[[str], None],
) -> None:  # fmt: skip
    """Write the traces of plans that are captured together, and each one's log."""
    started, first = time.perf_counter(), plans[0]
    rung, modes = f", at {first.rung}" if first.rung else "", " and ".join(plan.mode.value for plan in plans)
    logs = {plan.mode: _log_start(plan, plans, engine) for plan in plans}

    def told(arm: Arm, line: str) -> None:
        for plan in plans:
            if arm in plan.arms:
                logs[plan.mode].append(f"{time.perf_counter() - started:8.3f} s  arm {line}")
        progress(f"{first.prompt.name} {modes}{rung} arm {line}")

    labels = {"output": options.output} | ({"fault": options.fault} if options.fault else {})
    labels |= {} if options.strength is None else {"strength": f"{options.strength:g}"}
    settings = CaptureOptions(run=options.output or first.prompt.name, date=options.date, payload=options.payload,
                              labels=labels)  # fmt: skip
    paths, said = capture_once(plans, engine, tokens, stage.traces, settings, told), engine.said()
    stage.logs.mkdir(parents=True, exist_ok=True)
    for plan, path in zip(plans, paths, strict=True):
        lines = [*logs[plan.mode], *said, f"{time.perf_counter() - started:8.3f} s  wrote {path.name}"]
        (stage.logs / f"{trace_name(plan)}.log").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _log_start(plan: Plan, plans: Sequence[Plan], engine: Engine) -> list[str]:
    """Return the first lines of a plan's log: the engine, what is run, and that it was run for other modes as well."""
    facts, rung = engine.facts, f", at {plan.rung}" if plan.rung else ""
    lines = [f"{facts.name} {facts.version} {facts.model} {facts.dtype} {facts.attention} on {facts.device}",
             f"mode {plan.mode.value}, prompt {plan.prompt.name}, {len(plan.prompt.token_ids)} tokens, "
             f"{plan.steps} steps, seed {plan.seed}{rung}"]  # fmt: skip
    others = [other for other in plans if other is not plan]
    if not others:
        return lines
    named = " and ".join(other.mode.value for other in others)
    shared = {arm.name for arm in plan.arms} & {arm.name for other in others for arm in other.arms}
    names = ", ".join(dict.fromkeys(arm.name for arm in plan.arms if arm.name in shared))
    return [*lines, f"run once for this mode and {named}, in both traces: arms {names}"]
