"""docs/performance.md, from what was measured."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.figures import Ratio, row


def render(found: dict[str, Any]) -> str:
    """Return docs/performance.md."""
    here = found["machine"]
    parts = [
        "# How fast it is",
        "",
        "Written by `make bench`; do not edit. Each figure is a ratio of two things that ran in turn in the same run: "
        "median, and first to last quartile. The figures themselves: [performance.json](performance.json).",
        "",
        f"{here['cpu']}, {here['cores']} cores, load {here['load']:.1f}; Python {here['python']}, "
        f"torch {here['torch']}, transformers {here['transformers']}; {here['date']}.",
        "",
        *_capture_table(found["capture"]),
        *_peer_table(found["peers"]),
        *_fingerprint_table(found["fingerprint"]),
        *_process_tables(found["run"], found["starts"]),
        "## Judging traces",
        "",
        found["analysis"].get("table") or f"Not measured: {found['analysis']['reason']}.",
        "",
    ]
    return "\n".join(parts)


TARGETS = {
    ("float32", "prefill", "scores off"): 1.06, ("float32", "decode", "scores off"): 1.12,
    ("float32", "prefill", "scores on"): 1.15, ("float32", "decode", "scores on"): 1.25,
    ("bfloat16", "prefill", "scores off"): 1.10, ("bfloat16", "decode", "scores off"): 1.15,
}  # fmt: skip


def _capture_table(capture_: dict[str, Any]) -> list[str]:
    rows = [
        row([dtype, phase, what, ratio, TARGETS.get((dtype, phase, what), ""), f"{1000 * ratio.seconds:.1f}"])
        for dtype, phases in capture_.items()
        for phase, each in phases.items()
        for what, ratio in each.items()
    ]
    return [
        "## Capture",
        "",
        "Random Llama, 12 layers × 768, one thread: a prefill of 128 tokens, and one decode step on its cache. Every "
        "tap, hash + 8 moments + sketch, and the hash of every cache row; traced (`driftprobe.capture`, with its "
        "engine and writer, until the last byte is written) ÷ untraced.",
        "",
        row(["dtype", "phase", "traced", "ratio", "target", "untraced ms"]),
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _peer_table(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, peer in found.items():
        phases = peer.get("phases", {})
        told = [_told(phases[phase]) if phase in phases else "" for phase in ("prefill", "decode")]
        rows.append(row([name, *told, peer.get("does") or f"not measured: {peer['reason']}"]))
    return [
        "### Beside others",
        "",
        "float32, the same calls, each in a process of its own and against its own untraced run. Install: "
        "`pip install -e '.[bench]'`.",
        "",
        row(["", "prefill", "decode", "what it does"]),
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _told(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _fingerprint_table(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## Fingerprint",
        "",
        "Hash + moments + sketch of one tensor, one thread, beside reading it alone "
        "(`python -m benchmarks.fingerprint`).",
        "",
        row(["dtype", "elements", "GB/s", "reading GB/s", "share"]),
        "|---|---|---|---|---|",
        *(row(each.values()) for each in rows),  # type: ignore[arg-type]
        "",
    ]


def _process_tables(runs: dict[str, Ratio], starts: dict[str, Ratio]) -> list[str]:
    return [
        "## Whole processes",
        "",
        "`driftprobe run`, both modes and all arms, on three prompts of 2, 16 and 32 tokens, from its start to its end "
        "÷ a script that imports, loads, and runs one prefill of 32 tokens and one decode step.",
        "",
        row(["model", "run ÷ bare script", "target", "bare script s"]),
        "|---|---|---|---|",
        *(row([name, ratio, "" if "off" in name else 1.6, f"{ratio.seconds:.1f}"]) for name, ratio in runs.items()),
        "",
        "Start to end of other commands, on one small trace; target 0.4 s.",
        "",
        row(["command", "÷ a Python that does nothing", "seconds"]),
        "|---|---|---|",
        *(row([f"`{name}`", ratio, f"{ratio.median * ratio.seconds:.2f}"]) for name, ratio in starts.items()),
        "",
    ]
