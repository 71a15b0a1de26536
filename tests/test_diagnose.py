"""The root cause in words: which rows, which op, which reading, and what else bears on it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from driftprobe.compare import NoPayloads
from driftprobe.diagnose import diagnose
from driftprobe.judgement import Judgement, Verdict
from driftprobe.verdict import judge
from make_trace import LENGTH, Change, Site, both, drifting, toy, toy_values, unchanged

D = ("D", "D'")
ALL = ("D", "D'", "A")
LAST = LENGTH - 1
"""Position of the last row before the step's own."""


def diagnosed(change: Change, mode: str = "as_designed", **more: object) -> Judgement:
    return diagnose(judge([toy(change, mode=mode, **more)[0]], NoPayloads()))  # type: ignore[arg-type]


def cause(change: Change, mode: str = "as_designed", **more: object) -> str:
    failure = diagnosed(change, mode, **more).first_failure
    assert failure is not None
    return failure.root_cause


def rows(tensor: str, change: Change, arms: tuple[str, ...] = D) -> Change:
    """Cache rows changed in layer 1, and everything behind them."""

    def changed(site: Site, array: np.ndarray) -> np.ndarray | None:
        if site.arm in arms and (site.layer, site.tensor) == (1, tensor):
            return change(site, array.copy())
        return drifting(0.1, arms, (1, "attn_scores"))(site, array)

    return changed


def shifted(by: int, empty: bool) -> Change:
    def change(_site: Site, array: np.ndarray) -> np.ndarray:
        array[:LENGTH] = np.roll(array[:LENGTH], by, axis=0)
        if empty:
            array[:by] = 0
        return array

    return change


def swapped(_site: Site, array: np.ndarray) -> np.ndarray:
    array[[0, LAST]] = array[[LAST, 0]]
    return array


def shuffled(_site: Site, array: np.ndarray) -> np.ndarray:
    array[:LENGTH] = array[[1, 0, 3, 2, 4]]
    return array


def zeroed(_site: Site, array: np.ndarray) -> np.ndarray:
    array[2] = 0
    return array


def of_layer_0(site: Site, _array: np.ndarray) -> np.ndarray:
    return toy_values(replace(site, layer=0), np.dtype(np.float32))


@pytest.mark.parametrize(
    ("tensor", "change", "words"),
    [
        ("k_cache", shifted(1, True), f"K rows 1–{LAST} of layer 1 hold prefill's rows shifted by one (+1), and row 0"),
        ("k_cache", shifted(-1, False), f"K rows 0–{LAST} of layer 1 hold prefill's rows shifted by one (−1)"),
        ("v_cache", shifted(2, False), f"V rows 0–{LAST} of layer 1 hold prefill's rows shifted by 2 (+2)"),
        ("k_cache", swapped, f"K rows 0 and {LAST} of layer 1 stand in each other's place"),
        ("k_cache", shuffled, "K rows of layer 1 are prefill's in another order (0←1, 1←0, 2←3, 3←2)"),
        ("v_cache", zeroed, "V row 2 of layer 1 is zero"),
        ("k_cache", of_layer_0, f"K rows 0–{LAST} of layer 1 are layer 0's"),
        ("v_cache", lambda _s, array: array + 1, "differ from prefill's and match no other row"),
    ],
)  # fmt: skip
def test_the_cache_rows_are_told_in_words(tensor, change, words):
    assert cause(rows(tensor, change)).startswith(words) or words in cause(rows(tensor, change))


def test_an_op_is_told_with_its_input_and_its_suspects():
    words = cause(drifting(0.1, D, (1, "q_rope")))
    for word in (
        "rotary embedding of the query",
        "layer 1 q_rope",
        "its input agrees, q_proj",
        "suspects: position of q",
    ):
        assert word in words


def test_an_op_whose_input_was_not_recorded_claims_no_agreement():
    words = cause(drifting(0.1, D, (1, "q_rope")), taps=("q_rope", "k_cache", "x_out"))
    assert "its result differs" in words
    assert "agrees" not in words


def test_a_tap_of_another_name_is_named():
    assert "layer 0 my_tap" in cause(drifting(0.1, D, (0, "my_tap")), taps=("q_proj", "my_tap"))


@pytest.mark.parametrize(
    ("arms", "words"), [(D, "the cache's contents are wrong"), (ALL, "the decode computation is wrong")]
)
def test_the_reading_is_part_of_the_cause(arms, words):
    assert words in cause(drifting(0.1, arms, (1, "attn_scores")), "kv_aligned")
    assert words in cause(rows("k_cache", swapped, arms), "kv_aligned")


def test_without_arm_a_there_is_no_reading():
    assert "prefill's rows put in" not in cause(drifting(0.1, D, (1, "attn_scores")))


def test_a_guilty_control_points_at_the_prefill():
    words = cause(drifting(0.1, ("E7",), (0, "attn_ctx")))
    for word in ("prefill itself", "layer 0 attn_ctx", "causal mask"):
        assert word in words


def test_of_two_kinds_of_failure_the_other_is_mentioned():
    decode_first = both(drifting(0.1, D, (0, "q_proj")), drifting(0.1, ("E1",), (1, "x_in")))
    assert "a longer prefill differs too, first at layer 1 x_in: the prefill may be the wrong side" in cause(
        decode_first
    )
    control_first = both(drifting(0.1, D, (1, "q_proj")), drifting(0.1, ("E1",), (0, "x_in")))
    assert "decode0 differs too, first at layer 1 q_proj" in cause(control_first)


def test_earlier_taps_that_are_not_told_are_not_passed_over():
    """The first tap that is known to fail need not be the first that differs."""
    trace, _ = toy(drifting(0.5, D, (0, "k_rope")), arms=())
    hide = {"sketch": None, "l2": None, "abs_sum": None}
    some = tuple(replace(r, **hide) if r.tensor in {"k_rope", "k_cache"} and r.layer == 0 else r for r in trace.records)
    failure = diagnose(judge([replace(trace, records=some)], NoPayloads())).first_failure
    assert failure is not None
    assert (failure.layer, failure.tensor) == (0, "v_cache")
    assert "2 earlier taps differ by an amount that the trace cannot tell, from layer 0 k_rope on" in failure.root_cause


def test_nothing_is_diagnosed_where_nothing_failed():
    found = diagnosed(unchanged)
    assert found.verdict is Verdict.NO_DRIFT
    assert found.first_failure is None


def test_the_mode_and_its_prompt_say_the_same_cause():
    found = diagnosed(drifting(0.1, D, (1, "q_rope")))
    mode = found.modes["as_designed"]
    assert mode.first_failure == mode.prompts[0].first_failure
    assert mode.first_failure is not None
    assert mode.first_failure.root_cause


def test_an_infinite_drift_is_diagnosed():
    broken = lambda site, array: array * np.nan if site.arm in D and site.order >= (0, (1, 1, 0)) else array  # noqa: E731
    assert "layer 1 x_in" in cause(broken)


def test_the_pages_example_is_what_its_command_prints(tmp_path):
    """Floors move a little with the version of torch; the verdict, the cause and the drifts of a bug do not."""
    pytest.importorskip("transformers")
    page = (Path(__file__).parents[1] / "docs" / "how-it-decides.md").read_text(encoding="utf-8")
    example = page[page.index(". An example\n") : page.index(". What it cannot tell\n")]
    (command,) = re.findall(r"^driftprobe (.*)$", example, flags=re.MULTILINE)
    code = "from driftprobe.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    shown, printed = (" ".join(text.split()) for text in (example, done.stdout))
    for label, end in (("verdict:", "why:"), ("root cause:", "detection limit:"), ("impact:", ", margin")):
        assert printed[printed.index(label) : printed.index(end)] in shown
    found = {}
    for line in (tmp_path / "artifacts/2026-01-01/shifted/B3_66_V2_ANALYSIS.tsv").read_text().splitlines():
        field = line.split("\t")
        if (field[0], field[1], field[4]) == ("kv_aligned", "p6_len_32", "0"):
            found[field[5]] = field[14]
    for tap, drift in re.findall(r"^\| `(\w+)` \| (\d\S*) \|", example, flags=re.MULTILINE):
        if float(drift) > 1e-3:
            assert f"{float(found[tap]):.2e}" == drift
