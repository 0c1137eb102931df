"""The page of an evaluation: is it better, how sure is that, what did it forget, which rows went wrong."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ftkit import __version__
from ftkit.commands.eval_output import (
    between,
    confusion_facts,
    count_of,
    findings,
    forgetting_line,
    number,
    ranking_metric,
    worst_first,
)  # fmt: skip
from ftkit.commands.eval_scores import Result, Scored
from ftkit.core import page
from ftkit.core.comparison import Comparison
from ftkit.core.eval_settings import EvalSettings
from ftkit.core.forgetting import Forgetting
from ftkit.core.labels import NO_LABEL
from ftkit.core.options import flag_of
from ftkit.core.page import Html
from ftkit.core.scoring import RowScore, is_lower_better, label_of, total
from ftkit.io.atomic import atomic_file
from ftkit.io.trained import Trained

ROWS_SHOWN = 20
LONGEST_TEXT = 4000
"""Characters of a prompt or an answer on the page."""
MOST_CLASSES = 15
"""With more classes the table of all pairs is left out for a list of those taken for another most often."""
NOT_REPEATED = ("force", "report", "output", "json", "cache")
"""Options that decide where results go, not what they are."""


def write_report(settings: EvalSettings, trained: Trained, result: Result, faults: list[str]) -> None:
    """The page, as one file."""
    assert settings.report is not None
    with atomic_file(Path(settings.report)) as file:
        file.write(report_page(settings, trained, result, faults))


def report_page(settings: EvalSettings, trained: Trained, result: Result, faults: list[str]) -> str:
    """The page as text."""
    task = result.subject.task
    subtitle = f"{count_of(len(result.subject.rows))} of {task.data.source}"
    if task.left_out:
        subtitle += f", {task.left_out} more left out: longer than the model's context"
    sentences = [answer(result.comparisons, result.forgetting, faults), *findings(result, faults)]
    return page.page(
        f"Evaluation of {trained.name}",
        subtitle,
        page.section("In short", page.findings(sentences)),
        *(score_section(result, rival, found) for rival, found in zip(result.rivals, result.comparisons, strict=True)),
        *([] if result.rivals else [page.section("Scores", plain_scores(result))]),
        *([page.section("What it forgot", *forgetting_table(result))] if result.forgetting else []),
        *([page.section("Classes", *confusions(result.subject))] if task.classes else []),
        page.section("Lengths", lengths(result)),
        page.section("Rows, the worst first", *rows_shown(result)),
        page.section("How to repeat it", *how_to_repeat(settings, trained, result)),
    )


def answer(
    comparisons: Sequence[Mapping[str, Comparison]], forgetting: Forgetting | None, faults: Sequence[str]
) -> tuple[str, str]:
    """May I ship it? The first sentence of the page: gates first, then what is worse or forgotten, then gains."""
    verdicts = [found.verdict for compared in comparisons for found in compared.values()]
    better, worse, unclear = (verdicts.count(verdict) for verdict in ("better", "worse", "unclear"))
    scores = f"{better} score{'' if better == 1 else 's'} clearly better, {worse} clearly worse, {unclear} unclear"
    if faults:
        return "worse", f"Do not ship: a gate failed ({'; '.join(faults)})."
    forgot = forgetting is not None and forgetting.is_too_much
    if worse or forgot:
        lost = ", and it has forgotten more general text than the limit" if forgot else ""
        return "worse", f"Look before you ship: {scores}{lost}."
    if better:
        return "better", f"Nothing here speaks against shipping: {scores}."
    if verdicts:
        return "unclear", f"No clear gain: {scores}. More rows would tell more."
    return "unclear", "Nothing to compare with: add --baseline to see what training changed."


def score_section(result: Result, rival: Scored, comparisons: Mapping[str, Comparison]) -> Html:
    """The scores beside those of another model."""
    is_base = rival is result.base
    title = "Beside the untuned base" if is_base else f"Beside {rival.name}"
    columns = [
        "",
        "base" if is_base else "other",
        "tuned",
        "difference",
        "95 % interval",
        "better →",
        "won / lost / tied",
    ]
    rows = [score_row(result, rival, metric, found) for metric, found in comparisons.items()]
    words = (
        "Differences are tuned minus the other, with the interval that holds the true one in 95 of 100 cases (paired "
        "bootstrap over rows). Loss, perplexity and bits per byte are better when lower. BLEU and chrF go to 100."
    )
    return page.section(title, page.table(columns, rows), page.note(words))


def score_row(result: Result, rival: Scored, metric: str, found: Comparison) -> list[object]:
    """One score of both models."""
    interval = found.interval
    sign = -1 if is_lower_better(metric) else 1
    low, high = sorted((sign * interval.low, sign * interval.high))
    return [
        label_of(metric),
        number(metric, total(rival.rows, metric)),
        number(metric, total(result.subject.rows, metric)),
        page.tag("span", number(metric, interval.value, sign=True), class_=found.verdict),
        between(metric, interval.low, interval.high, sign=True),
        page.interval_bar(low, sign * interval.value, high, kind=found.verdict),
        f"{found.won} / {found.lost} / {found.tied}",
    ]


def plain_scores(result: Result) -> Html:
    """The scores alone."""
    rows = [
        [label_of(metric), number(metric, found.value), between(metric, found.low, found.high)]
        for metric, found in result.intervals.items()
    ]
    return page.table(["", "score", "95 % interval"], rows)


def forgetting_table(result: Result) -> list[Html]:
    """The loss on general text before and after."""
    found = result.forgetting
    assert found is not None
    lines = [
        ["loss", f"{found.before:.4f}", f"{found.after:.4f}", f"{found.rise.value:+.4f}",
         between("forgetting", found.rise.low, found.rise.high, sign=True)],
    ]  # fmt: skip
    columns = ["", "before", "after", "difference", "95 % interval"]
    return [page.table(columns, lines), page.note(forgetting_line(found))]


def confusions(scored: Scored) -> list[Html]:
    """Which classes were taken for which, by likelihood and in the text."""
    facts = confusion_facts(scored)
    names = {"likelihood": "The likeliest label", "text": "The label that was written"}
    pieces: list[Html] = []
    for kind, title in names.items():
        if kind in facts:
            pieces += [page.tag("h3", title), confusion_table(facts["labels"], facts[kind])]
    return pieces


def confusion_table(labels: list[str], counts: list[list[int]]) -> Html:
    """All pairs of classes, or the pairs that were mistaken most often where there are many."""
    if len(labels) <= MOST_CLASSES:
        none = any(line[-1] for line in counts)
        rows = [(label, line if none else line[:-1]) for label, line in zip(labels, counts, strict=True)]
        return page.heat_table("true ↓ predicted →", [*labels, *([NO_LABEL] if none else [])], rows)
    named = [*labels, NO_LABEL]
    mistaken = sorted(
        (-count, label, named[place], sum(line))
        for label, line in zip(labels, counts, strict=True)
        for place, count in enumerate(line)
        if count and named[place] != label
    )[:ROWS_SHOWN]
    if not mistaken:
        return page.note("none was taken for another")
    return page.table(
        ["true", "predicted", "rows", "of"], [[label, other, -count, whole] for count, label, other, whole in mistaken]
    )


def lengths(result: Result) -> Html:
    """How long answers and references are; of plain text, how long the rows are."""
    subject = result.subject
    series: dict[str, list[float]] = {"reference" if subject.task.generates else "rows": tokens_of(subject.rows)}
    if subject.task.generates:
        for scored in (subject, *result.rivals):
            name = "tuned" if scored is subject and result.rivals else "answer" if scored is subject else scored.name
            series[name] = [length for row in scored.rows for length in row.lengths]
    return page.histogram(series, "tokens, without the stop token")


def tokens_of(rows: list[RowScore]) -> list[float]:
    """Tokens of the references, their stop token left out."""
    return [max(0, row.likelihood.tokens - 1) for row in rows]


def rows_shown(result: Result) -> list[Html]:
    """The rows with the lowest scores, each with what was asked, expected and answered."""
    task, metric = result.subject.task, ranking_metric(result)
    order = worst_first(result)[:ROWS_SHOWN]
    legend = page.tag(
        "p",
        f"By {label_of(metric)}. In answers, ",
        page.tag("ins", "marked"),
        " is not in the reference, ",
        page.tag("del", "crossed out"),
        " is only there; what has little in common with it is not marked.",
        class_="faint",
    )
    words = legend if task.generates else page.note(f"By {label_of(metric)}.")
    rivals = [dict(zip(rival.task.places, rival.rows, strict=True)) for rival in result.rivals]
    shown = [row_shown(result, item, metric, [rows.get(task.places[item]) for rows in rivals]) for item in order]
    return [words, *shown]


def row_shown(result: Result, item: int, metric: str, others: list[RowScore | None]) -> Html:
    """One row."""
    task, row = result.subject.task, result.subject.rows[item]
    head = page.tag("p", f"{task.where(item)} · {told(row, metric)}", class_="faint")
    asked = page.columns({"asked" if task.references else "text": page.said(cut(task.asked(item)))})
    parts: dict[str, Html] = {}
    if task.references:
        reference = task.references[item]
        parts["chosen" if task.rejected else "reference"] = page.said(cut(reference.strip()))
        if task.rejected:
            parts["rejected"] = page.said(cut(last_answer(task.data.rows[task.places[item]]["rejected"])))
        for rival, other in zip(result.rivals, others, strict=True):
            if other is not None and other.prediction is not None:
                parts[f"{rival.name} · {told(other, metric)}"] = answer_shown(other.prediction, reference)
        if row.prediction is not None:
            name = "tuned" if result.rivals else "answer"
            parts[f"{name} · {told(row, metric)}"] = answer_shown(row.prediction, reference)
    if row.label is not None:
        parts["likeliest label"] = page.said(row.label)
    return page.tag("article", head, asked, page.columns(parts))


def told(row: RowScore, metric: str) -> str:
    """The row's score in words."""
    return f"{label_of(metric)} {number(metric, row.value(metric))}" if row.parts(metric) else "no score"


def answer_shown(prediction: str, reference: str) -> Html:
    """An answer with its differences from the reference."""
    return page.said(page.difference(cut(prediction).strip(), cut(reference).strip()))


def last_answer(value: Any) -> str:
    """An answer as text, also where it is turns."""
    return value if isinstance(value, str) else str(value[-1].get("content", ""))


def cut(text: str) -> str:
    """The text as far as the page shows it."""
    return page.ellipsis(text, LONGEST_TEXT)


def how_to_repeat(settings: EvalSettings, trained: Trained, result: Result) -> list[Html]:
    """The command, and what it depends on."""
    task, card = result.subject.task, trained.card
    facts = {
        "model": trained.name,
        "base": card.base if card else trained.base.name,
        "method": f"{card.method}, {card.dtype}" if card else None,
        "rows": f"{task.data.source}: {len(task.data.rows):,} of {task.data.kind}",
        "template": task.template.fingerprint if task.template else None,
        "answers": f"at most {settings.max_new} tokens, temperature {settings.temperature:g}"
        if task.generates
        else None,
        "seeds": ", ".join(settings.seed),
        "ftkit": __version__,
    }
    rows = [[name, value] for name, value in facts.items() if value is not None]
    return [page.tag("pre", command_of(settings, trained)), page.table([], rows, plain=True)]


def command_of(settings: EvalSettings, trained: Trained) -> str:
    """The command line that gives these scores again; a run that was found by itself is named."""
    words = ["ftkit", "eval", *settings.data]
    if trained.run is not None and settings.run is None:
        words += ["--run", trained.name]
    for option in fields(settings):
        value = getattr(settings, option.name)
        default = option.default if option.default is not MISSING else None
        if option.name in ("data", *NOT_REPEATED) or is_default(value, default):
            continue
        for each in value if isinstance(value, (list, tuple)) else [value]:
            words += [flag_of(option.name)] if each is True else [flag_of(option.name), str(each)]
    return shlex.join(words)


def is_default(value: object, default: object) -> bool:
    """True for the default; lists may be tuples."""
    return list(value) == list(default or ()) if isinstance(value, (list, tuple)) else value == default  # type: ignore[call-overload]
