"""Two models on the same rows: how much better one is, how sure that is, and on which rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftkit.core.bootstrap import Interval, keep, paired_interval
from ftkit.core.scoring import LOWER_IS_BETTER, RowScore


@dataclass(frozen=True)
class Comparison:
    """Tuned against base in one metric; won, lost and tied count rows."""

    interval: Interval
    won: int
    lost: int
    tied: int
    verdict: str
    """better, worse, or unclear where the interval holds 0."""


def compare(base: Sequence[RowScore], tuned: Sequence[RowScore], metric: str, *, seed: int) -> Comparison:
    """The paired comparison over the rows that have a part in the metric."""
    pairs = [(a, b) for x, y in zip(base, tuned, strict=True) if (a := x.parts(metric)) and (b := y.parts(metric))]
    before, after = np.array([a[0] for a, _ in pairs]), np.array([b[0] for _, b in pairs])
    weights = np.array([b[1] for _, b in pairs])
    interval = paired_interval(before, after, weights, seed=seed, of=np.exp if metric == "perplexity" else keep)
    sign = -1 if metric in LOWER_IS_BETTER else 1
    gains = sign * (after - before)
    won, lost = int((gains > 0).sum()), int((gains < 0).sum())
    verdict = "unclear" if not interval.is_clear else "better" if sign * interval.difference > 0 else "worse"
    return Comparison(interval, won, lost, len(pairs) - won - lost, verdict)
