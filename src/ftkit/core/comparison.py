"""Two models on the same rows: how much better one is, how sure that is, and on which rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftkit.core.bootstrap import Floats, Interval, paired_interval, score_interval
from ftkit.core.scoring import RowScore, is_lower_better, statistic_of


@dataclass(frozen=True)
class Comparison:
    """One model against another in one metric; won, lost and tied count rows."""

    interval: Interval
    won: int
    lost: int
    tied: int
    verdict: str
    """better, worse, or unclear where the interval holds 0."""


def compare(base: Sequence[RowScore], tuned: Sequence[RowScore], metric: str, *, seed: int) -> Comparison:
    """The paired comparison over the rows that have a part in the metric."""
    pairs = [(x, y) for x, y in zip(base, tuned, strict=True) if x.parts(metric) and y.parts(metric)]
    before, after = ([pair[side] for pair in pairs] for side in (0, 1))
    interval = paired_interval(columns(before, metric), columns(after, metric), seed=seed, of=statistic_of(metric))
    sign = -1 if is_lower_better(metric) else 1
    gains = [sign * (y.value(metric) - x.value(metric)) for x, y in pairs]
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    verdict = "unclear" if not interval.is_clear else "better" if sign * interval.value > 0 else "worse"
    return Comparison(interval, won, lost, len(pairs) - won - lost, verdict)


def spread(rows: Sequence[RowScore], metric: str, *, seed: int) -> Interval:
    """The metric over the rows that have a part in it, with its interval."""
    having = [row for row in rows if row.parts(metric)]
    return score_interval(columns(having, metric), seed=seed, of=statistic_of(metric))


def columns(rows: Sequence[RowScore], metric: str) -> Floats:
    """(sums, rows): what each row adds to the sums of the metric."""
    return np.array([row.parts(metric) for row in rows], dtype=np.float64).T
