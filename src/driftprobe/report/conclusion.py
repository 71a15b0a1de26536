"""Sections 6 and 7 of the final report: what follows from the verdict, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from driftprobe.climb import sharper_words, sides_of
from driftprobe.floor import LIMIT, is_turned
from driftprobe.judgement import Cell, Failure, Impact, Judgement, Outcome, Status, Verdict
from driftprobe.report import facts
from driftprobe.report.ladder import rung_limits
from driftprobe.report.paths import after_paths
from driftprobe.report.text import blocks, bullets, code, count, number, printable, prose, table, times, truth
from driftprobe.taps import BY_NAME, place
from driftprobe.trace import Trace


def conclusion(judgement: Judgement, traces: Sequence[Trace]) -> str:
    """Return section 6: the verdict in words, its impact apart from its cause, and the detection limit."""
    return blocks([
        "## 6. Conclusion",
        f"**{judgement.verdict.value}** — {_headline(judgement)}",
        bullets(_meaning(judgement)),
        _modes_disagree(judgement),
        "### Impact, Apart from Cause",
        _impact_table(judgement),
        impact_words(judgement),
        facts.shut_words(judgement),
        "### Detection Limit",
        prose(facts.limits_words(judgement)),
        "A smaller fault can hide below it: this report does not rule that out." if judgement.limits else "",
        _sharper_limit(judgement),
    ])  # fmt: skip


def _sharper_limit(judgement: Judgement) -> str:
    limits = rung_limits(judgement)
    if limits is None:
        return ""
    return (
        f"On the precision ladder the limit is {number(limits.smallest)} to {number(limits.largest)}, in "
        f"{prose(judgement.ladders[0].rung)}: a fault that does not depend on the dtype is seen from there on."
    )


def _headline(judgement: Judgement) -> str:
    cells = facts.every_cell(judgement)
    both = " and ".join(facts.sides(judgement))
    if judgement.verdict is Verdict.NO_DRIFT:
        return f"{both} gave the same bits at all {len(cells)} compared taps."
    if judgement.verdict is Verdict.NOT_AVAILABLE:
        return f"it cannot be told whether {both} agree: {prose(judgement.reason)}."
    if judgement.verdict is Verdict.STRUCTURAL_DRIFT:
        return (
            f"{both} differ at {len(facts.differing(cells))} of {len(cells)} compared taps, and arithmetic "
            "explains all of it."
        )
    failure = judgement.first_failure
    assert failure is not None, "a MISMATCH has a first failure"
    if failure.of_control:
        both = f"arms {_arms(failure)}" if is_turned(failure.arm) else "prefill and a longer prefill"
    return f"{both} differ by more than arithmetic explains, first at {prose(facts.where(failure))}."


def _arms(failure: Failure) -> str:
    return " and ".join(map(prose, reversed(sides_of(failure))))


def _meaning(judgement: Judgement) -> list[str]:
    if judgement.verdict is Verdict.NO_DRIFT:
        return ["No drift exists, so there is none to explain.", "No fix needed."]
    if judgement.verdict is Verdict.STRUCTURAL_DRIFT:
        return _structural(judgement)
    if judgement.verdict is Verdict.NOT_AVAILABLE:
        return [
            "This is neither a pass nor a fail.",
            *(f"{prose(item.prompt)} ({prose(item.mode)}): {prose(item.reason)}"
              for item in facts.all_prompts(judgement) if item.verdict is Verdict.NOT_AVAILABLE),
        ]  # fmt: skip
    failure = judgement.first_failure
    return _mismatch(failure, judgement) if failure is not None else []


def _structural(judgement: Judgement) -> list[str]:
    worst = facts.largest(facts.every_cell(judgement))
    size = (
        ""
        if worst is None
        else f": the largest excess is {times(worst.excess)} (limit {LIMIT:g}), at {prose(facts.where(worst))}"
    )
    scaled = [ladder.outcome.words for ladder in judgement.ladders if ladder.outcome is Outcome.SCALES]
    found = [
        f"Every drift is within {LIMIT:g} × its floor{size}." if not scaled else f"{scaled[0].capitalize()}{size}.",
        "Variance through seq_len and cache semantics is expected behaviour. No fix needed.",
    ]
    if judgement.impact is not None and judgement.impact.flip == "tie flip":
        found.append(
            "The chosen token differs because two logits are nearly tied (tie flip); rounding decides between them."
        )
    return found


def _mismatch(failure: Failure, judgement: Judgement) -> list[str]:
    cells = [cell for item in facts.all_prompts(judgement) for cell in item.decided_by.cells]
    failed, compared = len(facts.failing(cells)), len(cells)
    told = sharper_words(failure.local, failure.match)
    return [
        f"Drift {number(failure.drift)}, floor {number(failure.floor)}: {times(failure.excess)}, limit {LIMIT:g}.",
        *([f"So little may be arithmetic, but {prose(told)}."] if told else []),
        f"Root cause: {prose(failure.root_cause)}.",
        f"{failed} of {count(compared, 'tap')} fail; those behind the first are its consequences or further faults.",
        _side(failure),
    ]


def _side(failure: Failure) -> str:
    if is_turned(failure.arm):
        return "One arm was run twice with a knob of the engine turned. That alone does not say which setting is wrong."
    if failure.of_control:
        return "Both sides are prefills, so the fault is in the prefill: it depends on the length or on later tokens."
    return "The two sides differ from there on. That alone does not say which of the two is wrong."


def _modes_disagree(judgement: Judgement) -> str:
    verdicts = {mode.verdict for mode in judgement.modes.values()}
    if len(verdicts) < 2:
        return ""
    said = "; ".join(f"{prose(mode.mode)}: {mode.verdict.value}" for mode in judgement.modes.values())
    return f"The modes do not agree ({said}). The run's verdict is the gravest."


def _impact_table(judgement: Judgement) -> str:
    rows = []
    for mode in judgement.modes.values():
        impact = mode.impact or Impact(None, None, None, None, "unknown")
        rows.append((prose(mode.mode), number(impact.kl), number(impact.max_abs_dlogit), truth(impact.top1_agree),
                     number(impact.margin), impact.flip))  # fmt: skip
    head = ("Mode", "KL (nats)", "Max abs Δlogit", "Top-1 agrees", "Top-2 margin", "Flip")
    return table(head, rows, "lrrlrl")


def impact_words(judgement: Judgement) -> str:
    """Return what the difference does to the output, in a sentence or two of plain words."""
    logits = [cell for cell in facts.every_cell(judgement) if cell.tensor == "logits"]
    if not logits:
        return "No logits were compared, so the impact on the output is not known."
    lead = "The figures are those of the worst step of the worst prompt."
    return f"{lead} {_kind_of_impact(judgement.impact, logits, _inner(judgement))}"


def _kind_of_impact(impact: Impact | None, logits: Sequence[Cell], inner: Sequence[Cell]) -> str:
    different = facts.differing(inner)
    if different and all(cell.drift.equal for cell in logits):
        return f"Internal drift without logit impact: {len(different)} inner taps differ, the logits are bit-equal."
    if impact is not None and impact.flip in ("tie flip", "confident flip"):
        why = (
            "rounding alone can turn so small a margin"
            if impact.flip == "tie flip"
            else "rounding cannot turn that margin"
        )
        return f"The two sides choose different tokens: a {impact.flip} (margin {number(impact.margin)}; {why})."
    if different and all(cell.status is Status.PASS for cell in logits):
        return (
            f"Internal drift without logit impact: {len(different)} inner taps differ, the logits stay within their "
            "floor and the chosen token is the same."
        )
    if any(cell.status is Status.FAIL for cell in logits):
        return "The logits themselves are beyond their floor" + (
            "; the chosen token is still the same." if impact is not None and impact.top1_agree else "."
        )  # fmt: skip
    return "All logits are equal bit for bit." if not different else "How far the logits differ is not told."


def _inner(judgement: Judgement) -> list[Cell]:
    return [cell for cell in facts.every_cell(judgement) if cell.tensor != "logits"]


def recommendations(judgement: Judgement, traces: Sequence[Trace]) -> str:
    """Return section 7: numbered steps with runnable commands."""
    steps = [*_missing_modes(judgement, traces), *_next_steps(judgement, traces)]
    steps.append(("Look further", f"`{facts.FILES['analysis']}` has every gate, control and floor; "
                  f"`{facts.FILES['tsv']}` has every pair. Rebuild them after an upgrade:",
                  facts.report_command(traces)))  # fmt: skip
    return blocks(["## 7. Recommendations", *(_step(i, *parts) for i, parts in enumerate(steps, start=1))])


def next_command(judgement: Judgement, traces: Sequence[Trace]) -> str:
    """Return the command to type next: the first of section 7 that follows from the verdict; else nothing.

    The run's own command again, for CI, is none.
    """
    return next((command for title, _, command in _next_steps(judgement, traces) if command and title != _KEEP), "")


_KEEP = "Keep it so"
_Step = tuple[str, str, str]
"""A title, a sentence, and a command or nothing."""


def _step(index: int, title: str, words: str, command: str) -> str:
    shell = f"\n   ```bash\n   {command}\n   ```" if command else ""
    return f"{index}. **{title}**: {words}{shell}"


def _missing_modes(judgement: Judgement, traces: Sequence[Trace]) -> list[_Step]:
    if facts.only_paths(judgement):
        return []
    gain = {
        "as_designed": "It says what fails first in the engine as it is.",
        "kv_aligned": "Its arm A tells wrong cache contents from a wrong computation.",
    }
    return [
        (f"Run {name} too", gain[name] + _same_prompts(traces), facts.run_command(name, traces))
        for name in facts.MODES
        if name not in judgement.modes
    ]


def _same_prompts(traces: Sequence[Trace]) -> str:
    if facts.is_foreign(traces):
        return " Another program wrote these traces: let it write them again, or run the model's own folder here:"
    own = facts.other_prompts(traces)
    names = ", ".join(code(name) for name in own[:4]) + (" …" if len(own) > 4 else "")
    return f" Give your own prompts again ({names}), with `--prompt` or `--prompt-file`:" if own else ""


def _next_steps(judgement: Judgement, traces: Sequence[Trace]) -> list[_Step]:
    if facts.only_paths(judgement):
        return after_paths(judgement)
    again = facts.run_command("both", traces)
    steps: list[_Step] = []
    if judgement.verdict is Verdict.MISMATCH and judgement.first_failure is not None:
        steps += _after_mismatch(judgement.first_failure, traces)
    elif judgement.verdict is Verdict.NOT_AVAILABLE:
        steps += [("Open the gate", words, command) for words, command in _openers(judgement, traces)]
        if not facts.faults(traces):
            steps.append(("Run again", "Once the cause is mended:" + _same_prompts(traces), again))
    elif judgement.verdict is Verdict.STRUCTURAL_DRIFT:
        steps.append(("Document it", "Note the largest excess and the detection limit as expected behaviour.", ""))
        steps += [] if judgement.ladders else _finer(traces)
        steps.append((_KEEP, "Run this in CI; exit code 0 means no bug was found:" + _same_prompts(traces), again))
    else:
        steps.append((_KEEP, "Run this in CI; exit code 0 means no bug was found:" + _same_prompts(traces), again))
    if facts.faults(traces):
        words = "The planted fault is gone without `--fault`:" + _same_prompts(traces)
        steps.append(
            ("Judge the engine itself", words, facts.run_command("both", traces, fault=False, suffix="_clean"))
        )
    return steps


def _after_mismatch(failure: Failure, traces: Sequence[Trace]) -> list[_Step]:
    tap = BY_NAME.get(failure.tensor)
    at = prose(place(failure.layer, failure.tensor))
    suspects = f"{at} ({tap.op}). Suspects: {tap.suspect}." if tap else f"the op that makes {at}."
    found = [("Look first at", suspects, "")]
    if failure.layer is not None:
        layers = ",".join(str(n) for n in range(max(0, failure.layer - 1), failure.layer + 1))
        words = "Record only the layers around it, with whole tensors to compare by hand:" + _same_prompts(traces)
        command = facts.run_command("kv_aligned", traces, "--layers", layers, "--payload", "all", suffix="_close")
        found.append(("Look closer", words, command))
    if not facts.faults(traces):
        words = "Exit code 0 means that the bug is gone:" + _same_prompts(traces)
        found.append(("Prove the fix", words, facts.run_command("both", traces)))
    return found


def _finer(traces: Sequence[Trace]) -> list[_Step]:
    """Return how to lower the detection limit: the next finer dtype, where there is one."""
    # not float64: transformers' norms and softmax cast to float32 inside, so its floors are those of float32
    finer = {"bfloat16": "float32", "float16": "float32"}
    dtype = traces[0].header.engine.dtype if traces else ""
    if dtype not in finer or traces[0].foreign:
        return []
    words = f"In {finer[dtype]} rounding is smaller, and a real bug keeps its size:" + _same_prompts(traces)
    command = facts.run_command("both", traces, dtype=finer[dtype], suffix=f"_{finer[dtype]}")
    return [("See smaller faults", words, command)]


def _openers(judgement: Judgement, traces: Sequence[Trace]) -> list[tuple[str, str]]:
    """Return what opens each gate that is shut, once a gate."""
    shut = {gate.name for item in facts.all_prompts(judgement) for gate in item.gates if not gate.passed}
    found = [(words, _VALIDATE if name in _BY_FORMAT else "") for name, words in _OPENS.items() if name in shut]
    if not shut:
        untold = any(cell.status is Status.UNKNOWN for cell in facts.every_cell(judgement))
        found.append(
            (_UNTOLD if untold else "Check how arm A puts prefill's rows into the cache.", _VALIDATE if untold else "")
        )
    folder = facts.path(traces, "traces") if facts.output(traces) else "DIR"
    return [(words, command and printable(f"{command} {shlex.quote(folder)}")) for words, command in found]


_VALIDATE = "driftprobe validate"
_BY_FORMAT = frozenset(("complete", "compared", "paired", "same token"))
"""Gates whose cause a validation of the traces can show."""
_UNTOLD = "Hashes show that tensors differ, not by how much. Write `l2` and `sketch`, or payloads, with every record."
_OPENS = {
    "complete": "A trace has no end: the run was stopped. Run it again to the end.",
    "compared": "Nothing was compared. Give prefill and decode records the same prompt, layer, tensor and position.",
    "paired": "Some records have no partner. Write every tap in both phases, for the same positions.",
    "same token": "The two sides hold different tokens or positions. Feed decode the token that prefill had there.",
    "aligned": "The embedding differs: the two sides did not process one token. Check the ids fed to decode.",
    "deterministic": "The engine does not repeat itself. Switch on its deterministic kernels, or run one request.",
    "fired": "A planned tap did not fire. `driftprobe taps` lists the taps; check the engine's names for them.",
    "read back": "The cache did not keep the rows that were put in. Check the engine's way to set its cache.",
    "finite": "NaN or infinity stands in both phases. Find the op that makes it; that comes before any comparison.",
    "plausible": "A large drift stands upstream of bit-equal tensors: the tap there is off the path. Mend the tap.",
}  # fmt: skip
