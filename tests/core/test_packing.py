"""Packs hold every row once: as a path of segments, at its own positions, its trained tokens counted once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.core.batching import auto_micro_tokens, packed_batches
from ftkit.core.encoding import Example
from ftkit.core.packing import SHORTEST_SHARED, Segment, best_fit, make_pack, make_packs, shared_length

START = list(range(100, 100 + SHORTEST_SHARED))
MORE = list(range(200, 200 + SHORTEST_SHARED))


def row(ids, counted_from=1):
    return Example(list(ids), [place >= counted_from for place in range(len(ids))])


@st.composite
def rows_with_common_starts(draw):
    """Rows behind shared starts, also nested ones; equal rows, rows that begin others, rows of one token, text rows."""
    starts = [[], START, START + MORE, START[:5], START + MORE[:9]]
    rows = []
    for _ in range(draw(st.integers(1, 9))):
        ids = draw(st.sampled_from(starts)) + draw(st.lists(st.integers(1, 3), min_size=1, max_size=40))
        rows.append(row(ids, draw(st.sampled_from([1, len(ids) // 2, len(ids) - 1]))))
    return rows + rows[: draw(st.integers(0, 2))]


def contexts_and_labels(rows):
    """Each trained token behind all tokens before it."""
    return sorted((*e.ids[:at], e.ids[at]) for e in rows for at in range(1, len(e.ids)) if e.counted[at])


def read_back(pack):
    """The same from a pack: what a counted place sees by the layout's rule, in the order of positions."""
    found = []
    for place, label in zip(pack.counted, pack.labels, strict=True):
        number = next(n for n, s in enumerate(pack.segments) if s.start <= place < s.start + s.length)
        seen = list(range(pack.segments[number].start, place + 1))
        while (number := pack.segments[number].parent) >= 0:
            segment = pack.segments[number]
            seen = [*range(segment.start, segment.start + segment.length), *seen]
        assert [pack.positions[at] for at in seen] == list(range(len(seen)))  # as if the row were alone
        found.append((*(pack.ids[at] for at in seen), label))
    return found


@given(rows_with_common_starts(), st.integers(1, 150), st.booleans())
@settings(deadline=None, max_examples=300)
def test_every_trained_token_is_counted_once_behind_its_own_context(rows, budget, share):
    packs = make_packs(rows, budget, share=share)
    assert sorted(found for pack in packs for found in read_back(pack)) == contexts_and_labels(rows)
    fed = [example for example in rows if len(example.ids) > 1]
    assert sum(pack.tokens for pack in packs) == sum(len(example.ids) for example in fed)
    for pack in packs:
        assert len(pack.ids) == len(pack.positions) == sum(segment.length for segment in pack.segments)
        assert len(pack.ids) <= max(budget, *(len(example.ids) - 1 for example in fed))
        assert all(segment.length > 0 and segment.parent < n for n, segment in enumerate(pack.segments))


@given(rows_with_common_starts(), st.integers(1, 150))
@settings(deadline=None, max_examples=100)
def test_sharing_never_lays_out_more_tokens(rows, budget):
    shared, apart = (sum(len(p.ids) for p in make_packs(rows, budget, share=share)) for share in (True, False))
    assert shared <= apart == sum(len(example.ids) - 1 for example in rows)


def test_a_pack_by_hand():
    """A start for three rows, a longer one for two of them; the last token of a row is never fed."""
    a, b, c = row([*START, 1, 2], 16), row([*START, *MORE, 3, 4], 33), row([*START, *MORE, 5], 32)
    pack = make_pack([c, a, b], share=True)
    assert pack.segments == [
        Segment(0, 16, 0, -1),
        Segment(16, 1, 16, 0),
        Segment(17, 16, 16, 0),
        Segment(33, 1, 32, 2),
    ]
    assert pack.ids == [*START, 1, *MORE, 3]
    assert pack.positions == [*range(17), *range(16, 33)]
    assert (pack.counted, pack.labels) == ([15, 16, 33, 32], [1, 2, 4, 5])  # c is trained at the end of its start
    assert pack.tokens == 18 + 34 + 33
    apart = make_pack([c, a, b], share=False)
    assert [segment.length for segment in apart.segments] == [32, 17, 33] and len(apart.ids) == 82


def test_equal_rows_are_laid_out_once_and_counted_twice():
    pack = make_pack([row([*START, 1]), row([*START, 1])], share=True)
    assert pack.ids == START and pack.counted == [*range(16), *range(16)] and pack.labels == [*START[1:], 1] * 2


def test_a_short_common_start_is_not_worth_a_segment():
    pack = make_pack([row([*START[:-1], 1, 2]), row([*START[:-1], 3, 4])], share=True)
    assert [segment.parent for segment in pack.segments] == [-1, -1]


def test_rows_fill_packs_by_best_fit():
    chunks = [([row([0] * size)], size) for size in (3, 5, 4, 8, 2)]
    bins = [[len(example.ids) for example in rows] for rows in best_fit(chunks, 10)]
    assert bins == [[8, 2], [5, 4], [3]]
    assert [len(pack.ids) for pack in make_packs([row([1] * size) for size in (3, 12, 4)], 6, share=False)] == [11, 5]


def test_one_token_feeds_nothing():
    assert make_packs([row([7])], 10, share=True) == make_packs([row([7])], 10, share=False) == []


@pytest.mark.parametrize(("a", "b", "length"), [([1, 2, 3], [1, 2, 4], 2), ([1, 2, 3], [1, 2, 3], 2), ([1], [1], 0),
                                                ([1, 2], [1, 2, 3], 1), ([5, 6, 7], [4, 6, 7], 0)])  # fmt: skip
def test_common_starts_leave_last_tokens_out(a, b, length):
    assert shared_length(row(a), row(b)) == length


def test_a_packed_batch_is_one_sequence():
    (batch,) = packed_batches([row([5, 6, 7]), row([8, 9])], 10, share=False)
    assert batch.input_ids.tolist() == [[5, 6, 8]] and batch.position_ids.tolist() == [[0, 1, 0]]
    assert batch.counted.tolist() == [0, 1, 2] and batch.labels.tolist() == [6, 7, 9] and batch.tokens == 5
    moved = batch.to("meta")
    assert moved.position_ids.device.type == "meta" and moved.layout == batch.layout and batch.to("cpu") is batch


def test_tokens_of_a_pack_hold_the_longest_row_or_the_rows_that_were_asked_for():
    of_large = [auto_micro_tokens(longest, rows, 32 * 4096) for longest, rows in ((100, None), (5000, None), (100, 3))]
    assert of_large == [4096, 5000, 300]
    of_small = [auto_micro_tokens(100, None, layers * 512) for layers in (1, 8, 12, 16)]
    assert of_small == [8192, 8192, 2**25 // (12 * 512), 4096]
