import math

import pytest

from ftkit.core.comparison import compare
from ftkit.core.likelihood import Likelihood
from ftkit.core.scoring import RowScore, metrics_of, total


def row(nats, tokens, byte_count=1, **scores):
    return RowScore(Likelihood(nats, tokens), byte_count, scores=scores)


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
    assert loss.interval.value == pytest.approx(-0.5) and loss.verdict == "unclear"
    better, worse = ([row(n, 2, f1=f) for _ in range(5)] for n, f in ((1.0, 0.9), (8.0, 0.1)))
    plain = [row(4.0, 2, f1=0.5) for _ in range(5)]
    assert compare(plain, better, "loss", seed=1).verdict == compare(plain, better, "f1", seed=1).verdict == "better"
    assert compare(plain, worse, "perplexity", seed=1).verdict == compare(plain, worse, "f1", seed=1).verdict == "worse"
