"""Section 2 of the final report: projection hashes, attention statistics, KV alignment indicators."""

from __future__ import annotations

from collections.abc import Sequence

from driftprobe.judgement import Attention, Cell, Judgement, KvIndicators, ModeJudgement, Range, Status
from driftprobe.report.evidence import ATTENTION_TAPS
from driftprobe.report.facts import PROJECTIONS, drift_words, main_mode, only_paths, run_command, shut_words, where
from driftprobe.report.text import NOT_TOLD, blocks, code, listed, number, prose, table, times, truth
from driftprobe.taps import CACHE_TAPS
from driftprobe.trace import Trace


def alignment_section(judgement: Judgement, traces: Sequence[Trace]) -> str:
    """Return section 2: of kv_aligned, or of the mode that was run in its place, which is then said."""
    name = main_mode(judgement)
    mode = judgement.modes.get(name)
    if mode is None:
        return "## 2. KV Alignment Analysis (kv_aligned mode)\n\nNo mode was run."
    if only_paths(judgement):
        head, note = "## 2. KV Alignment Analysis (paths mode)", "No cache rows are put in or read in this mode."
    elif name == "kv_aligned":
        head, note = "## 2. KV Alignment Analysis (kv_aligned mode)", ""
    else:
        head = f"## 2. KV Alignment Analysis ({prose(name)} mode)"
        note = (
            f"These are the {prose(name)} figures: kv_aligned was not run. It adds arm A, decode with prefill's cache "
            f"rows: `{run_command('kv_aligned', traces)}`."
        )
    mine = [trace for trace in traces if trace.header.mode == name]
    return blocks([
        head,
        note,
        shut_words(judgement),
        _projections(mode),
        "### Attention Statistics",
        _attention(mode.attention, mine),
        "### KV Alignment Indicators",
        _indicators(mode),
        "Prefill's K is compared with decode's K, and V with V; never K with V.",
    ])  # fmt: skip


def _projections(mode: ModeJudgement) -> str:
    layers = [c.layer for c in mode.cells if c.tensor in PROJECTIONS and c.layer is not None]
    layer = min(layers, default=0)
    names = listed([prose(item.prompt) for item in mode.prompts], 4)
    rows = []
    for item in mode.prompts:
        cells = {c.tensor: c for c in item.cells if c.layer == layer and c.step == 0}
        for tensor in PROJECTIONS:
            rows += _projection_rows(tensor, layer, item.prompt, cells.get(tensor))
    return blocks([
        f"### Projection Hashes (Layer {layer}, {names})",
        table(("Tensor", "Layer", "Prompt", "Hash", "Notes"), rows),
        "Step 0, before RoPE. Every step and layer is in the TSV.",
    ])  # fmt: skip


def _projection_rows(tensor: str, layer: int, prompt: str, cell: Cell | None) -> list[tuple[str, ...]]:
    lead = (tensor, str(layer), code(prompt))
    if cell is None:
        return [(*lead, "not recorded", "no pair of prefill and decode has this tap")]
    token = "" if cell.reference.token_id is None else f", token {cell.reference.token_id}"
    at = "" if cell.reference.logical_tok_idx is None else f" at position {cell.reference.logical_tok_idx}"
    return [
        (*lead, code(cell.reference.hash), f"prefill_last{token}{at}"),
        (*lead, code(cell.candidate.hash), f"{prose(cell.candidate.phase)}: {drift_words(cell)}"),
    ]


def _attention(attention: Attention, traces: Sequence[Trace]) -> str:
    sides = (
        ("prefill", attention.pre_softmax_prefill, attention.post_softmax_prefill),
        ("decode", attention.pre_softmax_decode, attention.post_softmax_decode),
    )
    rows = [
        (f"{statistic.capitalize()}, {phase}", _statistic(pre, statistic), _statistic(post, statistic))
        for statistic in ("min", "max", "mean")
        for phase, pre, post in sides
    ]
    rows.append(("Source", _source(traces, "attn_scores"), _source(traces, "attn_probs")))
    hidden = any(r.source == "recomputed" for t in traces for r in t.records if r.tensor in ATTENTION_TAPS)
    note = " Recomputed: a fused kernel hides the tensor, so it was rebuilt from the captured q, k and mask."
    return blocks([
        table(("Metric", "Pre-Softmax", "Post-Softmax"), rows),
        "Over every layer, prompt and step. Masked scores (−inf) are left out." + (note if hidden else ""),
    ])  # fmt: skip


def _statistic(found: Range | None, statistic: str) -> str:
    return "not recorded" if found is None else number(getattr(found, statistic))


def _source(traces: Sequence[Trace], tensor: str) -> str:
    """Say whether the engine's own tensor was seen, or one rebuilt from its inputs."""
    sources = {r.source for t in traces for r in t.records if r.tensor == tensor and r.arm in {"P", "D"}}
    words = {"captured": "captured", "recomputed": "recomputed"}
    return "; ".join(words.get(source, prose(source)) for source in sorted(sources)) or "not recorded"


def _indicators(mode: ModeJudgement) -> str:
    kv = mode.kv
    rows = (
        ("K Hash Consistency", truth(kv.k_hash_consistent), _rows_words("K", "k_cache", mode)),
        ("V Hash Consistency", truth(kv.v_hash_consistent), _rows_words("V", "v_cache", mode)),
        ("K-V Aligned", truth(kv.kv_aligned), _aligned_words(kv, mode)),
    )
    return table(("Indicator", "Value", "Interpretation"), rows)


def _rows_words(letter: str, tap: str, mode: ModeJudgement) -> str:
    checks = [row for item in mode.prompts for row in item.rows if row.tensor == tap]
    compared, equal = sum(row.compared for row in checks), sum(row.equal for row in checks)
    if not compared:
        return f"{NOT_TOLD}: no cached {letter} row has a hash on both sides"
    if equal == compared:
        return f"consistent: {equal} of {compared} cached {letter} rows hash as prefill's"
    within = sum(row.within for row in checks)
    beyond = compared - equal - within
    sizes = [(within, "but are within the floor"), (beyond, "beyond the floor")]
    words = ", ".join(f"{amount} differ {how}" for amount, how in sizes if amount)
    return f"varies: {equal} of {compared} rows hash as prefill's; {words}"


def _aligned_words(kv: KvIndicators, mode: ModeJudgement) -> str:
    cells = [cell for cell in mode.cells if cell.tensor in CACHE_TAPS]
    failed = [cell for cell in cells if cell.status is Status.FAIL]
    if kv.kv_aligned is None:
        return f"{NOT_TOLD}: " + (
            "the trace cannot size a difference" if cells else "no k_cache or v_cache was compared"
        )
    if not failed:
        return f"K and V match: all {len(cells)} cache tensors are prefill's, bit for bit or within the floor"
    words = (
        f"mismatch: {len(failed)} of {len(cells)} cache tensors are beyond the floor, first {prose(where(failed[0]))}"
    )
    words += f" ({times(failed[0].excess)})"
    if kv.k_hash_consistent and kv.v_hash_consistent:
        words += "; the rows from before the step are equal, so it is the row that the step itself wrote"
    return words
