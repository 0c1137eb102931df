"""Splits by content: the same row always falls into the same part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.splitting import Stratifier, content_digest, parse_shares, part_of, position
from ftkit.errors import ExitCode, UserError


def test_a_digest_stands_for_what_a_row_teaches_and_not_for_its_template():
    row = {"prompt": "a", "completion": "b"}
    assert content_digest(row) == content_digest({**row, "template": "alpaca@0", "pattern": "{x}"})
    others = [{"prompt": "ab", "completion": ""}, {"prompt": "a", "completion": "c"}, {"text": "ab"}]
    assert len({content_digest(other) for other in [row, *others]}) == 4


@given(st.binary(min_size=16, max_size=16))
def test_a_position_lies_between_0_and_1_and_depends_on_the_salt(digest):
    assert 0 <= position(digest, "prep") < 1
    assert position(digest, "prep") == position(digest, "prep") != position(digest, "train")


def test_parts_get_their_shares_of_many_rows():
    shares = {"train": 0.7, "valid": 0.2, "test": 0.1}
    digests = [content_digest({"text": str(number)}) for number in range(20_000)]
    parts = [part_of(digest, shares) for digest in digests]
    for name, share in shares.items():
        assert abs(parts.count(name) / len(parts) - share) < 0.015  # 4 standard deviations


@given(st.binary(min_size=16, max_size=16))
def test_every_row_has_a_part_though_the_shares_round(digest):
    assert part_of(digest, dict.fromkeys("abcdefghij", 0.1)) in "abcdefghij"
    assert part_of(digest, {"all": 1.0}) == "all"


@given(st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["a", "b"])), max_size=60))
def test_equal_rows_never_straddle_a_stratified_split(rows):
    shares = {"train": 0.5, "test": 0.5}
    remembering, plain = Stratifier(shares), Stratifier(shares, has_duplicates=False)
    parts = {}
    for number, stratum in rows:
        digest = content_digest({"text": str(number)})
        assert remembering.part_of(digest, stratum) == parts.setdefault(number, remembering.part_of(digest, stratum))
    for number, stratum in dict(rows).items():  # without equal rows nothing is to be remembered
        digest = content_digest({"text": str(number)})
        assert plain.part_of(digest, stratum) in shares


def test_shares_are_read_in_order():
    assert list(parse_shares("train=0.9, valid=.1").items()) == [("train", 0.9), ("valid", 0.1)]


@pytest.mark.parametrize(
    "text",
    ["train", "train=0.9", "train=0.9,valid=0.2", "a=1,b=0", "a=0.5,a=0.5", "../x=1", "a=x,b=0.5", "a=nan", "a=2,b=-1"],
)
def test_shares_that_cannot_be_are_usage_errors(text):
    with pytest.raises(UserError) as caught:
        parse_shares(text)
    assert caught.value.exit_code == ExitCode.USAGE and "--split" in caught.value.message
