"""Plans are pure data: which arms run in which mode, over which tokens, read at which positions."""

from __future__ import annotations

import pytest

from driftprobe.errors import UsageError
from driftprobe.plan import EXTENSIONS, NOISE_ARMS, Arm, Mode, Plan, Prompt, at_rung, make_plan, sequence, tokens_needed

PROMPT = Prompt("p", (5, 6, 7))
N = 3


def plan(mode: Mode = Mode.AS_DESIGNED, **more: object) -> Plan:
    return make_plan(mode, PROMPT, **({"steps": 1, "seed": 0, "max_positions": 99} | more))  # type: ignore[arg-type]


def arms(found: Plan, name: str) -> list[Arm]:
    return [arm for arm in found.arms if arm.name == name]


def test_as_designed_has_all_arms_but_a():
    names = {arm.name for arm in plan().arms}
    assert names == {"P", "D", "P'", "D'", *(f"E{m}" for m in EXTENSIONS), *(f"N{i + 1}" for i in range(NOISE_ARMS))}


def test_kv_aligned_adds_arm_a_alone():
    assert {a.name for a in plan(Mode.KV_ALIGNED).arms} - {a.name for a in plan().arms} == {"A"}


@pytest.mark.parametrize("steps", [1, 3])
def test_prefill_and_decode_read_the_same_positions(steps):
    found = plan(Mode.KV_ALIGNED, steps=steps)
    positions = {name: [(r.step, r.position) for r in found.reads if r.arm == name] for name in ("P", "D", "A", "E7")}
    assert positions["P"] == [(k, N + k) for k in range(steps)]
    assert len(set(map(tuple, positions.values()))) == 1


def test_a_prefill_ends_at_its_token_and_decode_feeds_it_alone():
    found = plan(steps=2)
    assert [(call.start, call.stop) for arm in arms(found, "P") for call in arm.passes] == [(0, 4), (0, 5)]
    assert [(call.start, call.stop) for arm in arms(found, "D") for call in arm.passes] == [(0, 3), (3, 4), (4, 5)]


def test_the_extensions_are_longer_by_their_number():
    for m in EXTENSIONS:
        (arm,) = arms(plan(steps=2), f"E{m}")
        assert [(call.start, call.stop) for call in arm.passes] == [(0, N + 2 + m)]


def test_an_extension_that_the_model_has_no_room_for_is_left_out():
    names = {arm.name for arm in plan(max_positions=N + 1 + 7).arms}
    assert {"E1", "E7"} <= names
    assert "E31" not in names


def test_only_p_keeps_rows_and_only_a_takes_them():
    found = plan(Mode.KV_ALIGNED, steps=2)
    assert [arm.keeps_rows_for for arm in arms(found, "P")] == [0, 1]
    assert {arm.name for arm in found.arms if arm.keeps_rows_for is not None} == {"P"}
    assert [call.aligned_to for arm in arms(found, "A") for call in arm.passes] == [None, 0, 1]
    assert {arm.name for arm in found.arms for call in arm.passes if call.aligned_to is not None} == {"A"}


def test_noise_arms_are_prefills_of_the_very_lengths_of_p():
    """A longer one would be an extension too, and set the floor over a bug that depends on the prefill's length."""
    arms = plan(steps=3).arms
    lengths = {
        name: [call.stop for arm in arms if arm.name == name for call in arm.passes] for name in ("P", "N1", "N2")
    }
    assert lengths["N1"] == lengths["N2"] == lengths["P"] and len(lengths["P"]) == 3


def test_noise_arms_have_seeds_of_their_own_and_can_be_left_out():
    seeds = [arm.noise_seed for arm in plan(seed=4).arms if arm.name.startswith("N")]
    assert len(set(seeds)) == NOISE_ARMS
    assert seeds != [arm.noise_seed for arm in plan(seed=5).arms if arm.name.startswith("N")]
    assert not [arm for arm in plan(noise=False).arms if arm.name.startswith("N")]


def test_phases_are_written_with_their_step():
    assert {r.phase_name for r in plan(steps=2).reads} == {
        "prefill_last", "decode0", "decode1", "prefill_ext", "prefill_noise"}  # fmt: skip


def test_the_sequence_is_prompt_continuation_filler():
    assert sequence(PROMPT, [8], 7) == (5, 6, 7, 8, 5, 6, 7)
    assert tokens_needed(plan()) == N + 1 + max(EXTENSIONS)


def test_a_prompt_of_one_token_works():
    assert make_plan(Mode.AS_DESIGNED, Prompt("p", (5,)), steps=1, seed=0, max_positions=2).arms


@pytest.mark.parametrize(
    ("tokens", "what", "measured"), [((), "empty prompt", "0 tokens"), ((1, 2), "prompt too long", "2 tokens + 3")]
)
def test_a_prompt_that_does_not_fit_is_refused_in_five_parts(tokens, what, measured):
    with pytest.raises(UsageError) as caught:
        make_plan(Mode.AS_DESIGNED, Prompt("mine", tokens), steps=3, seed=0, max_positions=4)
    error = caught.value
    assert what in error.what
    assert "mine" in error.where
    assert measured in error.measured
    assert error.allowed
    assert error.next_step


def turned_plan(mode, steps):
    """Return the plan of a prompt of three chunks, for an engine with all knobs."""
    prompt = Prompt("p", tuple(range(1, 41)))
    return make_plan(mode, prompt, steps=steps, seed=0, max_positions=99, knobs=("threads", "chunks", "batch"))


def test_knobs_make_controls_of_their_own():
    found = turned_plan(Mode.KV_ALIGNED, steps=2)
    (chunked,) = arms(found, "P@chunks")
    assert [(call.start, call.stop) for call in chunked.passes] == [(0, 16), (16, 32), (32, 42)]
    assert [(r.phase_name, r.step, r.position) for call in chunked.passes for r in call.reads] == [
        ("prefill_chunked", 0, 40),
        ("prefill_chunked", 1, 41),
    ]
    turned = arms(found, "P@threads") + arms(found, "D@threads")
    assert [arm.threads for arm in turned] == [True] * 3
    assert not any(arm.threads for arm in found.arms if arm not in turned)
    batched = arms(found, "P@batch") + arms(found, "D@batch")
    assert [arm.batch for arm in batched] == [True] * 3
    assert not any(arm.batch for arm in found.arms if arm not in batched)


@pytest.mark.parametrize("length", [16, 17, 31, 32, 33])
def test_no_chunk_is_a_decode_step(length):
    """A fault of decode must not be in a control of prefill."""
    prompt = Prompt("p", tuple(range(1, length + 1)))
    (chunked,) = arms(
        make_plan(Mode.AS_DESIGNED, prompt, steps=1, seed=0, max_positions=99, knobs=("chunks",)), "P@chunks"
    )
    sizes = [call.stop - call.start for call in chunked.passes]
    assert sum(sizes) == length + 1
    assert min(sizes) > 1


def test_a_step_may_lie_in_a_chunk_before_the_last():
    found = make_plan(
        Mode.AS_DESIGNED, Prompt("p", tuple(range(1, 32))), steps=3, seed=0, max_positions=99, knobs=("chunks",)
    )
    (chunked,) = arms(found, "P@chunks")
    assert [[r.position for r in call.reads] for call in chunked.passes] == [[], [31], [32, 33]]


def test_a_prompt_within_one_chunk_has_none_and_a_rung_turns_neither_threads_nor_batch():
    short = make_plan(Mode.AS_DESIGNED, Prompt("p", (1, 2)), steps=1, seed=0, max_positions=99, knobs=("chunks",))
    assert not arms(short, "P@chunks")
    long = turned_plan(Mode.AS_DESIGNED, steps=1)
    assert [arm.name for arm in at_rung(long, "float64").arms if "@" in arm.name] == ["P@chunks"]


def test_each_step_of_arm_t_has_its_own_prefills_choice_for_every_token_before_it():
    prompt = Prompt("p", (1, 2, 3))
    found = make_plan(Mode.AS_DESIGNED, prompt, steps=3, seed=0, max_positions=99, routed=True)
    routed = [[(call.start, call.stop, call.routed_to) for call in arm.passes] for arm in arms(found, "T")]
    assert routed == [
        [(0, 3, 0), (3, 4, 0)],
        [(0, 3, 1), (3, 4, 1), (4, 5, 1)],
        [(0, 3, 2), (3, 4, 2), (4, 5, 2), (5, 6, 2)],
    ]
    reads = [[(r.step, r.position) for call in arm.passes for r in call.reads] for arm in arms(found, "T")]
    assert reads == [[(0, 3)], [(1, 4)], [(2, 5)]]
    assert not arms(plan(), "T")
