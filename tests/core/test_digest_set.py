"""A set of digests in a few bytes each does what a set does."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.digest_set import DigestSet


def digest(number):
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


@given(st.lists(st.integers(0, 400), max_size=900))
def test_it_says_what_is_new_as_a_set_does(numbers):
    ours, theirs = DigestSet(), set()
    for number in numbers:
        assert ours.add(digest(number)) == (number not in theirs)
        theirs.add(number)
    assert len(ours) == len(theirs)
    assert all((digest(number) in ours) == (number in theirs) for number in range(401))


def test_digests_that_fall_on_one_slot_are_told_apart():
    same_slot = [bytes([7]) + bytes(8) + number.to_bytes(7, "big") for number in range(1, 100)]
    found = DigestSet()
    assert all(found.add(each) for each in same_slot) and not any(found.add(each) for each in same_slot)


def test_it_takes_16_to_40_bytes_a_digest():
    found = DigestSet()
    sizes = []
    for number in range(60_000):
        found.add(digest(number))
        if number > 10_000 and number % 1_000 == 0:
            sizes.append(found.size_bytes / len(found))
    assert min(sizes) > 16 and max(sizes) < 40
