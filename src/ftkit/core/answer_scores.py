"""What one generated answer is worth beside its reference."""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

import numpy as np

from ftkit.core.columns import PLACEHOLDER
from ftkit.core.translation_scores import bleu_counts, bleu_of_counts, chrf_counts, chrf_of_counts
from ftkit.errors import ExitCode, UserError
from ftkit.io.records import type_name

FIELD = "field."
"""Scores of single fields are called `field.product`."""
LATIN = re.compile("[A-Za-z]")
Scorer = Callable[[str, str, dict[str, Any]], Any]
"""A user's own: (answer, reference, row) -> a number, or a dict of named numbers."""


@dataclass(frozen=True)
class Scoring:
    """How answers are scored, settled before the first one is generated.

    metrics: of exact_match, f1, rouge, bleu, chrf, json, fields. schema: a jsonschema validator.
    scorers: the user's functions, by name.
    """

    metrics: frozenset[str]
    language: str | None = None
    schema: Any = None
    extract: re.Pattern[str] | None = None
    scorers: Mapping[str, Scorer] | None = None


@dataclass(frozen=True)
class AnswerScore:
    """Scores of one answer; counts of the metrics that are no means over rows; what --extract found."""

    scores: dict[str, float]
    counts: dict[str, tuple[float, ...]]
    extracted: str | None = None


def score_answer(
    scoring: Scoring, prediction: str, reference: str, *, fields: Mapping[str, str], row: dict[str, Any], where: str
) -> AnswerScore:
    """The scores of one answer; `fields` are the values that its instruction names, `where` is the row's place."""
    metrics, scores, counts, extracted = scoring.metrics, dict[str, float](), dict[str, tuple[float, ...]](), None
    if "exact_match" in metrics:
        scores["exact_match"] = float(prediction.strip() == reference.strip())
    if "f1" in metrics:
        scores["f1"] = token_f1(prediction, reference)
    if "rouge" in metrics:
        scores |= rouge_scores(prediction, reference)
    if "bleu" in metrics:
        counts["bleu"] = bleu_counts(prediction, reference, scoring.language)
        scores["bleu"] = bleu_of_counts(np.array(counts["bleu"]), single=True)
    if "chrf" in metrics:
        counts["chrf"] = chrf_counts(prediction, reference)
        scores["chrf"] = chrf_of_counts(np.array(counts["chrf"]))
    if "json" in metrics:
        scores |= json_scores(prediction, reference, scoring.schema)
    if "fields" in metrics:
        scores |= field_scores(prediction, reference, fields)
    if scoring.extract is not None:
        extracted, wanted = extract(scoring.extract, prediction), extract(scoring.extract, reference)
        found = extracted is not None
        scores |= {"extracted_match": float(found and same_value(extracted, wanted)), "extracted": float(found)}
    for name, scorer in (scoring.scorers or {}).items():
        scores |= own_scores(name, scorer, prediction, reference, row, where)
    return AnswerScore(scores, counts, extracted)


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
    """True if at least half of the references have Latin letters: rouge-score makes words of those and of digits only."""
    return 2 * sum(bool(LATIN.search(reference)) for reference in references) >= len(references)


def parse_json(text: str) -> tuple[bool, Any]:
    """(whether a text is JSON, its value); NaN and Infinity are not."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        return True, json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False, None


def json_scores(prediction: str, reference: str, schema: Any) -> dict[str, float]:
    """Is the answer JSON, does it fit the schema (a validator, or None), is it the reference's value (in any order)?"""
    is_json, value = parse_json(prediction)
    expected_is_json, expected = parse_json(reference)
    scores = {"json_valid": float(is_json)}
    if schema is not None:
        scores["schema_valid"] = float(is_json and fault_in(schema, value) is None)
    if expected_is_json:
        scores["json_equal"] = float(is_json and same_json(value, expected))
    return scores


def fault_in(schema: Any, value: Any) -> str | None:
    """Why a value does not fit a schema; None if it does. A schema that refers to what is not in its file is exit 3."""
    from referencing.exceptions import Unresolvable

    try:
        error = next(schema.iter_errors(value), None)
    except Unresolvable as missing:
        what = f"--schema: refers to {missing.ref}, which is not in the file"
        raise UserError(what, ExitCode.DATA, hint="put it under $defs in the same file") from None
    return None if error is None else str(error.message)[:150]


def same_json(one: Any, other: Any) -> bool:
    """True for the same JSON value: `true` is not 1, but 1 is 1.0; the order of keys does not matter."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same_json(a, b) for a, b in zip(one, other, strict=True))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def field_scores(prediction: str, reference: str, fields: Mapping[str, str]) -> dict[str, float]:
    """Which fields the answer gets right, and their share: the keys of a JSON reference, else the row's own fields."""
    is_json, expected = parse_json(reference)
    if is_json and isinstance(expected, dict):
        found, value = parse_json(prediction)
        given = value if found and isinstance(value, dict) else {}
        named = {key: float(key in given and same_json(given[key], wanted)) for key, wanted in expected.items()}
    else:
        named = repeated_fields(prediction, reference, fields)
    share = {"field_accuracy": sum(named.values()) / len(named)} if named else {}
    return share | {FIELD + name: score for name, score in named.items()}


def repeated_fields(prediction: str, reference: str, fields: Mapping[str, str]) -> dict[str, float]:
    """For each field whose value the reference contains, in any case: does the prediction contain it too?"""
    ours, theirs = prediction.casefold(), reference.casefold()
    wanted = {name: value.strip().casefold() for name, value in fields.items()}
    return {name: float(value in ours) for name, value in wanted.items() if value and value in theirs}


def extract(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match in a text, where answers conclude: its first group, or all of it; None if there is none."""
    found = None
    for found in pattern.finditer(text):  # noqa: B007
        pass
    if found is None:
        return None
    return (found[1] or "" if pattern.groups else found[0]).strip()


def same_value(one: str | None, other: str | None) -> bool:
    """True for equal texts, and for equal numbers however they are written (1,000 and 1000.0)."""
    if one is None or other is None:
        return False
    return one == other or ((number := as_number(one)) is not None and number == as_number(other))


def as_number(text: str) -> Decimal | None:
    """The number that a text is, with commas between thousands; None if it is none."""
    try:
        number = Decimal(text.replace(",", "").strip().rstrip("."))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def own_scores(
    name: str, scorer: Scorer, prediction: str, reference: str, row: dict[str, Any], where: str
) -> dict[str, float]:
    """The scores by a user's function; one that raises, or gives no number, is a data error that names the row."""
    try:
        found = scorer(prediction, reference, row)
    except Exception as error:  # whatever the user's code raises
        what = f"{where}: --scorer {name}: {type(error).__name__}: {error}"
        raise UserError(what, ExitCode.DATA, hint=f"mend {name}, or leave the row out") from None
    scores = {f"{name}.{key}": value for key, value in found.items()} if isinstance(found, dict) else {name: found}
    for value in scores.values():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            given = value if isinstance(value, float) else type_name(value)
            what = f"{where}: --scorer {name} gave {given}, should give a number"
            raise UserError(what, ExitCode.DATA, hint="return a number, or a dict of them; higher is better")
    return {key: float(value) for key, value in scores.items()}


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
