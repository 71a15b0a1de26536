"""The bar: what was promised, what was measured, and where a target is missed the reason, from the profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """One line of the bar."""

    part: str
    what: str
    limit: float
    at_most: bool
    measure: Callable[[Any], float | None]
    """From what the part found; None where that is not in it."""
    reason: str = ""
    """Why it may be missed: told only where it is."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a line of the bar."""

    what: str
    target: str
    measured: str
    met: str
    reason: str


def verdicts(known: Found) -> Iterator[Verdict]:
    """Return each target with what was measured."""
    for each in TARGETS:
        value = each.measure(known[each.part]["found"]) if each.part in known else None
        target = f"{'≤' if each.at_most else '≥'} {each.limit:g}"
        if value is None:
            yield Verdict(each.what, target, "", "", "")
            continue
        met = value <= each.limit if each.at_most else value >= each.limit
        told = f"{value:.3f}" if each.limit < 100 else f"{value:.0f}"  # 1.064 is not 1.06
        yield Verdict(each.what, target, told, "yes" if met else "no", _with_profile(each.reason, known))


def _with_profile(reason: str, known: Found) -> str:
    if "{" not in reason:
        return reason
    if "breakdown" not in known:
        return "its profile is not measured yet: `python -m benchmarks.speed --only breakdown`."
    return reason.format_map(known["breakdown"]["found"])


_DECODE = (
    "by processor time, of a step of {model} ms: hooks and what they note, on the model's own thread, {hooks} ms; "
    "fingerprints, rows and text, beside it and without the interpreter's lock, {begun} ms; checks, digest and file "
    "{written} ms (`python -m benchmarks.speed --only breakdown`). The last layer's share of these and the footer end "
    "after the model does, and where the machine has no core to spare all of it counts."
)
_PREFILL = (
    "a capture costs a bfloat16 prefill about as many milliseconds as a float32 one, which takes twice as long: hooks "
    "as in a decode step, rows that are copied, header and footer."
)
_SCORES = f"{_DECODE} Scores are a second product of query and keys, which a fused kernel does not show."
_WORK = (
    "hash, sketch and eight statistics in float64 are 42 vector operations for 64 bytes of float32 and 82 for 64 of "
    "bfloat16, of which this kind of processor starts four a cycle: from memory that is near the time of reading, in "
    "cache it is beyond it (docs/decisions/0008; `python -m benchmarks.fingerprint --parts`)."
)
_THREADS = (
    "XXH3 goes through a tensor in order, so one thread at a time hashes while the others sum up blocks; the two share "
    "the memory's bandwidth, and need a core each (docs/decisions/0008)."
)
_RUN = (
    "a run makes every arm's calls (prefills, decode steps, controls, the float64 rung), once for both modes; the bare "
    "script makes two. What the arms took of it stands in the table, `--ladder off` beside shows what the rung takes."
)
_ANALYSIS = "the rate counts start and imports; the rest is scanning, SHA-256, and turning rows into columns."
_PARQUET = (
    "the rate counts start and imports, polars' among them, which take most of the time that the target leaves "
    "(`python -X importtime -c 'import driftprobe.result, polars'`); the digest of all columns is taken of every file."
)


def _captured(dtype: str, phase: str, what: str) -> Callable[[Any], float | None]:
    return lambda found: float(found[dtype][phase][what]["median"]) if dtype in found else None


def _share(dtype: str, size: int) -> Callable[[Any], float | None]:
    return lambda found: next((e["share"] for e in found if (e["dtype"], e["elements"]) == (dtype, size)), None)


def _two(found: Any) -> float | None:
    return next((e.get("two") for e in found if (e["dtype"], e["elements"]) == ("float32", 1 << 26)), None)


def _ran(model: str) -> Callable[[Any], float | None]:
    return lambda found: float(found[model]["median"]) if model in found else None


def _started(command: str) -> Callable[[Any], float | None]:
    return lambda found: found[command]["median"] * found[command]["base_seconds"] if command in found else None


def _judged(container: str, what: Callable[[Found], float]) -> Callable[[Any], float | None]:
    return lambda found: next((what(e) for e in found.get("figures", ()) if e["container"] == container), None)


def _rate(each: Found) -> float:
    return float(each["records"] / each["wall"] / 1e6)


def _peak(each: Found) -> float:
    return float(each["peak"])


def _flat(found: Any) -> float | None:
    """Return the rate of the second size measured over that of the first."""
    rates = [_rate(each) for each in found.get("figures", ()) if each["container"] == "JSONL"]
    return rates[1] / rates[0] if len(rates) > 1 else None


def _peak_of_second(found: Any) -> float | None:
    peaks = [_peak(each) for each in found.get("figures", ()) if each["container"] == "JSONL"]
    return peaks[1] if len(peaks) > 1 else None


TARGETS = (
    Target("capture", "float32 prefill, scores off", 1.06, True, _captured("float32", "prefill", "scores off")),
    Target("capture", "float32 decode, scores off", 1.12, True, _captured("float32", "decode", "scores off"), _DECODE),
    Target("capture", "float32 prefill, scores on", 1.15, True, _captured("float32", "prefill", "scores on")),
    Target("capture", "float32 decode, scores on", 1.25, True, _captured("float32", "decode", "scores on"), _SCORES),
    Target(
        "capture", "bfloat16 prefill, scores off", 1.10, True, _captured("bfloat16", "prefill", "scores off"), _PREFILL
    ),
    Target(
        "capture", "bfloat16 decode, scores off", 1.15, True, _captured("bfloat16", "decode", "scores off"), _DECODE
    ),
    Target("fingerprint", "float32, 64 Mi elements: share of reading", 0.5, False, _share("float32", 1 << 26), _WORK),
    Target("fingerprint", "float32, 1 Mi", 0.3, False, _share("float32", 1 << 20), _WORK),
    Target("fingerprint", "bfloat16, 64 Mi", 0.35, False, _share("bfloat16", 1 << 26), _WORK),
    Target("fingerprint", "bfloat16, 1 Mi", 0.2, False, _share("bfloat16", 1 << 20), _WORK),
    Target("fingerprint", "one tensor of 64 Mi float32 by two threads ÷ by one, rate", 1.7, False, _two, _THREADS),
    Target("run", "`driftprobe run` on builtin:tiny ÷ bare script", 1.6, True, _ran("builtin:tiny"), _RUN),
    Target("run", "`driftprobe run` on 12 × 768 ÷ bare script", 1.6, True, _ran("12 × 768"), _RUN),
    Target("starts", "`--help`, seconds", 0.4, True, _started("--help")),
    Target("starts", "`analyze`, seconds", 0.4, True, _started("analyze")),
    Target("analysis", "1 M records, JSONL: M rows/s", 1.0, False, _judged("JSONL", _rate), _ANALYSIS),
    Target("analysis", "1 M records, Parquet: M rows/s", 2.0, False, _judged("Parquet", _rate), _PARQUET),
    Target("analysis", "1 M records, JSONL: MB at most", 500, True, _judged("JSONL", _peak)),
    Target("analysis", "1 M records, Parquet: MB at most", 500, True, _judged("Parquet", _peak)),
    Target("scale", "10 M records, JSONL: rate ÷ that of 1 M", 0.8, False, _flat),
    Target("scale", "10 M records, JSONL: MB at most", 700, True, _peak_of_second),
)
