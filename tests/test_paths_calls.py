"""Where the rows of a call stand, and which axis counts tokens: the pure parts of probe_paths."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from driftprobe.engines.hf.paths.axes import Layout, RowOrders, Size, find_layout, follows_keys, token_rows  # noqa: E402
from driftprobe.engines.hf.paths.calls import Call, Placer  # noqa: E402
from driftprobe.engines.hf.paths.engine import _varies  # noqa: E402

TEXT = [5, 7, 7, 9, 2, 7]


def call(*rows: list[int], **more: object) -> Call:
    return Call(tokens_BT=list(rows), rows=len(rows), count=len(rows[0]), **more)  # type: ignore[arg-type]


def positions(placer: Placer, *calls: Call) -> list[list[int]]:
    return [[position for _, position in placer.place(one).positions] for one in calls]


def test_calls_that_name_nothing_go_on_or_begin_anew_as_their_tokens_say() -> None:
    assert positions(Placer(TEXT), call(TEXT[:3]), call(TEXT[3:4]), call(TEXT[4:])) == [[0, 1, 2], [3], [4, 5]]
    assert positions(Placer(TEXT), call(TEXT[:3]), call(TEXT[:4]), call(TEXT)) == [[0, 1, 2], [0, 1, 2, 3], [*range(6)]]


def test_padding_is_dropped_and_the_row_is_told_by_its_tokens() -> None:
    mask = [[1, 1, 1, 0], [0, 1, 1, 1]]
    left = Placer(TEXT).place(call([9, 9, 9, 0], [0, 5, 7, 7], mask_BS=mask))
    assert (left.row, left.positions) == (1, ((1, 0), (2, 1), (3, 2)))
    named = Placer(TEXT, row=0).place(call([9, 9, 9, 0], [0, 5, 7, 7], mask_BS=mask))
    assert (named.row, named.positions) == (0, ())


def test_a_position_id_is_believed_before_a_cache_and_neither_against_the_tokens() -> None:
    placer = Placer(TEXT)
    placer.place(call(TEXT[:3], past=0))
    placed = placer.place(call(TEXT[3:5], past=4, positions_BT=[[3, 4]]))
    assert placed.positions == ((0, 3), (1, 4)) and placed.moved == 0
    moved = placer.place(call(TEXT[5:], past=9))
    assert moved.positions == ((0, 5),) and moved.moved == 1


def test_a_reference_that_names_its_positions_one_too_high_has_no_hole_in_its_text() -> None:
    """Its cache holds all that was fed, so nothing stands in between; without that witness the named ones are taken."""
    placer = Placer()
    placer.place(call(TEXT[:3], past=0))
    placed = placer.place(call(TEXT[3:], past=3, positions_BT=[[4, 5, 6]]))
    assert [p for _, p in placed.positions] == [3, 4, 5]
    assert placer.sequence_of_last_call == TEXT
    unseen = Placer().place(call(TEXT[3:], past=3, positions_BT=[[3, 4, 5]]))
    assert [p for _, p in unseen.positions] == [3, 4, 5]


@pytest.mark.parametrize("named", [{"past": 4}, {"located": [4]}])
def test_another_token_behind_all_that_a_cache_was_fed_stands_at_no_earlier_place(named: dict[str, object]) -> None:
    """`generate` chose 7 where the text has 2: that is not the 7 at position 2 once more."""
    placer = Placer(TEXT)
    placer.place(call(TEXT[:4], cache=placer))
    placed = placer.place(call([7], cache=placer, **named))
    assert (placed.positions, placed.stray) == ((), 4)
    astray = placer.place(call([9], cache=placer, **{key: 5 if key == "past" else [5] for key in named}))
    assert astray.positions == ()


def test_a_row_of_attention_weights_is_as_long_as_the_text_that_its_call_sees() -> None:
    weights = [Size((1, 4, 9, 9), 1, 9), Size((1, 4, 1, 10), 1, 1), Size((1, 4, 1, 11), 1, 1)]
    assert follows_keys(Layout(2), weights)
    assert not follows_keys(Layout(1), [Size((1, 9, 8), 1, 9), Size((1, 1, 8), 1, 1)])
    assert not follows_keys(Layout(2), [Size((1, 4, 9, 16), 1, 9), Size((1, 4, 1, 16), 1, 1)])


def test_a_module_that_fires_once_an_expert_sees_routed_tokens_even_where_all_go_to_one() -> None:
    """One call needs three experts, the others two: the second firing is another expert's, whatever its size."""
    first, second, third = [("experts.act", "output", time) for time in range(3)]
    more = SimpleNamespace(fired={first: [0, 1], second: [0, 1], third: [0]})
    always = SimpleNamespace(fired={first: [0, 1], second: [0, 1]})
    rows = Layout(0)
    assert _varies(second, {second: rows}, [more])
    assert _varies(second, {second: rows}, [always]), "the first firing has no axis of tokens"
    assert not _varies(second, {first: rows, second: rows}, [always])


def test_a_row_counts_only_if_all_before_it_is_the_references() -> None:
    other = Placer(TEXT).place(call([5, 7, 1, 9, 2, 7]))
    assert other.positions == ((0, 0), (1, 1)) and other.stray == 2


def test_a_second_prompt_on_a_used_cache() -> None:
    cache = object()
    placer = Placer(TEXT)
    first = placer.place(call([5, 7, 3, 3, 3], cache=cache, past=0))
    assert first.positions == ((0, 0), (1, 1)) and first.stray == 2
    second = placer.place(call(TEXT[2:], cache=cache, past=2))
    assert [p for _, p in second.positions] == [2, 3, 4, 5]


@pytest.mark.parametrize(("sizes", "axis"), [
    ([Size((1, 5, 8), 1, 5), Size((1, 3, 8), 1, 3)], 1),
    ([Size((5, 8), 1, 5), Size((3, 8), 1, 3)], 0),
    ([Size((10, 8), 2, 5), Size((6, 8), 2, 3)], 0),
    ([Size((1, 8, 5), 1, 5), Size((1, 8, 3), 1, 3)], 2),
    ([Size((1, 4, 5, 8), 1, 5), Size((1, 4, 1, 8), 1, 1)], 2),
    ([Size((1, 5, 5), 1, 5), Size((1, 5, 3), 1, 3)], 2),
    ([Size((1, 8, 8), 1, 5), Size((1, 8, 6), 1, 3)], None),
    ([Size((5, 8), 1, 5), Size((2, 8), 1, 3)], None),
    ([Size((1, 8, 5), 1, 5)], None),
    ([Size((1, 5, 8), 1, 5), Size((1, 1, 8), 1, 9, 1)], 1),
])  # fmt: skip
def test_the_token_axis_is_the_one_that_follows_every_call(sizes: list[Size], axis: int | None) -> None:
    assert find_layout(sizes) == (None if axis is None else Layout(axis))


def test_rows_of_a_batch_and_the_last_ones_that_a_head_keeps() -> None:
    value = torch.arange(12.0).reshape(2, 3, 2)
    rows = token_rows(value, Layout(1), 1, 2, 3)
    assert rows is not None and rows[0].equal(value[1]) and rows[1] == 0
    flat = token_rows(value.reshape(6, 2), Layout(0), 1, 2, 3)
    assert flat is not None and flat[0].equal(value[1])
    turned = token_rows(value.transpose(1, 2), Layout(2), 0, 2, 3)
    assert turned is not None and turned[0].equal(value[0])
    kept = token_rows(value[:, 2:], Layout(1), 0, 2, 3)
    assert kept is not None and kept[1] == 2


def test_rows_in_another_order_are_told_from_new_ones() -> None:
    orders, value = RowOrders(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    orders.add(value[None])
    assert not orders.reordered(value)
    assert orders.reordered(value[[1, 0, 2, 3, 4]])
    assert not orders.reordered(value + 1)
