"""Predictions -> scores: what each generated answer is worth, and what the rows are worth together.

Scores of a row lie between 0 and 1, higher is better. Loss, perplexity and bits per byte are better when lower.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ftkit.core.columns import PLACEHOLDER
from ftkit.core.likelihood import Likelihood

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
FIELD = "field."
"""Scores of single fields are called `field.product`."""
SHOWN_IN_ORDER = ("exact_match", "f1", "rouge", "field_accuracy", FIELD, "stopped")
LATIN = re.compile("[A-Za-z]")


@dataclass(frozen=True)
class RowScore:
    """All that is known of one row for one model; rows of plain text have no answer."""

    likelihood: Likelihood
    bytes: int
    """UTF-8 bytes of the text that the likelihood is about."""
    prediction: str | None = None
    finish: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    def parts(self, metric: str) -> tuple[float, float] | None:
        """(sum, what it is divided by) of the row in a metric; None where it has no part in it.

        Nats over tokens, bits over bytes, a score over 1.
        """
        if metric in ("loss", "perplexity"):
            return self.likelihood.nats, self.likelihood.tokens
        if metric == "bits_per_byte":
            return self.likelihood.nats / math.log(2), max(1, self.bytes)
        return (self.scores[metric], 1.0) if metric in self.scores else None


def metrics_of(rows: Sequence[RowScore]) -> list[str]:
    """The metrics that any of these rows has, in the order in which they are shown."""
    found = dict.fromkeys(name for row in rows for name in row.scores)
    return [
        *LOWER_IS_BETTER,
        *sorted(found, key=lambda name: [name.startswith(start) for start in SHOWN_IN_ORDER].index(True)),
    ]


def total(rows: Sequence[RowScore], metric: str) -> float:
    """The metric over all rows that have a part in it: the ratio of their sums; perplexity is exp(nats per token)."""
    parts = [part for row in rows if (part := row.parts(metric)) is not None]
    ratio = sum(part[0] for part in parts) / sum(part[1] for part in parts)
    return math.exp(min(ratio, 700.0)) if metric == "perplexity" else ratio


def score_answer(
    prediction: str, reference: str, *, stopped: bool, fields: Mapping[str, str], rouge: bool
) -> dict[str, float]:
    """The scores of one generated answer; `fields` are the values that its instruction names."""
    scores = {"exact_match": float(prediction.strip() == reference.strip()), "f1": token_f1(prediction, reference)}
    if rouge:
        scores |= rouge_scores(prediction, reference)
    named = field_scores(prediction, reference, fields)
    if named:
        scores["field_accuracy"] = sum(named.values()) / len(named)
        scores |= {FIELD + name: score for name, score in named.items()}
    return scores | {"stopped": float(stopped)}


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words in common.

    Rajpurkar et al., SQuAD, arXiv:1606.05250, section 6.1; without words as in the evaluation script of version 2.
    """
    ours, theirs = normal_words(prediction), normal_words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def normal_words(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as SQuAD's evaluation compares them."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def rouge_scores(prediction: str, reference: str) -> dict[str, float]:
    """F measures of ROUGE-1 and ROUGE-L (Lin, ROUGE, ACL 2004), by the rouge-score library, without stemming."""
    scored = rouge_scorer().score(target=reference, prediction=prediction)
    return {"rouge1": float(scored["rouge1"].fmeasure), "rougeL": float(scored["rougeL"].fmeasure)}


@cache
def rouge_scorer() -> Any:
    """The library's scorer, made once."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


def rouge_can_read(references: Sequence[str]) -> bool:
    """True if the references have Latin letters: rouge-score makes words of those and of digits only."""
    return any(LATIN.search(reference) for reference in references)


def field_scores(prediction: str, reference: str, fields: Mapping[str, str]) -> dict[str, float]:
    """For each field whose value the reference contains, in any case: does the prediction contain it too?"""
    ours, theirs = prediction.casefold(), reference.casefold()
    wanted = {name: value.strip().casefold() for name, value in fields.items()}
    return {name: float(value in ours) for name, value in wanted.items() if value and value in theirs}


def read_fields(pattern: str, instruction: str) -> dict[str, str]:
    """The values that `ftkit prep` put into a pattern, such as `Write the text. product: {product}`, read back.

    Nothing if the instruction does not have the pattern's form.
    """
    names, expression = pattern_expression(pattern)
    found = expression.fullmatch(instruction)
    return dict(zip(names, found.groups(), strict=True)) if found else {}


@cache
def pattern_expression(pattern: str) -> tuple[list[str], re.Pattern[str]]:
    """(names of a pattern's fields, expression for what it fills to, one group a field)."""
    names, expression, end = [], "", 0
    for found in PLACEHOLDER.finditer(pattern):
        expression += re.escape(pattern[end : found.start()])
        end = found.end()
        if found[0] in ("{{", "}}"):
            expression += re.escape(found[0][0])
        else:
            names.append(found[1])
            expression += "(.*?)"
    return names, re.compile(expression + re.escape(pattern[end:]), re.DOTALL)
