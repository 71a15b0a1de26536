"""docs/performance.md, from the parts that were measured: tables, and what each figure of the bar came to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.speed.bar import verdicts
from benchmarks.speed.figures import row
from benchmarks.speed.long import HIDDEN, LAYERS
from benchmarks.speed.subject import VOCABULARY

Found = dict[str, Any]


def render(known: Found) -> str:
    """Return docs/performance.md from part → machine, seconds and what was found, as performance.json has them."""
    parts = [
        "# How fast it is",
        "",
        "Written by `make bench`; do not edit. Each ratio is of two things that ran in turn in the same run: median, "
        "and first to last quartile. The figures themselves: [performance.json](performance.json).",
        "",
        *_bar(known),
    ]
    for name, title, section in SECTIONS:
        parts += [f"## {title}", ""]
        if name not in known:
            parts += [f"Not measured yet: `python -m benchmarks.speed --only {name}`.", ""]
            continue
        parts += [*section(known[name]["found"]), _where(name, known[name]), ""]
    return "\n".join(parts)


def _where(name: str, part: Found) -> str:
    here = part["machine"]
    return (
        f"`python -m benchmarks.speed --only {name}`, {part['seconds']} s: {here['cpu']}, {here['cores']} cores, load "
        f"{here['load']:.1f} at its end; Python {here['python']}, torch {here['torch']}, transformers "
        f"{here['transformers']}; {here['date']}."
    )


def _bar(known: Found) -> Iterator[str]:
    yield from ("## The bar", "", row(["what", "target", "measured", "met"]), "|---|---|---|---|")
    unmet: dict[str, list[str]] = {}
    for each in verdicts(known):
        yield row([each.what, each.target, each.measured or "not measured", each.met])
        if each.met == "no" and each.reason:
            unmet.setdefault(each.reason, []).append(each.what)
    yield ""
    for reason, what in unmet.items():
        yield from (f"**{'; '.join(what)}**: {reason}", "")


def told(ratio: Found) -> str:
    """Return a ratio with its spread."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _capture(found: Found) -> list[str]:
    rows = [
        row([dtype, phase, what, told(ratio), f"{1000 * ratio['base_seconds']:.1f}"])
        for dtype, phases in found.items()
        for phase, each in phases.items()
        for what, ratio in each.items()
    ]
    return [
        "Random Llama, 12 layers × 768, one thread: a prefill of 128 tokens, and one decode step on its cache. Every "
        "tap, hash + 8 moments + sketch, and the hash of every cache row; traced (`driftprobe.capture`, with its "
        "engine and writer, until the last byte is written) ÷ untraced.",
        "",
        row(["dtype", "phase", "traced", "ratio", "untraced ms"]),
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def _breakdown(found: Found) -> list[str]:
    return [
        "Processor time of one captured decode step, scores off, ms: the model alone, and what the capture adds.",
        "",
        row(["model", "hooks", "fingerprints and text", "checks, digest, file"]),
        "|---|---|---|---|",
        row([found[name] for name in ("model", "hooks", "begun", "written")]),
        "",
    ]


def _peers(found: Found) -> list[str]:
    rows = []
    for name, peer in found.items():
        phases = peer.get("phases", {})
        ratios = [told(phases[phase]) if phase in phases else "" for phase in ("prefill", "decode")]
        rows.append(row([name, *ratios, peer.get("does") or f"not measured: {peer['reason']}"]))
    return [
        "float32, the same calls, each in a process of its own and against its own untraced run. Install: "
        "`pip install -e '.[bench]'`.",
        "",
        row(["", "prefill", "decode", "what it does"]),
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _fingerprint(found: list[Found]) -> list[str]:
    return [
        "Hash + moments + sketch of one tensor, one thread, beside reading it alone "
        "(`python -m benchmarks.fingerprint`). Last: the same tensor by two threads, how much sooner; below 1 Mi "
        "elements one does it.",
        "",
        row(["dtype", "elements", "GB/s", "reading GB/s", "share", "two threads"]),
        "|---|---|---|---|---|---|",
        *(row(list(each.values())) for each in found),
        "",
    ]


def _runs(found: Found) -> list[str]:
    return [
        "`driftprobe run`, both modes and all arms, on three prompts of 2, 16 and 32 tokens, from its start to its end "
        "÷ a script that imports, loads, and runs one prefill of 32 tokens and one decode step.",
        "",
        row(["model", "run ÷ bare script", "bare script s", "arms", "their calls s"]),
        "|---|---|---|---|---|",
        *(row([name, told(r), f"{r['base_seconds']:.1f}", r["arms"], r["arms_seconds"]]) for name, r in found.items()),
        "",
    ]


def _starts(found: Found) -> list[str]:
    return [
        "Start to end of commands, on one small trace.",
        "",
        row(["command", "÷ a Python that does nothing", "seconds"]),
        "|---|---|---|",
        *(row([f"`{name}`", told(r), f"{r['median'] * r['base_seconds']:.2f}"]) for name, r in found.items()),
        "",
    ]


def _analysis(found: Found) -> list[str]:
    return [found.get("table") or f"Not measured: {found['reason']}.", ""]


def _long(found: Found) -> list[str]:
    return [
        f"A decode step on a filled cache, every K and V row hashed; {LAYERS} layers × {HIDDEN}. Most of the peak is "
        f"the model's own: its logits of the prefill are tokens × {VOCABULARY} × 4 bytes.",
        "",
        row(["tokens", "rows", "seconds", "µs a row", "trace MB", "peak MB"]),
        "|---|---|---|---|---|---|",
        *(row([length, *each.values()]) for length, each in found.items()),
        "",
    ]


SECTIONS: tuple[tuple[str, str, Callable[[Any], list[str]]], ...] = (
    ("capture", "Capture", _capture),
    ("breakdown", "Where a decode step's time goes", _breakdown),
    ("peers", "Beside others", _peers),
    ("fingerprint", "Fingerprint", _fingerprint),
    ("run", "Whole runs", _runs),
    ("starts", "Other commands", _starts),
    ("analysis", "Judging traces: a million records", _analysis),
    ("long", "Long prompts", _long),
    ("scale", "Judging traces: ten and sixteen million records", _analysis),
)
