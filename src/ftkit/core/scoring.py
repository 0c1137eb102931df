"""Predictions -> scores: what each generated answer is worth, and what the rows are worth together.

Scores of a row lie between 0 and 1, higher is better; loss, perplexity and bits per byte are better when lower.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

from ftkit.core.columns import PLACEHOLDER

LOWER_IS_BETTER = ("loss", "perplexity", "bits per byte")
LATIN = re.compile("[A-Za-z]")
FIELD = "field "
"""Scores of single fields are called `field product`."""


@dataclass(frozen=True)
class Likelihood:
    """How likely the model finds a row's answer: its negative log likelihood in nats, its tokens, its UTF-8 bytes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


@dataclass(frozen=True)
class RowScore:
    """All that is known of one row for one model; the answer's part is absent for plain text."""

    likelihood: Likelihood
    prediction: str | None = None
    finish: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    def value(self, metric: str) -> float | None:
        """The row's part in a metric; None where it has none."""
        if metric in ("loss", "perplexity"):
            return self.likelihood.loss
        if metric == "bits per byte":
            return self.likelihood.nats / math.log(2) / max(1, self.likelihood.bytes)
        return self.scores.get(metric)


def score_answer(prediction: str, reference: str, finish: str, fields: Mapping[str, str], *, rouge: bool) -> dict[str, float]:
    """The scores of one generated answer; `fields` are the values that its instruction names."""
    scores = {"exact match": float(prediction.strip() == reference.strip()), "token F1": token_f1(prediction, reference)}
    if rouge:
        scores |= rouge_scores(prediction, reference)
    named = field_scores(prediction, reference, fields)
    if named:
        scores["field accuracy"] = sum(named.values()) / len(named)
        scores |= {FIELD + name: score for name, score in named.items()}
    return scores | {"stopped": float(finish == "stop")}


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words in common.

    Rajpurkar et al., SQuAD, arXiv:1606.05250, section 6.1; as its evaluation script of version 2 has it for no words.
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
    """F measures of ROUGE-1 and ROUGE-L (Lin 2004), by the rouge-score library, without stemming."""
    scored = rouge_scorer().score(target=reference, prediction=prediction)
    return {"ROUGE-1": scored["rouge1"].fmeasure, "ROUGE-L": scored["rougeL"].fmeasure}


@cache
def rouge_scorer() -> Any:
    """The library's scorer, made once."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


def rouge_can_read(references: Sequence[str]) -> bool:
    """True if the references have Latin letters: rouge-score's words are made of those and of digits only."""
    return any(LATIN.search(reference) for reference in references)


def field_scores(prediction: str, reference: str, fields: Mapping[str, str]) -> dict[str, float]:
    """For each field whose value the reference answer contains: does the prediction contain it too (any case)?"""
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
    """(names of a pattern's fields, expression that matches what it fills to, one group a field)."""
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


def metrics_of(rows: Sequence[RowScore]) -> list[str]:
    """The metrics that these rows have, in the order in which they are shown."""
    found = dict.fromkeys(name for row in rows for name in row.scores)
    bare = [name for name in found if not name.startswith(FIELD) and name != "stopped"]
    fields = [name for name in found if name.startswith(FIELD) and name != "field accuracy"]
    together = [name for name in bare if name != "field accuracy"]
    accuracy = ["field accuracy"] * ("field accuracy" in found)
    return [*LOWER_IS_BETTER, *together, *accuracy, *fields, *["stopped"] * ("stopped" in found)]
