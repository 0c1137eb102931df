"""`ftkit eval`: rows -> loss, perplexity, answers and their scores, beside the untuned base where asked."""

import gc
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from ftkit import console
from ftkit.core.comparison import Comparison, compare
from ftkit.core.encoding import Encoder
from ftkit.core.evaluation import Task, answers, asked_text, make_task, score_answers, score_likelihoods
from ftkit.core.generation import Answer, honours_padding, own_stop_ids
from ftkit.core.scoring import FIELD, RowScore, metrics_of, rouge_can_read, total
from ftkit.core.settings import EvalSettings
from ftkit.errors import ExitCode, UserError
from ftkit.io.atomic import refuse_existing
from ftkit.io.base_model import find_base
from ftkit.io.devices import pick_device
from ftkit.io.jsonl import rows_output
from ftkit.io.row_file import RowFile, read_row_file
from ftkit.io.run_folder import open_run, require_latest
from ftkit.io.template import Template
from ftkit.io.template_files import load_template, template_of_rows
from ftkit.io.trained import Trained, load_trained, open_trained, open_trained_run, without_adapter

SCHEMA = "ftkit.eval/1"
SAMPLES = 3
VERDICTS = {"better": "better than the base", "worse": "worse than the base", "unclear": "no clear difference"}
FEW_ROWS = 20
"""With fewer rows than this the intervals are rough, which is said."""
LABELS = {"bits_per_byte": "bits per byte", "exact_match": "exact match", "f1": "token F1", "rouge1": "ROUGE-1",
          "rougeL": "ROUGE-L", "field_accuracy": "field accuracy"}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """The scores of the rows of a task, for the model and for the untuned base where it was asked for."""

    task: Task
    tuned: list[RowScore]
    base: list[RowScore] | None
    comparisons: dict[str, Comparison]


def run(settings: EvalSettings) -> None:
    """Find what to score and the rows, score, report."""
    if settings.output:
        refuse_existing(Path(settings.output), replace=settings.force)
        Path(settings.output).parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the work
    trained = find_subject(settings)
    untuned = base_of(trained) if settings.baseline else None
    data = read_row_file(find_rows(settings, trained), "eval")
    template = settle_template(settings, data, trained)
    result = evaluate(settings, trained, untuned, data, template)
    write_predictions(settings, result)
    show_scores(settings, trained, result)
    if settings.json:
        sys.stdout.buffer.write(orjson.dumps(summary(settings, trained, result)) + b"\n")


def find_subject(settings: EvalSettings) -> Trained:
    """The model, the run or the adapter that was named; else the run that completed last."""
    if settings.model:
        return open_trained(settings.model)
    if settings.run is None:
        return open_trained_run(require_latest())
    named = Path(settings.run)
    is_made_elsewhere = named.is_dir() and not (named / "run.json").is_file()
    return open_trained(settings.run) if is_made_elsewhere else open_trained_run(open_run(settings.run))


def find_rows(settings: EvalSettings, trained: Trained) -> str:
    """DATA, or the rows that the run held out."""
    if settings.data:
        return settings.data
    if trained.run is None:
        raise UserError(f"no rows to score {trained.name} on", ExitCode.USAGE, hint="ftkit eval rows.jsonl --model ...")
    if not trained.run.valid.is_file() or trained.run.valid.stat().st_size == 0:
        hint = "name rows: ftkit eval rows.jsonl"
        raise UserError(f"{trained.name}: the run held no rows out", ExitCode.DATA, hint=hint)
    return str(trained.run.valid)


def base_of(trained: Trained) -> Trained:
    """The untuned base as a model of its own; what was made from nothing has none."""
    init = trained.run.read_info().get("settings", {}).get("init") if trained.run else None
    if init or (trained.adapter is None and trained.card is None):
        why = "was trained from scratch" if init else "is no run and no adapter"
        what = f"--baseline: {trained.name} {why}, so it has no untuned base"
        raise UserError(what, ExitCode.USAGE, hint="leave it out")
    if trained.adapter is not None or trained.card is None:
        return replace(trained, adapter=None, card=None, run=None)
    card = trained.card
    base = find_base(card.base if card.base.startswith("builtin:") else card.base_location, card.base_revision)
    return open_trained(base.location)


def settle_template(settings: EvalSettings, data: RowFile, trained: Trained) -> Template | None:
    """The template of the rows, which must be the one that training saw: other prompts score another task."""
    given = load_template(settings.template) if settings.template else None
    if trained.card is None:
        return template_of_rows(data.template, given) if data.template else given
    learned = trained.card.template
    rows_have, run_has = data.template, trained.card.template_fingerprint
    if given is not None and given.fingerprint != (rows_have or run_has):
        raise mismatch(f"--template is {given.fingerprint}", rows_have or run_has, trained)
    if rows_have is None or rows_have == run_has:
        return learned or given
    if run_has is None and data.kind != "messages":
        console.info(f"the rows were made with {rows_have}; {trained.name} does not say what it was trained with")
        return template_of_rows(rows_have, given)
    raise mismatch(f"{data.source}: the rows were made with template {rows_have}", run_has, trained)


def mismatch(what: str, expected: str | None, trained: Trained) -> UserError:
    """The error for rows of another template than the one of training."""
    name = expected.partition("@")[0] if expected else None
    hint = f"make the rows again: ftkit prep FILE --template {name}" if name else "use rows without a template"
    return UserError(f"{what}, {trained.name} was trained with {expected or 'none'}", ExitCode.DATA, hint=hint)


def evaluate(
    settings: EvalSettings, trained: Trained, untuned: Trained | None, data: RowFile, template: Template | None
) -> Result:
    """Load, score the rows, then score them by the untuned base: the same weights with the adapter switched off."""
    device = pick_device(settings.device)
    console.info(f"{trained.name}: {count(len(data.rows))} of {data.source}")
    loaded = load_trained(trained, device)
    encoder = Encoder(loaded.tokenizer, template)
    task = make_task(data, encoder, loaded.card, own_stop_ids(loaded.model), loaded.context)
    say_what_is_left_out(task)
    tuned = score(loaded.model, task, settings, "tuned" if untuned else "rows")
    if untuned is None:
        return Result(task, tuned, None, {})
    if trained.adapter is not None:
        with without_adapter(loaded.model) as model:
            base = score(model, task, settings, "base")
    else:
        dtype = trained.card.dtype if trained.card else "auto"
        del loaded
        gc.collect()  # two whole models need not fit into memory at once
        base = score(load_trained(untuned, device, dtype=dtype).model, task, settings, "base")
    comparisons = {metric: compare(base, tuned, metric, seed=settings.seed) for metric in metrics_of(tuned)}
    return Result(task, tuned, base, comparisons)


def say_what_is_left_out(task: Task) -> None:
    """Rows and scores that the table does not hold."""
    if task.left_out:
        of = f"{task.left_out:,} of {len(task.data.rows):,} rows"
        console.warn(f"{of} left out: longer than the model's context of {task.context} tokens")
    if task.generates and not rouge_can_read(task.references):
        console.info("ROUGE left out: it reads Latin letters only, the references have none")


def score(model: Any, task: Task, settings: EvalSettings, who: str) -> list[RowScore]:
    """Every row of the task: its likelihood, its answer, the answer's scores."""
    rows = score_likelihoods(model, task)
    if not task.generates:
        return rows
    if not (can_pad := honours_padding(model, task.prompts)):
        console.warn("this architecture does not honour padding: only prompts of equal length are generated together")
    generated: dict[int, Answer] = {}
    with console.Progress(f"answers ({who})", len(task.prompts)) as progress:
        for items, batch in answers(model, task, batch=settings.batch, max_new=settings.max_new, can_pad=can_pad):
            generated |= zip(items, batch, strict=True)
            progress.advance(len(items))
    return score_answers(rows, task, [generated[item] for item in range(len(rows))])


def write_predictions(settings: EvalSettings, result: Result) -> None:
    """One row of JSONL for each row of the data, in its order; a few samples instead where a person looks at stdout."""
    if settings.output is None and settings.json:
        return
    if settings.output is None and console.is_terminal(sys.stdout):
        show_samples(result)
        return
    scored = dict(zip(result.task.places, range(len(result.tuned)), strict=True))
    with rows_output(settings.output, force=settings.force) as write:
        for place in range(len(result.task.data.rows)):
            write(prediction_row(result, place, scored.get(place)))


def prediction_row(result: Result, place: int, item: int | None) -> dict[str, Any]:
    """What is known of one row of the data; `item` is its number in the task, None if it was left out."""
    row = result.task.data.rows[place]
    shown: dict[str, Any] = {key: row[key] for key in ("prompt", "text") if key in row}
    shown |= {"messages": row["messages"][:-1]} if "messages" in row else {}
    if item is None:
        return shown | {"left_out": f"longer than {result.task.context} tokens"}
    if result.task.generates:
        shown["reference"] = result.task.references[item]
    shown |= model_part(result.tuned[item], "")
    return shown | (model_part(result.base[item], "base_") if result.base else {})


def model_part(row: RowScore, prefix: str) -> dict[str, Any]:
    """What one model made of a row."""
    answer = {} if row.prediction is None else {f"{prefix}prediction": row.prediction, f"{prefix}finish": row.finish}
    scores = {"loss": row.likelihood.nats / row.likelihood.tokens, "tokens": row.likelihood.tokens, **row.scores}
    return {**answer, f"{prefix}scores": scores}


def show_samples(result: Result) -> None:
    """The first rows with reference and answers below each other, on stdout, for a person."""
    task = result.task
    for item in range(min(SAMPLES, len(task.references))):
        row = task.data.rows[task.places[item]]
        parts = {"prompt": asked_text(row, task.template) or row["prompt"], "reference": task.references[item]}
        if result.base:
            parts["base"] = result.base[item].prediction or ""
        parts["tuned" if result.base else "answer"] = result.tuned[item].prediction or ""
        console.write_line(f"\n--- {task.data.places[task.places[item]]}", sys.stdout)
        for name, text in parts.items():
            console.write_line(f"{name:<11}" + text.strip().replace("\n", "\n" + " " * 11), sys.stdout)


def show_scores(settings: EvalSettings, trained: Trained, result: Result) -> None:
    """The table of scores on stderr, and what it says in a sentence."""
    metrics = metrics_of(result.tuned)
    title = f"{count(len(result.tuned))}, {sum(row.likelihood.tokens for row in result.tuned):,} answer tokens"
    if result.base is None:
        console.table(title, ["", "score"], [[label(m), number(m, total(result.tuned, m))] for m in metrics])
        return
    columns = ["", "base", "tuned", "difference", "95 % interval", "rows won/lost/tied"]
    console.table(title, columns, [comparison_line(result, metric) for metric in metrics])
    if len(result.tuned) < FEW_ROWS:
        console.info(f"intervals from {count(len(result.tuned))} only are rough")
    verdicts = {metric: result.comparisons[metric].verdict for metric in metrics}
    for verdict, words in VERDICTS.items():
        named = [label(metric) for metric in metrics if verdicts[metric] == verdict]
        if named:
            console.info(f"{words}: {', '.join(named)}")


def comparison_line(result: Result, metric: str) -> list[str]:
    """One metric of the table: base, tuned, their difference, its interval, rows."""
    found = result.comparisons[metric]
    low, high = number(metric, found.interval.low, sign=True), number(metric, found.interval.high, sign=True)
    return [
        label(metric),
        number(metric, total(result.base or [], metric)),
        number(metric, total(result.tuned, metric)),
        number(metric, found.interval.difference, sign=True),
        f"{low} to {high}",
        f"{found.won}/{found.lost}/{found.tied}",
    ]


def count(rows: int) -> str:
    """So many rows, in words."""
    return f"{rows:,} row{'' if rows == 1 else 's'}"


def label(metric: str) -> str:
    """The name of a metric in words."""
    return "field " + metric.removeprefix(FIELD) if metric.startswith(FIELD) else LABELS.get(metric, metric)


def number(metric: str, value: float, *, sign: bool = False) -> str:
    """A score with as many digits as say something."""
    return f"{value:{'+' if sign else ''},.{2 if metric == 'perplexity' else 4 if metric == 'loss' else 3}f}"


def summary(settings: EvalSettings, trained: Trained, result: Result) -> dict[str, Any]:
    """All scores as one object."""
    metrics = metrics_of(result.tuned)
    return {
        "schema": SCHEMA,
        "model": trained.name,
        "base": trained.card.base if trained.card else trained.base.name,
        "data": result.task.data.source,
        "template": result.task.template.fingerprint if result.task.template else None,
        "rows": len(result.task.data.rows),
        "left_out": len(result.task.data.rows) - len(result.tuned),
        "tokens": sum(row.likelihood.tokens for row in result.tuned),
        "max_new": settings.max_new,
        "seed": settings.seed,
        "scores": {metric: total(result.tuned, metric) for metric in metrics},
        "baseline": {metric: total(result.base, metric) for metric in metrics} if result.base else None,
        "difference": {metric: comparison_facts(found) for metric, found in result.comparisons.items()} or None,
    }


def comparison_facts(found: Comparison) -> Mapping[str, Any]:
    """A comparison as JSON holds it."""
    interval = found.interval
    return {
        "value": interval.difference,
        "low": interval.low,
        "high": interval.high,
        "won": found.won,
        "lost": found.lost,
        "tied": found.tied,
        "verdict": found.verdict,
    }
