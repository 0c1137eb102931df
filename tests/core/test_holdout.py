"""Held-out rows are chosen by their content."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.holdout import LEAST_ROWS, content_hash, hold_out


def rows_of(count, start=0):
    return [{"prompt": f"question {i}", "completion": "answer"} for i in range(start, start + count)]


def test_the_hash_is_of_the_content_not_of_its_order():
    assert content_hash({"a": 1, "b": "x"}) == content_hash({"b": "x", "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert (
        content_hash({"prompt": "a", "completion": "b"}) == 11996510156975083901
    )  # written down: stays the same between versions


@pytest.mark.parametrize(("count", "held"), [(1, 0), (3, 0), (4, 1), (16, 4), (32, 8), (40, 8), (100, 8)])
def test_small_data_holds_out_eight_rows_but_never_more_than_a_quarter(count, held):
    train, valid = hold_out(rows_of(count), 0.05)
    assert len(valid) == held and len(train) == count - held


def test_large_data_holds_out_about_its_share():
    train, valid = hold_out(rows_of(4000), 0.05)
    assert len(train) + len(valid) == 4000
    assert 160 <= len(valid) <= 240  # 200 expected, standard deviation 14


def test_a_share_of_zero_holds_out_nothing():
    assert hold_out(rows_of(50), 0.0) == (list(range(50)), [])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.floats(0, 0.999))
def test_every_row_is_on_one_side_and_equal_rows_are_together(numbers, share):
    rows = [{"text": str(number)} for number in numbers]
    train, valid = hold_out(rows, share)
    assert sorted(train + valid) == list(range(len(rows)))
    assert not {numbers[i] for i in train} & {numbers[i] for i in valid}
    assert train


def test_held_out_rows_stay_held_out_when_rows_are_added_or_reordered():
    rows = rows_of(2000)
    held = {rows[i]["prompt"] for i in hold_out(rows, 0.05)[1]}
    more = [*rows_of(500, start=2000), *reversed(rows)]
    held_later = {more[i]["prompt"] for i in hold_out(more, 0.05)[1]}
    assert held and held == {prompt for prompt in held_later if int(prompt.split()[1]) < 2000}


def test_rows_are_spread_over_the_data():
    _, valid = hold_out(rows_of(400), 0.25)
    assert len(valid) > LEAST_ROWS and 60 < sum(valid) / len(valid) < 340
