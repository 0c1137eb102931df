"""How sure a score or a difference is: the bootstrap over rows, paired for two models.

Koehn, Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004, section 3: rows are drawn with
replacement, the same rows for both systems, and the score of each draw is computed anew.

Legend: S sums that a score is computed from (nats and tokens; counts of n-grams), N rows, K draws.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
DRAWN_AT_ONCE = 100
"""Resamples computed at a time: DRAWN_AT_ONCE x rows counts of 8 bytes."""
MOST_KEPT = 20_000
"""Rows up to which draws are kept for the next score: 80 MB; with more they are made anew each time."""

Floats = NDArray[np.float64]
Counts = NDArray[np.uint16]
Statistic = Callable[[Floats], Floats]
"""Sums over rows (S, K) -> the score (K,) of each column."""


@dataclass(frozen=True)
class Interval:
    """A score or a difference, and the bounds that hold it with 95 % confidence."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """True if zero lies outside the bounds."""
        return self.low > 0 or self.high < 0


def ratio(sums: Floats) -> Floats:
    """The first sum over the second: nats over tokens, or scores over rows."""
    result: Floats = sums[0] / sums[1]
    return result


def score_interval(parts: Floats, *, seed: int, of: Statistic = ratio) -> Interval:
    """The score of rows with their parts (S, N), and its interval."""
    return bounds(value_of(parts, of), resampled(parts, seed, of))


def paired_interval(base: Floats, tuned: Floats, *, seed: int, of: Statistic = ratio) -> Interval:
    """The score of tuned (S, N) minus that of base (S, N), the same rows, with the interval of the difference."""
    difference = value_of(tuned, of) - value_of(base, of)
    # the same seed and number of rows draw the same rows
    return bounds(difference, resampled(tuned, seed, of) - resampled(base, seed, of))


def bounds(value: float, draws: Floats) -> Interval:
    """The middle 95 % of the draws around a value."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))


def value_of(parts: Floats, of: Statistic) -> float:
    """The score of all rows."""
    return float(of(parts.sum(axis=1, keepdims=True))[0])


def resampled(parts: Floats, seed: int, of: Statistic) -> Floats:
    """(RESAMPLES,) the score of each draw of as many rows as there are."""
    rows = parts.shape[1]
    draws = kept_draws(rows, seed) if rows <= MOST_KEPT else new_draws(rows, seed)
    return np.concatenate([of(parts @ times_drawn.T) for times_drawn in draws])


@lru_cache(maxsize=2)
def kept_draws(rows: int, seed: int) -> list[Counts]:
    """The draws of a seed, made once for all scores of all models: most of the bootstrap's time."""
    return list(new_draws(rows, seed))


def new_draws(rows: int, seed: int) -> Iterator[Counts]:
    """How often each row is drawn: RESAMPLES lines in blocks (K, N)."""
    generator = np.random.default_rng(seed)
    for _ in range(0, RESAMPLES, DRAWN_AT_ONCE):
        yield generator.multinomial(rows, np.full(rows, 1 / rows), size=DRAWN_AT_ONCE).astype(np.uint16)
