import numpy as np
import pytest

from ftkit.core.bootstrap import paired_interval as paired_sums
from ftkit.core.bootstrap import ratio, score_interval


def paired_interval(base, tuned, weights=None, **options):
    """Of rows with a score each, or with a sum and what it is divided by."""
    weights = np.ones_like(base) if weights is None else weights
    return paired_sums(np.stack([base, weights]), np.stack([tuned, weights]), **options)


def test_a_difference_that_every_row_has_is_certain():
    base = np.array([1.0, 2.0, 5.0])
    interval = paired_interval(base, base + 0.5, seed=1)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))
    assert interval.is_clear


def test_equal_models_differ_by_nothing_and_that_is_not_clear():
    base = np.arange(10.0)
    interval = paired_interval(base, base, seed=1)
    assert (interval.value, interval.low, interval.high) == (0, 0, 0)
    assert not interval.is_clear


def test_the_interval_of_a_mean_is_the_one_of_the_normal_distribution():
    gains = np.random.default_rng(0).normal(0.3, 1.0, size=400)
    base = np.random.default_rng(1).normal(size=400) * 100  # pairing takes the rows' own differences out
    interval = paired_interval(base, base + gains, seed=2)
    half = 1.96 * gains.std() / np.sqrt(400)
    assert interval.value == pytest.approx(gains.mean())
    assert interval.low == pytest.approx(gains.mean() - half, abs=0.15 * half)
    assert interval.high == pytest.approx(gains.mean() + half, abs=0.15 * half)


def test_95_of_100_intervals_hold_the_true_difference():
    draw = np.random.default_rng(3)
    held = 0
    for seed in range(100):
        gains = draw.normal(0.2, 1.0, size=60)
        interval = paired_interval(np.zeros(60), gains, seed=seed)
        held += interval.low <= 0.2 <= interval.high
    assert 88 <= held <= 100


def test_weights_make_a_ratio_of_sums():
    """Rows of 1 and 3 tokens: 4 nats over 4 tokens, then 2 over 4. Draws give 1/1 - 2/1, 1/3 - 2/3 or 2/4 - 4/4."""
    interval = paired_interval(np.array([2.0, 2.0]), np.array([1.0, 1.0]), np.array([1.0, 3.0]), seed=1)
    assert interval.value == pytest.approx(-0.5)
    assert interval.low == pytest.approx(-1.0) and interval.high == pytest.approx(-1 / 3)


def test_a_function_of_the_ratio_is_applied_to_each_model():
    interval = paired_interval(
        np.array([2.0]), np.array([1.0]), np.array([1.0]), seed=1, of=lambda sums: np.exp(ratio(sums))
    )
    assert interval.value == pytest.approx(np.e - np.e**2)


def test_the_seed_decides_the_interval():
    base, tuned = np.random.default_rng(0).normal(size=(2, 30))
    assert paired_interval(base, tuned, seed=1) == paired_interval(base, tuned, seed=1)
    assert paired_interval(base, tuned, seed=1) != paired_interval(base, tuned, seed=2)


def test_the_interval_of_one_score_is_the_one_of_the_normal_distribution():
    scores = np.random.default_rng(0).normal(0.3, 1.0, size=400)
    interval = score_interval(np.stack([scores, np.ones(400)]), seed=2)
    half = 1.96 * scores.std() / np.sqrt(400)
    assert interval.value == pytest.approx(scores.mean())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.15)
