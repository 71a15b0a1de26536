"""B3_66_V2_FINAL_REPORT.md: the seed report's eight sections, filled by measurement.

`TBD` stands only in the cells of a mode that was not run, with the command that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from driftprobe.faults import FAULTS
from driftprobe.floor import LIMIT
from driftprobe.judgement import Judgement, Reading, Verdict
from driftprobe.report import facts
from driftprobe.report.alignment import alignment_section
from driftprobe.report.conclusion import conclusion, recommendations
from driftprobe.report.evidence import evidence_matrix
from driftprobe.report.facts import FILES
from driftprobe.report.failures import failures_section
from driftprobe.report.ladder import ladder_section
from driftprobe.report.paths import paths_section
from driftprobe.report.snippets import MAX_WORDS, about, snippets
from driftprobe.report.text import blocks, bullets, clip, code, count, prose, table
from driftprobe.taps import place
from driftprobe.trace import Trace
from driftprobe.version import __version__

SHOWN_TEXT = 60
"""Characters of a prompt's text that the report prints."""
_Section = Callable[[Judgement, Sequence[Trace]], str]


def render(judgement: Judgement, traces: Sequence[Trace]) -> str:
    """Return the report as Markdown."""
    sections: tuple[_Section, ...] = (
        _head, _summary, alignment_section, _hypotheses, failures_section, _snippets, conclusion, recommendations,
        _artifacts,
    )  # fmt: skip
    body = "\n\n---\n\n".join(section(judgement, traces) for section in sections)
    return f"{body}\n\n---\n\n**Generated**: {prose(facts.generated(traces))} by driftprobe {__version__}\n"


def _head(judgement: Judgement, traces: Sequence[Trace]) -> str:
    lines = [
        ("Date", prose(facts.date(traces))),
        ("Status", facts.status(judgement)),
        ("Mode", _mode_words(judgement)),
        ("Run", ", ".join(map(prose, facts.runs(traces)))),
        ("Engine", prose(_engine(judgement))),
        ("Verdict", f"**{judgement.verdict.value}**: {prose(facts.reason(judgement))}"),
    ]
    head = "  \n".join(f"**{name}**: {words}" for name, words in lines if words)
    return blocks(["# B3.66 v2 FINAL REPORT", head, _planted(traces)])


def _mode_words(judgement: Judgement) -> str:
    mode = facts.main_mode(judgement)
    if facts.only_paths(judgement):
        return "paths (two ways to run one model, compared at every position that both computed)"
    missing = [name for name in facts.MODES if name not in judgement.modes]
    if not mode:
        return "none was run"
    return f"{prose(mode)} (single mode; {missing[0]} was not run)" if missing else (
        "kv_aligned (dual mode: as_designed + kv_aligned)"
    )  # fmt: skip


def _engine(judgement: Judgement) -> str:
    prompts = facts.all_prompts(judgement)
    if not prompts:
        return ""
    engine = prompts[0].engine
    known = (engine.model, engine.dtype, f"{engine.attention} attention" if engine.attention else "",
             count(engine.layers, "layer") if engine.layers else "", engine.device)  # fmt: skip
    return ", ".join(part for part in (f"{engine.name} {engine.version}".strip(), *known) if part)


def _planted(traces: Sequence[Trace]) -> str:
    lines = []
    for name in facts.faults(traces):
        known = FAULTS.get(name)
        if known is None:
            lines.append(f"> **Planted fault**: {code(name)}. This run tests the probe, not the engine.")
            continue
        first = f", first at {place(known.layer, known.tensor)}" if known.tensor and known.verdict != "N/A" else ""
        lines.append(
            f"> **Planted fault**: {code(name)}: {prose(known.breaks)}. This run tests the probe, not the engine. "
            f"What it must find: {known.verdict}{first}."
        )
    return "\n>\n".join(lines)


def _summary(judgement: Judgement, traces: Sequence[Trace]) -> str:
    rows = []
    for name in facts.mode_names(judgement):
        mode = judgement.modes.get(name)
        if mode is None:
            rows.append((prose(name), f"PENDING: `{facts.run_command(name, traces)}`", "TBD", "TBD", "TBD"))
            continue
        failure = mode.first_failure
        first = facts.no_failure(mode) if failure is None else prose(facts.where(failure))
        rows.append((prose(name), mode.status, first, facts.pass_fail(mode), mode.verdict.value))
    paths = (
        ("Run logs", "run/"),
        ("Traces", "traces/"),
        ("Analysis", FILES["analysis"]),
        ("TSV", FILES["tsv"]),
        ("Verdict", FILES["verdict"]),
    )
    return blocks([
        "## 1. Execution Summary",
        table(("Mode", "Status", "First Failure", "Pass/Fail Count", "Verdict"), rows),
        "One count is one tap of one position: the candidate's tensor against the reference's."
        if facts.only_paths(judgement)
        else "One count is one tap of one step: decode's tensor against prefill's.",
        paths_section(traces),
        "### Prompts Executed",
        bullets(_prompt_words(known) for known in facts.prompts(traces)) or "None.",
        "### Output Paths",
        bullets(f"**{name}**: {code(facts.path(traces, file))}" for name, file in paths),
        "" if facts.output(traces) else "The traces do not name their folder; these paths start at this report.",
    ])  # fmt: skip


def _prompt_words(known: facts.PromptFacts) -> str:
    if not known.length:
        return f"{code(known.name)}: token count and text are not recorded in the traces"
    if known.paths:
        return f"{code(known.name)}: {count(known.length, 'token')}, token ids {_ids(known.token_ids)}"
    decoded = known.token_ids[known.length :]
    text = (
        f"“{prose(clip(known.text, SHOWN_TEXT))}”"
        if known.text
        else f"token ids {_ids(known.token_ids[: known.length])}"
    )
    return (
        f"{code(known.name)}: {count(known.length, 'token')}, {text}; "
        f"decoded after it: {count(len(decoded), 'token')} (id {_ids(decoded)})"
    )


def _ids(token_ids: Sequence[int]) -> str:
    shown = " ".join(str(token) for token in token_ids[:8])
    return shown + (" …" if len(token_ids) > 8 else "")


def _hypotheses(judgement: Judgement, traces: Sequence[Trace]) -> str:
    matrix = (
        (row.label, "✓" if row.supports_h0 else "", "✓" if row.supports_h1 else "", prose(row.figure))
        for row in evidence_matrix(judgement, traces)
    )
    return blocks([
        "## 3. Drift Structural vs Real Mismatch",
        "### Hypothesis Testing",
        table(("Hypothesis", "Description"), (
            ("H₀ (Null)", "Drift is structural: differences by seq_len and cache semantics, within rounding; no bug"),
            ("H₁ (Alt)", "Drift is real: a bug in the implementation of attention, KV cache or another op"),
        )),
        "### Evidence Matrix",
        table(("Evidence", "Supports H₀", "Supports H₁", "Figure"), matrix),
        "A tick is set by its figure alone; a row without data has none. Ticks are not votes: one drift that "
        "arithmetic cannot explain decides for H₁. “×” counts floors: drift over what arithmetic alone does there. "
        "Figures pool every mode that was run.",
        _left_out(judgement),
        "### Verdict Criteria",
        _criteria(judgement),
        f"**This run**: **{judgement.verdict.value}**. {prose(facts.reason(judgement))}.",
        "### Two-by-two Reading",
        _readings(judgement, traces),
        ladder_section(judgement),
    ])  # fmt: skip


def _left_out(judgement: Judgement) -> str:
    shut = [item for item in facts.all_prompts(judgement) if not facts.open_gates(item)]
    names = ", ".join(f"{prose(item.prompt)} ({prose(item.mode)})" for item in shut)
    return f"No evidence, because a gate is shut: {names}." if shut else ""


def _criteria(judgement: Judgement) -> str:
    conditions = {
        Verdict.NO_DRIFT: "Every compared pair is bit for bit equal",
        Verdict.STRUCTURAL_DRIFT: "Drift explained by seq_len/cache semantics: "
        f"it exists, and stays within {LIMIT:g} × the floor everywhere",
        Verdict.MISMATCH: "Evidence of unexpected inconsistency (bug): "
        f"a drift beyond {LIMIT:g} × the floor, here or on the precision ladder; an op with equal inputs beyond its "
        "own rounding; or a change along a fault's direction that rounding does not make; all gates open",
        Verdict.NOT_AVAILABLE: "Trace incomplete or not comparable (KV alignment not available): a gate is shut, "
        "or a difference cannot be sized",
    }
    return table(("Verdict", "Condition", "This run"), (
        (f"**{verdict.value}**", words, "◀" if verdict is judgement.verdict else "")
        for verdict, words in conditions.items()
    ))  # fmt: skip


def _readings(judgement: Judgement, traces: Sequence[Trace]) -> str:
    if facts.only_paths(judgement):
        return "Not read in mode paths: both sides use the model as they please, and no cache rows are put in."
    if "kv_aligned" not in judgement.modes:
        command = facts.run_command("kv_aligned", traces)
        return (
            f"D is decode with its own cache; A is decode with prefill's rows put in. TBD: arm A runs with `{command}`."
        )
    rows = []
    for item in judgement.modes["kv_aligned"].prompts:
        told = item.reading is not Reading.NONE
        both = (item.decided_by.cells, item.decided_by.aligned_cells)
        beyond = [_beyond(len(facts.failing(cells)), len(cells), told) for cells in both]
        rows.append((code(item.prompt), *beyond, f"**{item.reading.value}**", prose(item.reading.words)))
    return blocks([
        "D is decode with its own cache; A is decode with prefill's cache rows put in, bit for bit.",
        table(("Prompt", "D beyond floor", "A beyond floor", "Reading", "Meaning"), rows),
    ])  # fmt: skip


def _beyond(failed: int, compared: int, told: bool) -> str:
    if not told:
        return "not read"
    return f"{'yes' if failed else 'no'} ({failed} of {compared})"


def _snippets(judgement: Judgement, traces: Sequence[Trace]) -> str:
    return blocks([
        "## 5. Evidence Snippets (JSON)",
        f"> **Note**: Evidence snippets are limited to {MAX_WORDS} words maximum per citation.",
        about(judgement, traces),
        *(f"```json\n{snippet}\n```" for snippet in snippets(judgement, traces)),
    ])  # fmt: skip


def _artifacts(judgement: Judgement, traces: Sequence[Trace]) -> str:
    rows = [(what, code(facts.path(traces, FILES[key]))) for what, key in (
        ("Final report", "final"), ("Analysis", "analysis"), ("TSV, one row a pair", "tsv"), ("Verdict", "verdict"),
    )]  # fmt: skip
    for trace in traces:
        header = trace.header
        named = f"{code(header.prompt)}, {prose(header.mode)}"
        files = trace.path.split(", ") if trace.foreign else [trace.path]
        rows += [(f"Raw trace, {named}", code(facts.path(traces, f"traces/{file}"))) for file in files if file]
        if not trace.foreign:
            log = f"run/{header.prompt}_{header.mode}.log"
            rows.append((f"Run log, {named}", code(facts.path(traces, log))))
    for ladder in judgement.ladders:
        item = ladder.judged
        named = f"{code(item.prompt)}, {prose(item.mode)}, in {prose(ladder.rung)}"
        rows.append((f"Raw trace, {named}", code(facts.path(traces, f"traces/{item.file}"))))
        rows.append((f"Run log, {named}", code(facts.path(traces, f"run/{item.file.removesuffix('.jsonl')}.log"))))
    note = "Another program wrote the traces, so there is no run log." if any(t.foreign for t in traces) else ""
    return blocks([
        "## 8. Artifacts Reference",
        table(("File", "Path"), rows),
        note,
        f"Every report here is rebuilt from the traces alone by {code(facts.report_command(traces))}.",
    ])  # fmt: skip
