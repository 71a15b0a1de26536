"""What two paths alone can show of a fault: on which of them it is, and in which of its calls (mode `paths`)."""

from __future__ import annotations

from itertools import pairwise

from driftprobe.causes import Parameters
from driftprobe.hypotheses.base import PREFILL
from driftprobe.judgement import Status
from driftprobe.scene import Scene
from driftprobe.taps import CANDIDATE, REFERENCE
from driftprobe.trace import CALL_TOKENS

ONE, SEVERAL = "of one token", "of several tokens"


def side_and_calls(scene: Scene, side: str) -> Parameters:
    """Return `side`, and `calls` where the side at fault is wrong in all its calls of one kind, and in no other.

    The tap is the first that fails at any position, so no position's failure there is another one's consequence. Where
    the calls of one kind all stand behind the others, a fault from some position on looks alike: no calls are named.
    """
    if not scene.of_paths or not side:
        return {}
    arm, name = ("P", REFERENCE) if side == PREFILL else (scene.failure.arm, CANDIDATE)
    sizes, judged = scene.measured(CALL_TOKENS, arm), scene.positions
    found = {
        status: {sizes[p] == 1 for p, one in judged.items() if one is status and p in sizes}
        for status in (Status.FAIL, Status.PASS)
    }
    kinds = [sizes[p] == 1 for p in sorted(judged.keys() & sizes.keys())]
    if sum(kind != before for before, kind in pairwise(kinds)) < 2:
        return {"side": name}
    for single, words in ((True, ONE), (False, SEVERAL)):
        if found[Status.FAIL] == {single} and found[Status.PASS] == {not single}:
            return {"side": name, "calls": words}
    return {"side": name}
