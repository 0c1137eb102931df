"""Samples, mixtures and shuffles: seeded, and right to the row."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.row_order import mixed, parse_sample, quotas, sampled
from ftkit.core.splitting import Stratifier, digest_of
from ftkit.errors import UserError
from ftkit.io.shuffling import shuffled


def counted():
    left = []
    return left, lambda: left.append(1)


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 5))
def test_a_sample_has_the_asked_number_in_order_and_loses_none(wanted, total, seed):
    left, leave_out = counted()
    taken = list(sampled(iter(range(total)), wanted, seed, leave_out))
    assert len(taken) == min(wanted, total) and taken == sorted(taken)
    assert len(taken) + len(left) == total
    assert taken == list(sampled(iter(range(total)), wanted, seed, lambda: None))


def test_every_row_is_sampled_equally_often():
    hits = Counter(row for seed in range(600) for row in sampled(iter(range(20)), 5, seed, lambda: None))
    assert min(hits.values()) > 100 and max(hits.values()) < 200  # 150 expected, standard deviation 11


def test_a_share_takes_about_that_share():
    left, leave_out = counted()
    assert 850 < len(list(sampled(iter(range(10_000)), 0.1, 1, leave_out))) < 1150
    assert len(left) > 8850


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "two", "0.0"])
def test_what_is_no_sample_is_refused(text):
    with pytest.raises(UserError):
        parse_sample(text)
    assert parse_sample("12") == 12 and parse_sample("0.5") == 0.5


@given(st.lists(st.integers(1, 100), min_size=1, max_size=4), st.integers(0, 2000))
def test_any_beginning_of_a_mixture_has_the_proportions(weights, total):
    shares = [weight / sum(weights) for weight in weights]
    streams = [iter([number] * total) for number in range(len(weights))]
    taken = [0] * len(weights)
    for count, (number, row) in enumerate(mixed(streams, shares, lambda: None), 1):
        assert number == row
        taken[number] += 1
        assert all(abs(taken[i] - share * count) < len(weights) for i, share in enumerate(shares))


def test_two_inputs_keep_their_proportions_to_within_a_row_in_every_thousand():
    left, leave_out = counted()
    rows = [number for number, _ in mixed([iter(range(7_000)), iter(range(9_000))], [0.7, 0.3], leave_out)]
    for start in range(0, len(rows) - 1000, 137):
        assert abs(rows[start : start + 1000].count(0) - 700) <= 1
    assert 9_999 <= len(rows) <= 10_001 and len(rows) + len(left) == 16_000


@given(st.integers(0, 1000), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_quotas_sum_to_the_total_and_miss_no_share_by_a_row(total, weights):
    shares = [weight / sum(weights) for weight in weights]
    found = quotas(total, shares)
    assert sum(found) == total
    assert all(abs(count - total * share) < 1 for count, share in zip(found, shares, strict=True))


def test_a_shuffle_through_files_gives_the_order_of_one_in_memory():
    lines = [str(number).encode() for number in range(500)]
    in_memory = list(shuffled(iter(lines), 7))
    assert sorted(in_memory) == sorted(lines) and in_memory != lines
    for held_bytes in (0, 50, 900):
        assert list(shuffled(iter(lines), 7, held_bytes)) == in_memory
    assert list(shuffled(iter(lines), 8)) != in_memory


def test_every_order_of_a_shuffle_is_about_equally_likely():
    orders = Counter(b"".join(shuffled(iter([b"a", b"b", b"c"]), seed)) for seed in range(600))
    assert len(orders) == 6 and min(orders.values()) > 60  # 100 expected, standard deviation 9


def test_every_stratum_has_the_shares_to_within_a_row_or_two():
    shares = {"train": 0.8, "valid": 0.1, "test": 0.1}
    stratifier = Stratifier(shares)
    counts = Counter()
    for number in range(3_000):
        stratum = "rare" if number % 50 == 0 else "common"
        counts[stratum, stratifier.part_of(digest_of(number), stratum)] += 1
    for stratum, total in (("rare", 60), ("common", 2_940)):
        for part, share in shares.items():
            assert abs(counts[stratum, part] - share * total) <= 2
