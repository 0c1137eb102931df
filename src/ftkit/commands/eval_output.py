"""What an evaluation prints: answers as JSONL, tables and findings for a person, one object with all scores."""

import sys
from collections.abc import Mapping
from typing import Any

from ftkit import console
from ftkit.commands.eval_scores import Result, Scored
from ftkit.core.answer_scores import FIELD
from ftkit.core.comparison import Comparison
from ftkit.core.eval_settings import EvalSettings
from ftkit.core.forgetting import TOO_MUCH, Forgetting
from ftkit.core.labels import confusion, label_in
from ftkit.core.scoring import RowScore, is_lower_better, label_of, total
from ftkit.io.jsonl import rows_output
from ftkit.io.trained import Trained

SCHEMA = "ftkit.eval/1"
SAMPLES = 3
FEW_ROWS = 20
"""With fewer rows than this the intervals are rough, which is said."""
MOST_FIELDS = 8
"""Fields that the table on a terminal shows; the others are in --json and on the page."""
VERDICTS = {"better": "better than", "worse": "worse than", "unclear": "no clear difference from"}
RANKED_BY = ("extracted_match", "accuracy", "field_accuracy", "chrf", "f1", "exact_match", "chosen_likelier")
"""What rows are put in order by, the first that there is."""
DIGITS = {"perplexity": 2, "bleu": 1, "chrf": 1, "loss": 4, "forgetting": 4}


def write_predictions(settings: EvalSettings, result: Result) -> None:
    """One row of JSONL for each row of the data, in its order; a few samples instead where a person looks at stdout."""
    if settings.output is None and settings.json:
        return
    if settings.output is None and console.is_terminal(sys.stdout):
        show_samples(result)
        return
    items = [dict(zip(scored.task.places, scored.rows, strict=True)) for scored in (result.subject, *result.rivals)]
    numbers = {place: item for item, place in enumerate(result.subject.task.places)}
    with rows_output(settings.output, force=settings.force) as write:
        for place in range(len(result.subject.task.data.rows)):
            write(prediction_row(result, place, numbers.get(place), [rows.get(place) for rows in items]))


def prediction_row(result: Result, place: int, item: int | None, rows: list[RowScore | None]) -> dict[str, Any]:
    """What is known of one row of the data; `item` is its number in the task, None if it was left out."""
    task = result.subject.task
    row = task.data.rows[place]
    shown: dict[str, Any] = {
        key: row[key] for key in ("prompt", "tools", "text", "label", "chosen", "rejected") if key in row
    }
    shown |= {"messages": row["messages"][:-1]} if "messages" in row else {}
    subject, *rivals = rows
    if item is None or subject is None:
        return shown | {"left_out": f"longer than {task.context} tokens"}
    if task.generates:
        shown["reference"] = task.references[item]
    shown |= model_part(subject, "")
    against: dict[str, Any] = {}
    for scored, rival in zip(result.rivals, rivals, strict=True):
        if rival is not None and scored is result.base:
            shown |= model_part(rival, "base_")
        elif rival is not None:
            against[scored.name] = model_part(rival, "")
    return {**shown, "against": against} if against else shown


def model_part(row: RowScore, prefix: str) -> dict[str, Any]:
    """What one model made of a row."""
    found: dict[str, Any] = {}
    if row.prediction is not None:
        found |= {"prediction": row.prediction, "finish": row.finishes[0]}
    if len(row.predictions) > 1:
        found["predictions"] = list(row.predictions)
    found |= {"extracted": row.extracted} if row.extracted is not None else {}
    found |= {"likeliest": row.label} if row.label is not None else {}
    scores = {"loss": row.likelihood.nats / row.likelihood.tokens, "tokens": row.likelihood.tokens, **row.scores}
    if row.rejected is not None:
        scores["rejected_loss"] = row.rejected.nats / row.rejected.tokens
    return {f"{prefix}{key}": value for key, value in {**found, "scores": scores}.items()}


def ranking_metric(result: Result) -> str:
    """The score that rows are put in order by; the loss where nothing else was scored."""
    return next((metric for metric in RANKED_BY if metric in result.metrics), "loss")


def worst_first(result: Result) -> list[int]:
    """Items of the subject from its worst to its best; equal ones by their loss."""
    metric, rows = ranking_metric(result), result.subject.rows
    sign = 1 if is_lower_better(metric) else -1

    def badness(item: int) -> tuple[float, float]:
        row = rows[item]
        score = sign * row.value(metric) if row.parts(metric) else 0.0
        return -score, -row.likelihood.nats / row.likelihood.tokens

    return sorted(range(len(rows)), key=badness)


def most_telling(result: Result) -> list[int]:
    """Items for a short look: beside a base the clearest win, the clearest loss and one between; else the first ones."""
    count = min(SAMPLES, len(result.subject.rows))
    if result.base is None or result.base.task is not result.subject.task:
        return list(range(count))
    metric = ranking_metric(result)
    sign = -1 if is_lower_better(metric) else 1
    pairs = list(zip(result.subject.rows, result.base.rows, strict=True))
    gains = [
        sign * (a.value(metric) - b.value(metric)) if a.parts(metric) and b.parts(metric) else 0.0 for a, b in pairs
    ]
    order = sorted(range(len(pairs)), key=lambda item: -gains[item])
    return list(dict.fromkeys([order[0], order[len(order) // 2], order[-1]]))[:count]


def show_samples(result: Result) -> None:
    """A few rows with reference and answers below each other, on stdout, for a person."""
    task = result.subject.task
    if not task.generates:
        return
    for item in most_telling(result):
        parts = {"prompt": task.asked(item), "reference": task.references[item]}
        if result.base:
            parts["base"] = result.base.rows[item].prediction or ""
        parts["tuned" if result.base else "answer"] = result.subject.rows[item].prediction or ""
        console.write_line(f"\n--- {task.where(item)}", sys.stdout)
        for name, text in parts.items():
            console.write_line(f"{name:<11}" + text.strip().replace("\n", "\n" + " " * 11), sys.stdout)


def show_scores(result: Result) -> None:
    """The tables of scores on stderr: one for each model that this one is compared with."""
    rows = result.subject.rows
    title = f"{count_of(len(rows))}, {sum(row.likelihood.tokens for row in rows):,} answer tokens"
    if result.subject.task.encoder.classes:
        title = f"{count_of(len(rows))}, {len(result.subject.task.classes)} labels"
    if not result.rivals:
        columns = ["", "score", "95 % interval"]
        console.table(title, columns, [score_line(result, metric) for metric in shown_metrics(result.metrics)])
    for rival, comparisons in zip(result.rivals, result.comparisons, strict=True):
        columns = ["", rival.name, "tuned", "difference", "95 % interval", "rows won/lost/tied"]
        lines = [comparison_line(result, rival, metric, comparisons[metric]) for metric in shown_metrics(comparisons)]
        console.table(title, columns, lines)
    hidden = len(result.metrics) - len(shown_metrics(result.metrics))
    if hidden:
        console.info(f"{hidden} more fields are in --json and --report")
    if len(rows) < FEW_ROWS:
        console.info(f"intervals from {count_of(len(rows))} only are rough")
    if len(result.subject.seeds) > 1:
        show_seeds(result)


def shown_metrics(metrics: Mapping[str, Any] | list[str]) -> list[str]:
    """The metrics for a table that fits on a screen."""
    fields = [metric for metric in metrics if metric.startswith(FIELD)]
    return [metric for metric in metrics if metric not in fields[MOST_FIELDS:]]


def show_seeds(result: Result) -> None:
    """How much the scores depend on the seed."""
    seeds = result.subject.seeds
    metrics = [metric for metric in result.metrics if metric not in ("loss", "perplexity", "bits_per_byte")]
    lines = [
        [label_of(metric), *(number(metric, total(rows, metric)) for rows in seeds)]
        for metric in shown_metrics(metrics)
    ]
    console.table("by seed", ["", *(str(place) for place in range(1, len(seeds) + 1))], lines)


def show_findings(result: Result, faults: list[str]) -> None:
    """The scores in sentences."""
    for _, sentence in findings(result, faults):
        console.info(sentence)


def findings(result: Result, faults: list[str]) -> list[tuple[str, str]]:
    """(better, worse or unclear; sentence): what the numbers say of each rival, of forgetting, of the gates."""
    found = []
    for rival, comparisons in zip(result.rivals, result.comparisons, strict=True):
        name = "the base" if rival is result.base else rival.name
        for verdict, words in VERDICTS.items():
            named = [label_of(metric) for metric, one in comparisons.items() if one.verdict == verdict]
            if named:
                found.append((verdict, f"{words} {name}: {', '.join(named)}"))
    if result.forgetting:
        told = forgetting_line(result.forgetting)
        found.append(("worse" if result.forgetting.is_too_much else "unclear", told))
    found += [("worse", f"gate failed: {fault}") for fault in faults]
    return found


def forgetting_line(found: Forgetting) -> str:
    """What training did to general text, in a sentence."""
    low, high = (f"{bound:+.4f}" for bound in (found.rise.low, found.rise.high))
    moved = f"; predictions moved by {found.divergence:.4f} nats per token (KL)" if found.divergence is not None else ""
    judged = "forgotten" if found.is_too_much else f"within {TOO_MUCH}"
    return (
        f"general text ({found.source}): loss {found.before:.4f} before, {found.after:.4f} after"
        f" ({found.rise.value:+.4f}, 95 % {low} to {high}: {judged}){moved}"
    )


def score_line(result: Result, metric: str) -> list[str]:
    """One metric of the table without rivals."""
    interval = result.intervals[metric]
    return [label_of(metric), number(metric, interval.value), between(metric, interval.low, interval.high)]


def comparison_line(result: Result, rival: Scored, metric: str, found: Comparison) -> list[str]:
    """One metric of the table: rival, tuned, their difference, its interval, rows."""
    return [
        label_of(metric),
        number(metric, total(rival.rows, metric)),
        number(metric, total(result.subject.rows, metric)),
        number(metric, found.interval.value, sign=True),
        between(metric, found.interval.low, found.interval.high, sign=True),
        f"{found.won}/{found.lost}/{found.tied}",
    ]


def between(metric: str, low: float, high: float, *, sign: bool = False) -> str:
    """An interval in words."""
    return f"{number(metric, low, sign=sign)} to {number(metric, high, sign=sign)}"


def count_of(rows: int) -> str:
    """So many rows, in words."""
    return f"{rows:,} row{'' if rows == 1 else 's'}"


def number(metric: str, value: float, *, sign: bool = False) -> str:
    """A score with as many digits as say something."""
    digits = 0 if abs(value) >= 1000 else DIGITS.get(metric, 3)
    return f"{value:{'+' if sign else ''},.{digits}f}"


def gate_scores(result: Result) -> dict[str, float]:
    """The scores that a gate may name."""
    forgot = {"forgetting": result.forgetting.rise.value} if result.forgetting else {}
    return {metric: total(result.subject.rows, metric) for metric in result.metrics} | forgot


def summary(settings: EvalSettings, trained: Trained, result: Result, faults: list[str]) -> dict[str, Any]:
    """All scores as one object."""
    subject, base = result.subject, result.base
    others = {
        rival.name: {"scores": totals(rival, comparisons), "difference": facts_of(comparisons)}
        for rival, comparisons in zip(result.rivals, result.comparisons, strict=True)
        if rival is not base
    }
    task = subject.task
    compared = result.comparisons[result.rivals.index(base)] if base else {}
    return {
        "schema": SCHEMA,
        "model": trained.name,
        "base": trained.card.base if trained.card else trained.base.name,
        "data": task.data.source,
        "template": task.template.fingerprint if task.template else None,
        "rows": len(task.data.rows),
        "left_out": task.left_out,
        "tokens": sum(row.likelihood.tokens for row in subject.rows),
        "max_new": settings.max_new,
        "temperature": settings.temperature,
        "seed": settings.seeds[0] if len(settings.seeds) == 1 else list(settings.seeds),
        "scores": totals(subject, result.metrics),
        "intervals": {metric: [found.low, found.high] for metric, found in result.intervals.items()},
        "by_seed": [totals_of(rows, result.metrics) for rows in subject.seeds] if len(subject.seeds) > 1 else None,
        "baseline": totals(base, compared) if base else None,
        "difference": facts_of(compared) or None,
        "against": others or None,
        "confusion": confusion_facts(subject) if task.classes else None,
        "forgetting": forgetting_facts(result.forgetting) if result.forgetting else None,
        "failed": faults,
    }


def totals(scored: Scored, metrics: Mapping[str, Any] | list[str]) -> dict[str, float]:
    """The scores of a model."""
    return totals_of(scored.rows, metrics)


def totals_of(rows: list[RowScore], metrics: Mapping[str, Any] | list[str]) -> dict[str, float]:
    """The scores of rows."""
    return {metric: total(rows, metric) for metric in metrics}


def facts_of(comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    """Comparisons as JSON holds them."""
    return {
        metric: {
            "value": found.interval.value,
            "low": found.interval.low,
            "high": found.interval.high,
            "won": found.won,
            "lost": found.lost,
            "tied": found.tied,
            "verdict": found.verdict,
        }
        for metric, found in comparisons.items()
    }


def confusion_facts(scored: Scored) -> dict[str, Any]:
    """Which classes were taken for which: rows are true, columns predicted, the last column is none of them."""
    task = scored.task
    truths = [reference.strip() for reference in task.references]
    facts: dict[str, Any] = {
        "labels": task.classes,
        "likelihood": confusion(truths, [row.label for row in scored.rows], task.classes),
    }
    if task.generates:
        written = [label_in(row.prediction or "", task.classes) for row in scored.rows]
        facts["text"] = confusion(truths, written, task.classes)
    return facts


def forgetting_facts(found: Forgetting) -> dict[str, Any]:
    """What training did to general text, as JSON holds it."""
    return {
        "text": found.source,
        "rows": found.rows,
        "tokens": found.tokens,
        "before": found.before,
        "after": found.after,
        "rise": found.rise.value,
        "low": found.rise.low,
        "high": found.rise.high,
        "divergence": found.divergence,
        "too_much": found.is_too_much,
    }
