"""How sure a difference is: the paired bootstrap over rows.

Koehn, Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004, section 3: rows are drawn with
replacement, the same rows for both systems, and the score of each draw is computed anew.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
DRAWN_AT_ONCE = 100
"""Resamples held in memory at a time: DRAWN_AT_ONCE x rows counts of 8 bytes."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A difference, and the bounds that hold it with 95 % confidence."""

    difference: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """True if no difference at all lies outside the bounds."""
        return self.low > 0 or self.high < 0


def keep(value: Floats) -> Floats:
    """The statistic of a mean: itself."""
    return value


def paired_interval(
    base: Floats, tuned: Floats, weights: Floats | None = None, *, seed: int, of: Callable[[Floats], Floats] = keep
) -> Interval:
    """The difference of(tuned) - of(base) of a ratio of sums, with its 95 % interval.

    base, tuned: (rows,) the sum of each row (nats of its tokens, or simply its score); weights: (rows,) what the sums
    are divided by (its tokens; 1 for a mean over rows); `of` is applied to each ratio (exp makes a perplexity).
    """
    weights = np.ones_like(base) if weights is None else weights
    columns = np.stack([base, tuned, weights])  # (3, rows)
    low, high = np.quantile(resampled_differences(columns, seed, of), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    [difference] = difference_of(columns.sum(axis=1, keepdims=True), of)
    return Interval(float(difference), float(low), float(high))


def resampled_differences(columns: Floats, seed: int, of: Callable[[Floats], Floats]) -> Floats:
    """(RESAMPLES,) the difference in each draw of as many rows as there are."""
    rows = columns.shape[1]
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(0, RESAMPLES, DRAWN_AT_ONCE):
        times_drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=DRAWN_AT_ONCE)  # (draws, rows)
        draws.append(difference_of(columns @ times_drawn.T, of))
    return np.concatenate(draws)


def difference_of(sums: Floats, of: Callable[[Floats], Floats]) -> Floats:
    """(draws,) from the sums (3, draws) of base, tuned and weights."""
    base, tuned, weights = sums
    result: Floats = of(tuned / weights) - of(base / weights)
    return result
