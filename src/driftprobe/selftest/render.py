"""A self-test as text: SELF_TEST.md for people, self_test.json for programs."""

from __future__ import annotations

import json
from dataclasses import asdict

from driftprobe.selftest.result import SelfTest, TapLimit, Trial


def reports(found: SelfTest) -> dict[str, str]:
    """Return every report's text by file name."""
    return {"SELF_TEST.md": _markdown(found), "self_test.json": _json(found)}


def strength_in_words(trial: Trial) -> str:
    """Return a trial's strength with its unit, or `present`."""
    return "present" if trial.strength is None else f"{trial.strength:g} {trial.unit}".strip()


def outcome_in_words(trial: Trial) -> str:
    """Return whether the probe fired."""
    return ("yes" if trial.fired else "NO") if trial.acted else "N/A"


def limit_in_words(limit: TapLimit) -> str:
    """Return a limit, with the rung's where there is one."""
    return f"{limit.limit:.2e}" if limit.rung is None else f"{limit.limit:.2e} ({limit.rung:.2e})"


def _json(found: SelfTest) -> str:
    body = {
        "schema": "driftprobe/self-test/1", "model": found.model, "dtype": found.dtype, "passed": found.passed,
        "clean": {"verdict": found.clean.value, "reason": found.clean_reason},
        "trials": [asdict(trial) for trial in found.trials], "limits": [asdict(limit) for limit in found.limits],
    }  # fmt: skip
    return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


def _markdown(found: SelfTest) -> str:
    lines = [
        "# Self-test", "",
        f"{found.model}, {found.dtype}: **{'PASSED' if found.passed else 'FAILED'}**", "",
        f"Without a fault: {found.clean.value}. {found.clean_reason}", "",
        "## One fault of each family, planted in this model", "",
        "| family | fault | strength | fired | excess | found at | expected at | cause named | cause expected |",
        "|---|---|---|---|---:|---|---|---|---|",
        *(_row(trial) for trial in found.trials if trial.acted), "",
    ]  # fmt: skip
    idle = [trial for trial in found.trials if not trial.acted]
    if idle:
        lines += ["Families that cannot act here:", "", *(f"- {trial.family}: {trial.reason}" for trial in idle), ""]
    missed = [trial for trial in found.trials if trial.acted and not trial.fired]
    if missed:
        lines += ["Not seen:", "", *(f"- {trial.family}, {trial.fault}: {trial.reason}" for trial in missed), ""]
    lines += [
        "## Detection limits", "",
        "The smallest relative error (LIMIT × floor) that the run without a fault could have told from rounding, and "
        "the same at the ladder's top rung.", "",
        "| layer | tap | limit | at the rung | floor set by |", "|---|---|---:|---:|---|",
        *(f"| {'' if x.layer is None else x.layer} | {x.tensor} | {x.limit:.2e} | "
          f"{'' if x.rung is None else f'{x.rung:.2e}'} | {x.set_by} |" for x in found.limits), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _row(trial: Trial) -> str:
    excess = "" if trial.excess is None else f"×{trial.excess:.3g}"
    cells = (trial.family, trial.fault, strength_in_words(trial), outcome_in_words(trial), excess, trial.found_at,
             trial.expected_at, trial.cause or "none", trial.expected_cause)  # fmt: skip
    return "| " + " | ".join(cells) + " |"
