"""What rows are worth together: each metric is computed from sums over rows, so that rows can be drawn anew.

Loss, perplexity and bits per byte are better when lower, all others when higher. BLEU and chrF go from 0 to 100, as
everybody gives them; all other scores from 0 to 1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ftkit.core.answer_scores import FIELD
from ftkit.core.bootstrap import Floats, Statistic, ratio
from ftkit.core.labels import macro_f1
from ftkit.core.likelihood import Likelihood
from ftkit.core.translation_scores import bleu_of_counts, chrf_of_counts

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "forgetting")
LIKELIHOODS = ("loss", "perplexity", "bits_per_byte")
NAMES = {
    "loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits per byte",
    "chosen_likelier": "chosen likelier", "chosen_likelier_per_token": "chosen likelier per token",
    "accuracy": "accuracy", "macro_f1": "macro-F1",
    "text_accuracy": "accuracy of the text", "text_macro_f1": "macro-F1 of the text",
    "exact_match": "exact match", "extracted_match": "extracted match", "extracted": "extracted", "f1": "token F1",
    "bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rougeL": "ROUGE-L",
    "json_valid": "valid JSON", "schema_valid": "fits the schema", "json_equal": "same JSON",
    "field_accuracy": "field accuracy",
}  # fmt: skip
"""Metrics in the order in which they are shown, and their names in words; scorers, fields and `stopped` follow."""
ROW_LEVEL = {"macro_f1": "accuracy", "text_macro_f1": "text_accuracy"}
"""What a row has won or lost by, in a metric that a single row does not have."""


@dataclass(frozen=True)
class RowScore:
    """All that is known of one row for one model; `predictions` are empty where nothing is generated.

    bytes: UTF-8 bytes of the text that the likelihood is about. predictions, finishes, lengths (tokens): one a seed.
    scores: means over the seeds. counts: sums of metrics that are no means over rows.
    extracted: what --extract found in the first answer.
    rejected: the likelihood of the rejected answer of a pair. label: the likeliest label of a row of classes.
    """

    likelihood: Likelihood
    bytes: int
    predictions: tuple[str, ...] = ()
    finishes: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rejected: Likelihood | None = None
    label: str | None = None
    extracted: str | None = None

    @property
    def prediction(self) -> str | None:
        """The answer, the first seed's where there are several."""
        return self.predictions[0] if self.predictions else None

    def parts(self, metric: str) -> tuple[float, ...] | None:
        """What the row adds to the sums of a metric; None where it has no part in it.

        Nats and tokens, bits and bytes, a score and 1, or counts.
        """
        if metric in ("loss", "perplexity"):
            return self.likelihood.nats, self.likelihood.tokens
        if metric == "bits_per_byte":
            return self.likelihood.nats / math.log(2), max(1, self.bytes)
        if metric in self.counts:
            return self.counts[metric]
        return (self.scores[metric], 1.0) if metric in self.scores else None

    def value(self, metric: str) -> float:
        """The row's own score in a metric that it has a part in."""
        metric = ROW_LEVEL.get(metric, metric)
        if metric in self.scores:
            return self.scores[metric]
        parts = self.parts(metric)
        assert parts is not None
        return parts[0] / max(parts[1], 1)


def metrics_of(rows: Sequence[RowScore]) -> list[str]:
    """The metrics that any of these rows has, in the order in which they are shown."""
    found = dict.fromkeys(name for row in rows for name in (*row.scores, *row.counts))
    return [*LIKELIHOODS, *sorted(found, key=place_of)]


def place_of(metric: str) -> int:
    """For sorting: known metrics in their order, then those of scorers, then fields as the rows have them, `stopped`."""
    if metric in NAMES:
        return list(NAMES).index(metric)
    return 1002 if metric == "stopped" else 1001 if metric.startswith(FIELD) else 1000


def is_lower_better(metric: str) -> bool:
    """True for losses."""
    return metric in LOWER_IS_BETTER


def statistic_of(metric: str) -> Statistic:
    """How a metric is computed from the sums of its parts; the ratio of two sums unless it is a special one."""
    special: dict[str, Statistic] = {
        "perplexity": perplexity,
        "bleu": partial(each_column, bleu_of_counts),
        "chrf": partial(each_column, chrf_of_counts),
        "macro_f1": macro_f1,
        "text_macro_f1": macro_f1,
    }
    return special.get(metric, ratio)


def perplexity(sums: Floats) -> Floats:
    """exp(nats per token), as far as a float goes."""
    result: Floats = np.exp(np.minimum(ratio(sums), 700.0))
    return result


def each_column(of: Callable[[Floats], float], sums: Floats) -> Floats:
    """A score of one set of sums, for every column of (S, K)."""
    return np.array([of(column) for column in sums.T], dtype=np.float64)


def total(rows: Sequence[RowScore], metric: str) -> float:
    """The metric over all rows that have a part in it."""
    parts = [part for row in rows if (part := row.parts(metric)) is not None]
    return float(statistic_of(metric)(np.array(parts, dtype=np.float64).sum(axis=0)[:, None])[0])


def label_of(metric: str) -> str:
    """The name of a metric in words."""
    return "field " + metric.removeprefix(FIELD) if metric.startswith(FIELD) else NAMES.get(metric, metric)


def merged(seeds: Sequence[RowScore]) -> RowScore:
    """One row from its answers under several seeds: scores are averaged, counts added."""
    if len(seeds) == 1:
        return seeds[0]
    return replace(
        seeds[0],
        predictions=tuple(text for row in seeds for text in row.predictions),
        finishes=tuple(finish for row in seeds for finish in row.finishes),
        lengths=tuple(length for row in seeds for length in row.lengths),
        scores={name: sum(row.scores[name] for row in seeds) / len(seeds) for name in seeds[0].scores},
        counts={
            name: tuple(map(sum, zip(*(row.counts[name] for row in seeds), strict=True))) for name in seeds[0].counts
        },
    )
