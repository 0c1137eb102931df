import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.comparison import compare
from ftkit.core.likelihood import Likelihood
from ftkit.core.scoring import (
    RowScore,
    field_scores,
    metrics_of,
    read_fields,
    rouge_can_read,
    rouge_scores,
    score_answer,
    token_f1,
    total,
)  # fmt: skip

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
    assert rouge_can_read(["這是", "a"]) and not rouge_can_read(["這是", "да"])


def test_exact_match_passes_over_space_at_the_ends_only():
    assert score_answer(" yes\n", "yes", stopped=True, fields={}, rouge=False)["exact_match"] == 1
    assert score_answer("Yes", "yes", stopped=True, fields={}, rouge=False)["exact_match"] == 0


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
    assert field_scores("An arc.", reference, fields) == {"product": 1.0, "category": 0.0}
    scores = score_answer("An arc.", reference, stopped=False, fields=fields, rouge=False)
    assert scores["field_accuracy"] == 0.5 and scores["field.product"] == 1 and "field.maker" not in scores
    assert "field_accuracy" not in score_answer("An arc.", "Nothing.", stopped=False, fields=fields, rouge=False)


def row(nats, tokens, byte_count=1, **scores):
    return RowScore(Likelihood(nats, tokens), byte_count, "", "stop", scores)


def test_totals_are_ratios_of_sums_so_that_long_rows_weigh_more():
    rows = [row(2.0, 1, 2, f1=1.0), row(2.0, 3, 2, f1=0.0), row(0.0, 0, 0)]
    assert total(rows, "loss") == 1.0
    assert total(rows, "perplexity") == pytest.approx(math.e)
    assert total(rows, "bits_per_byte") == pytest.approx(4 / math.log(2) / 5)
    assert total(rows, "f1") == 0.5  # over the rows that have one


def test_metrics_are_shown_in_one_order_whatever_the_rows_have():
    rows = [
        row(1, 1, stopped=1.0, exact_match=0.0),
        row(1, 1, **{"field.b": 1.0, "field_accuracy": 1.0, "rougeL": 0.5, "f1": 0.2}),
    ]
    order = [
        "loss",
        "perplexity",
        "bits_per_byte",
        "exact_match",
        "f1",
        "rougeL",
        "field_accuracy",
        "field.b",
        "stopped",
    ]
    assert metrics_of(rows) == order


def test_a_comparison_counts_rows_won_lost_and_tied_and_knows_which_way_is_better():
    base = [row(4.0, 2, f1=0.5), row(4.0, 2, f1=0.5), row(4.0, 2, f1=0.5), row(4.0, 2)]
    tuned = [row(2.0, 2, f1=0.9), row(2.0, 2, f1=0.5), row(6.0, 2, f1=0.1), row(2.0, 2)]
    loss, f1 = (compare(base, tuned, metric, seed=1) for metric in ("loss", "f1"))
    assert (loss.won, loss.lost, loss.tied) == (3, 1, 0)
    assert (f1.won, f1.lost, f1.tied) == (1, 1, 1)
    assert loss.interval.difference == pytest.approx(-0.5) and loss.verdict == "unclear"
    better, worse = ([row(n, 2, f1=f) for _ in range(5)] for n, f in ((1.0, 0.9), (8.0, 0.1)))
    plain = [row(4.0, 2, f1=0.5) for _ in range(5)]
    assert compare(plain, better, "loss", seed=1).verdict == compare(plain, better, "f1", seed=1).verdict == "better"
    assert compare(plain, worse, "perplexity", seed=1).verdict == compare(plain, worse, "f1", seed=1).verdict == "worse"
