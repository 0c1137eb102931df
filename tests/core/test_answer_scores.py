import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ftkit.core.answer_scores import (
    Scoring,
    extract,
    parse_json,
    read_fields,
    repeated_fields,
    rouge_can_read,
    rouge_scores,
    same_json,
    same_value,
    score_answer,
    token_f1,
)  # fmt: skip
from ftkit.errors import ExitCode, UserError

PATTERN = "Write the description. product: {product}; category: {category}"


def test_token_f1_is_squads():
    assert token_f1("The cat sat.", "a cat sat down") == pytest.approx(2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3))
    assert token_f1("Cat, cat", "cat") == pytest.approx(2 / 3)  # a word counts as often as both have it
    assert token_f1("dog", "cat") == 0
    assert token_f1("", "") == 1 and token_f1("", "cat") == 0


@given(st.text(alphabet="ab c.,The\n", max_size=30), st.text(alphabet="ab c.,The\n", max_size=30))
def test_token_f1_is_symmetric_and_between_0_and_1(one, other):
    assert token_f1(one, other) == token_f1(other, one)
    assert 0 <= token_f1(one, other) <= 1 == token_f1(one, one)


def test_rouge_is_that_of_the_library_and_of_a_hand_count():
    from rouge_score.rouge_scorer import RougeScorer

    prediction, reference = "the cat was under the bed", "the cat sat on the bed today"
    library = RougeScorer(["rouge1", "rougeL"]).score(reference, prediction)
    scores = rouge_scores(prediction, reference)
    assert scores == {"rouge1": library["rouge1"].fmeasure, "rougeL": library["rougeL"].fmeasure}
    # "the cat ... the bed": 4 words in common and in order, of 6 and of 7
    assert scores["rougeL"] == pytest.approx(2 * (4 / 6) * (4 / 7) / (4 / 6 + 4 / 7))


def test_rouge_is_for_latin_letters():
    assert rouge_can_read(["這是", "a"]) and not rouge_can_read(["這是", "да", "Tom 是"])


def test_exact_match_passes_over_space_at_the_ends_only():
    assert scores(" yes\n", "yes", "exact_match") == {"exact_match": 1}
    assert scores("Yes", "yes", "exact_match") == {"exact_match": 0}


def test_fields_are_read_back_from_an_instruction():
    assert read_fields(PATTERN, PATTERN.format(product="Arc; 2", category="Table\nLamp")) == {
        "product": "Arc; 2",
        "category": "Table\nLamp",
    }
    assert read_fields(PATTERN, "Write a poem.") == {}
    assert read_fields("{{a}} (b) {b c}?", "{a} (b) 5?") == {"b c": "5"}


def test_a_field_counts_where_the_reference_holds_its_value():
    fields = {"product": "Arc", "category": "Lamp", "maker": "Oslo"}
    reference = "The ARC is a lamp."
    assert repeated_fields("An arc.", reference, fields) == {"product": 1.0, "category": 0.0}
    found = scores("An arc.", reference, "fields", fields=fields)
    assert found == {"field_accuracy": 0.5, "field.product": 1.0, "field.category": 0.0}
    assert scores("An arc.", "Nothing.", "fields", fields=fields) == {}


def scores(prediction, reference, *metrics, fields=None, **options):
    scoring = Scoring(frozenset(metrics), **options)
    return score_answer(scoring, prediction, reference, fields=fields or {}, row={"id": 7}, where="r.jsonl:3").scores


def test_json_is_compared_as_a_value_and_key_by_key():
    reference = '{"a": 1, "b": ["x"], "c": true}'
    assert scores('{"c": true, "b": ["x"], "a": 1.0}', reference, "json", "fields") == {
        "json_valid": 1, "json_equal": 1, "field_accuracy": 1, "field.a": 1, "field.b": 1, "field.c": 1,
    }  # fmt: skip
    found = scores('{"a": 2, "b": ["x"], "d": 0}', reference, "json", "fields")
    assert found["json_equal"] == 0 and found["field_accuracy"] == pytest.approx(1 / 3)
    assert (found["field.a"], found["field.b"], found["field.c"]) == (0, 1, 0)
    broken = scores('{"a": 1', reference, "json", "fields")
    assert broken["json_valid"] == broken["json_equal"] == broken["field_accuracy"] == 0


def test_nan_is_no_json_and_true_is_not_one():
    assert parse_json("NaN") == (False, None) and parse_json("[" * 100_000) == (False, None)
    assert same_json([1, {"a": None}], [1.0, {"a": None}])
    assert not same_json(1, True) and not same_json([1], [1, 1]) and not same_json({"a": 0}, {"b": 0})


def test_an_answer_fits_a_schema_or_not():
    schema = Draft202012Validator({"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}})
    fits = [scores(text, "x", "json", schema=schema) for text in ('{"city": "Oslo"}', '{"city": 3}', "Oslo")]
    assert [found["schema_valid"] for found in fits] == [1, 0, 0]
    assert [found["json_valid"] for found in fits] == [1, 1, 0] and "json_equal" not in fits[0]


def test_extract_takes_the_last_match_and_numbers_are_equal_however_they_are_written():
    pattern = re.compile(r"#### (\S+)")
    assert extract(pattern, "#### 3\nno: #### 1,000") == "1,000" and extract(pattern, "3") is None
    assert extract(re.compile(r"\d+"), "1 or 22") == "22"
    assert (
        same_value("1,000", "1000.0")
        and same_value("a", "a")
        and not same_value("1", "one")
        and not same_value(None, "1")
    )
    assert scores("so #### 72.", "#### 72", extract=pattern) == {"extracted_match": 1, "extracted": 1}
    assert scores("so 72", "#### 72", extract=pattern) == {"extracted_match": 0, "extracted": 0}


def test_own_scorers_get_answer_reference_and_row_and_may_name_several_scores():
    def length(answer, reference, row):
        assert row == {"id": 7}
        return {"ours": len(answer), "theirs": len(reference)}

    found = scores("abc", "de", scorers={"length": length, "exact": lambda a, r, row: a == r})
    assert found == {"length.ours": 3, "length.theirs": 2, "exact": 0}


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        (lambda *_: 1 / 0, "r.jsonl:3: --scorer mine: ZeroDivisionError: division by zero"),
        (lambda *_: "good", "r.jsonl:3: --scorer mine gave text, should give a number"),
        (lambda *_: float("nan"), "gave nan"),
        (lambda *_: {"a": None}, "gave null"),
        (lambda answer: 1, "TypeError"),
    ],
)
def test_a_scorer_that_fails_names_the_row(scorer, says):
    with pytest.raises(UserError) as error:
        scores("a", "b", scorers={"mine": scorer})
    assert error.value.exit_code == ExitCode.DATA and says in error.value.message and error.value.hint
