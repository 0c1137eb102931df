"""Which scores are computed and shown, settled from the options and the references before a model answers anything."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit import console
from ftkit.core.answer_scores import FIELD, Scoring, extract, fault_in, parse_json, rouge_can_read, score_answer
from ftkit.core.eval_settings import EvalSettings
from ftkit.core.evaluation import Row, Task, reference_of, scored_row
from ftkit.core.scoring import LIKELIHOODS
from ftkit.core.translation_scores import bleu_scorer, writes_without_spaces
from ftkit.errors import ExitCode, UserError, did_you_mean
from ftkit.io.row_file import RowFile
from ftkit.io.user_function import load_function

GROUPS = {
    "loss": LIKELIHOODS,
    "exact_match": ("exact_match",),
    "f1": ("f1",),
    "rouge": ("rouge1", "rougeL"),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "json": ("json_valid", "schema_valid", "json_equal"),
    "fields": ("field_accuracy",),
    "labels": ("accuracy", "macro_f1", "text_accuracy", "text_macro_f1"),
}
"""What --metrics takes, and the scores that each name stands for; scores of single fields go with `fields`."""
OF_TEXT = ("exact_match", "f1", "rouge", "bleu", "chrf")


@dataclass(frozen=True)
class Plan:
    """What is done with the rows: scored by which metrics, generated or not, as classes or not."""

    scoring: Scoring
    groups: frozenset[str]
    generates: bool
    as_classes: bool
    asked: bool
    """True if --metrics named the groups."""
    has_head: bool = False
    """True where a head tells the label: there is no text, so nothing per byte."""

    def shows(self, metric: str) -> bool:
        """True for a score that was asked for; those of options of their own always are."""
        if self.has_head and metric in ("perplexity", "bits_per_byte"):
            return False
        if not self.asked:
            return True
        group = (
            "fields" if metric.startswith(FIELD) else next((g for g, names in GROUPS.items() if metric in names), None)
        )
        return group is None or group in self.groups


def make_plan(settings: EvalSettings, data: RowFile) -> Plan:
    """The options checked against the rows; what cannot be scored is refused where it was asked for, else left out."""
    asked = asked_groups(settings.metrics)
    called = next((place for row, place in zip(data.rows, data.places, strict=True) if ends_in_call(row)), None)
    has_answers = data.kind in ("prompt_completion", "messages", "classification") and called is None
    given = {"--schema": settings.schema, "--extract": settings.extract, "--scorer": settings.scorer}
    needs = [*sorted((asked or set()) - {"loss"}), *(flag for flag, value in given.items() if value)]
    if called:
        what = f"{called}: the last turn calls a tool, which is no text to compare answers with"
        if needs:
            raise UserError(f"{what}, as {needs[0]} does", ExitCode.DATA, hint="--metrics loss, or leave such rows out")
        console.info(f"{what}: the loss alone is scored")
    if needs and not has_answers:
        what = f"{data.places[0]}: rows of {data.kind} have no reference answer, which {needs[0]} needs"
        raise UserError(what, ExitCode.DATA, hint="leave it out, or use rows with prompt and completion")
    references = [reference_of(scored_row(row, data.kind)) for row in data.rows] if has_answers else []
    groups = settle_groups(settings, data, references, asked)
    scoring = Scoring(
        frozenset(groups & {*OF_TEXT, "json", "fields"}),
        settings.lang,
        load_schema(settings.schema) if settings.schema else None,
        compiled(settings.extract, references, data.places) if settings.extract else None,
        {address.rpartition(":")[2]: load_function(address, "--scorer") for address in settings.scorer},
    )
    if "bleu" in groups:
        bleu_scorer(settings.lang)  # a tokenizer that is missing shows now
    check_references(scoring, references, data.places)
    own = scoring.extract is not None or bool(scoring.scorers)
    generates = has_answers and (own or bool(groups - {"loss"}))
    return Plan(scoring, frozenset(groups), generates, "labels" in groups, asked is not None)


def ends_in_call(row: Row) -> bool:
    """True for a conversation whose last turn calls a tool."""
    return "messages" in row and bool(row["messages"][-1].get("tool_calls"))


def plan_of_head(settings: EvalSettings) -> Plan:
    """The same for a model with a head for classes: loss and labels, whatever else is asked for needs text."""
    asked = asked_groups(settings.metrics)
    given = {"--schema": settings.schema, "--extract": settings.extract, "--scorer": settings.scorer}
    others = [f"--metrics {name}" for name in sorted((asked or set()) - {"loss", "labels"})]
    for name in [*others, *(flag for flag, value in given.items() if value)]:
        raise UserError(f"{name}: a head for classes writes no text", ExitCode.USAGE, hint="--metrics loss,labels")
    groups = asked or {"loss", "labels"}
    scoring = Scoring(frozenset(), None, None, None, {})
    return Plan(scoring, frozenset(groups), False, True, asked is not None, has_head=True)


def asked_groups(names: str | None) -> set[str] | None:
    """The groups that --metrics names; None where it is absent."""
    if names is None:
        return None
    groups = {name.strip() for name in names.split(",") if name.strip()}
    for name in sorted(groups - set(GROUPS)):
        hint = f"{did_you_mean(name, list(GROUPS))}--metrics takes {', '.join(GROUPS)}"
        raise UserError(f"--metrics {name}: no such score", ExitCode.USAGE, hint=hint)
    if not groups:
        raise UserError("--metrics names no score", ExitCode.USAGE, hint=f"--metrics takes {', '.join(GROUPS)}")
    return groups


def settle_groups(settings: EvalSettings, data: RowFile, references: Sequence[str], asked: set[str] | None) -> set[str]:
    """What is scored: what was asked for, or else what fits the kind of answers."""
    if asked is None:
        if not references:
            return {"loss"}
        groups = fitting_groups(data, references)
    else:
        groups = set(asked)
    if settings.schema:
        groups |= {"json"}
    unreadable = {
        "rouge": (not rouge_can_read(references), "it reads Latin letters only, which most references lack", "chrf"),
        "bleu": (
            settings.lang is None and writes_without_spaces(list(references)),
            "the references have no spaces between words, and no --lang says how to cut them",
            "bleu --lang zh (or what it is)",
        ),
        "f1": (writes_without_spaces(list(references)), "the references have no spaces between words", "chrf"),
    }
    for group, (is_unreadable, why, instead) in unreadable.items():
        if group in groups and is_unreadable:
            name = {"rouge": "ROUGE", "bleu": "BLEU", "f1": "token F1"}[group]
            if asked is not None:
                raise UserError(f"--metrics {group}: {why}", ExitCode.DATA, hint=f"--metrics {instead}")
            console.info(f"{name} left out: {why}")
            groups.discard(group)
    return groups


def fitting_groups(data: RowFile, references: Sequence[str]) -> set[str]:
    """Without --metrics: classes are labels, JSON is compared as JSON, everything else as text."""
    if data.kind == "classification":
        return {"loss", "labels"}
    if all(is_record(reference) for reference in references):
        return {"loss", "exact_match", "json", "fields"}
    return {"loss", *OF_TEXT, "fields"}


def is_record(text: str) -> bool:
    """True for a JSON object or list."""
    return text.lstrip()[:1] in ("{", "[") and parse_json(text)[0]


def load_schema(path: str) -> Any:
    """A validator for the JSON schema of a file; it loads nothing from the network that the schema may refer to."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--schema {path}: no such file", ExitCode.USAGE, hint="give a JSON schema") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {str(error)[:100]}", ExitCode.DATA, hint="mend the schema") from None
    if not isinstance(schema, (dict, bool)):
        raise UserError(f"{path}: a JSON schema is an object", ExitCode.DATA, hint='for example {"type": "object"}')
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "at its top"
        what = f"{path}: no valid JSON schema ({where}: {error.message[:150]})"
        raise UserError(what, ExitCode.DATA, hint="mend the schema") from None
    return kind(schema, registry=Registry())


def compiled(pattern: str, references: Sequence[str], places: Sequence[str]) -> re.Pattern[str]:
    """The expression of --extract, which must find something in every reference."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"--extract: no regular expression: {error}", ExitCode.USAGE, hint=r"--extract '#### (.+)'"
        ) from None
    for reference, place in zip(references, places, strict=True):
        if extract(expression, reference) is None:
            what = f"{place}: --extract finds nothing in the reference answer {reference[-60:]!r}"
            raise UserError(what, ExitCode.DATA, hint="change the expression, or leave the row out")
    return expression


def check_references(scoring: Scoring, references: Sequence[str], places: Sequence[str]) -> None:
    """Say which references do not fit the schema themselves: no answer like them can."""
    if scoring.schema is None:
        return
    faults = [(place, fault_of(scoring.schema, text)) for place, text in zip(places, references, strict=True)]
    wrong = [(place, fault) for place, fault in faults if fault]
    if wrong:
        place, fault = wrong[0]
        console.warn(f"{len(wrong)} of {len(references)} reference answers do not fit the schema; {place}: {fault}")


def fault_of(schema: Any, text: str) -> str | None:
    """Why a text does not fit a schema; None if it does."""
    is_json, value = parse_json(text)
    return fault_in(schema, value) if is_json else "not JSON"


def expected_metrics(plan: Plan, task: Task) -> list[str]:
    """The scores that there will be, from scoring the first reference as if it were an answer.

    So a gate that names another, or a scorer that cannot work, shows before hours of generation.
    """
    names = [*LIKELIHOODS]
    if task.rejected:
        names += ["chosen_likelier", "chosen_likelier_per_token"]
    if task.classes:
        names += ["accuracy", "macro_f1"]
    if task.generates:
        row, where = task.data.rows[task.places[0]], task.where(0)
        probe = score_answer(
            plan.scoring, task.references[0], task.references[0], fields=task.fields[0], row=row, where=where
        )
        names += [*probe.scores, "stopped", *(["text_accuracy", "text_macro_f1"] if task.classes else [])]
    return [name for name in dict.fromkeys(names) if plan.shows(name)]
