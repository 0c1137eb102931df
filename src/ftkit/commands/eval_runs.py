"""`ftkit eval --compare-runs runs/*`: one line for each run, what it was trained with beside what it scores."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from ftkit import console
from ftkit.commands.eval_metrics import make_plan, plan_of_head
from ftkit.commands.eval_output import number, totals_of
from ftkit.commands.eval_scores import Scored, Work, load_next, score
from ftkit.commands.eval_subject import identity_of, read_rows, require_fitting_head
from ftkit.core import page
from ftkit.core.bootstrap import Interval
from ftkit.core.comparison import spread
from ftkit.core.eval_settings import EvalSettings
from ftkit.core.scoring import label_of, metrics_of
from ftkit.errors import ExitCode, UserError
from ftkit.io.answer_cache import AnswerCache
from ftkit.io.atomic import atomic_file
from ftkit.io.devices import pick_device
from ftkit.io.jsonl import rows_output
from ftkit.io.quantization import quantization_of
from ftkit.io.row_file import RowFile
from ftkit.io.run_folder import COMPLETE, LATEST, RunFolder
from ftkit.io.trained import Trained, open_trained_run

SCHEMA = "ftkit.runs/1"
IN_TABLE = ("loss", "extracted_match", "accuracy", "json_equal", "field_accuracy", "bleu", "chrf", "f1", "exact_match")
"""The scores that fit beside the settings; all are in the output."""
MOST_SCORES = 5
BITS = {"nf4": 4, "nf4-dq": 4, "fp4": 4, "fp4-dq": 4, "int8": 8}
BITS_OF_DTYPE = {"bf16": 16, "fp16": 16, "fp32": 32}


@dataclass(frozen=True)
class RunScore:
    """A run, what it was trained with, and what it scores."""

    name: str
    facts: dict[str, Any]
    scored: Scored
    intervals: dict[str, Interval]


def compare_runs(settings: EvalSettings) -> None:
    """Score the runs one after another, on DATA or on what each held out; then the table, the rows, the page."""
    folders, data = split_arguments(settings.data)
    runs = complete_runs(folders)
    settings = replace(settings, data=[data] if data else [])
    trained = [open_trained_run(run) for run in runs]
    rows = [read_rows(settings, one) for one in (trained[:1] if data else trained)]
    warn_of_different_rows(rows)
    for one, data_ in zip(trained, rows if not data else rows * len(trained), strict=True):
        require_fitting_head(trained[0], [one], data_)
    cache = AnswerCache(settings.cache)
    found = []
    for number_, one in enumerate(trained):
        data_ = rows[0] if data else rows[number_]
        plan = plan_of_head(settings) if one.classes else make_plan(settings, data_)
        work = Work(settings, data_, plan, pick_device(settings.device), cache)
        found.append(score_run(work, one))
    show_table(found)
    write_results(settings, found)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """(run folders, the file of rows if one is named); `runs/latest` only points at a run that has a line already."""
    if not arguments:
        what = "--compare-runs needs run folders"
        raise UserError(what, ExitCode.USAGE, hint="ftkit eval --compare-runs runs/*")
    pointer = LATEST.name
    folders = [name for name in arguments if Path(name).is_dir()]
    files = [name for name in arguments if name not in folders and Path(name).name != pointer]
    if len(files) > 1:
        what = f"{files[0]} and {files[1]}: one file of rows at a time, the rest should be run folders"
        raise UserError(what, ExitCode.USAGE, hint="ftkit eval test.jsonl --compare-runs runs/*")
    return folders, files[0] if files else None


def complete_runs(folders: Sequence[str]) -> list[RunFolder]:
    """The runs that came to their end; the others are named."""
    runs = []
    for folder in dict.fromkeys(str(Path(name)) for name in folders):
        run = RunFolder(Path(folder))
        status = run.read_info().get("status")
        if status == COMPLETE:
            runs.append(run)
        else:
            console.warn(f"{folder} left out: the run is not complete (status: {status})")
    if not runs:
        raise UserError("no complete run among these", ExitCode.MODEL, hint="ftkit eval --compare-runs runs/*")
    return runs


def warn_of_different_rows(files: Sequence[RowFile]) -> None:
    """Scores of different rows are no comparison."""
    if len({sha256(orjson.dumps(file.rows)).digest() for file in files}) > 1:
        hint = "name the same rows for all: ftkit eval test.jsonl --compare-runs runs/*"
        console.warn(f"the runs held out different rows, so their scores are not of the same thing; {hint}")


def score_run(work: Work, trained: Trained) -> RunScore:
    """One run on its rows."""
    console.info(f"{trained.name}: {len(work.data.rows):,} rows of {work.data.source}")
    loaded = load_next(work, trained, "auto")
    task = work.task(loaded, trained)
    scored = score(work, loaded.model, task, identity_of(trained), trained.name, trained.name)
    metrics = [metric for metric in metrics_of(scored.rows) if work.plan.shows(metric)]
    seed = work.settings.seeds[0]
    assert trained.run is not None
    return RunScore(
        trained.name,
        run_facts(trained.run.read_info(), trained),
        scored,
        {metric: spread(scored.rows, metric, seed=seed) for metric in metrics},
    )


def run_facts(info: dict[str, Any], trained: Trained) -> dict[str, Any]:
    """What a run was trained with, from its run.json; what is not in there is None."""
    settings, card = info.get("settings", {}), trained.card
    has_adapter = trained.adapter is not None
    method = card.method if card else "lora"
    return {
        "base": info.get("model", {}).get("id"),
        "method": method,
        "r": settings.get("r") if has_adapter else None,
        "alpha": settings.get("alpha") if has_adapter else None,
        "targets": settings.get("targets") if has_adapter else None,
        "bits": BITS.get(quantization_of(method) or "") or BITS_OF_DTYPE.get(str(info.get("dtype"))),
        "lr": info.get("plan", {}).get("lr"),
        "rows": info.get("data", {}).get("rows"),
        "steps": info.get("steps"),
        "parameters": info.get("trainable"),
        "minutes": round(info["seconds"] / 60, 2) if isinstance(info.get("seconds"), (int, float)) else None,
    }


def table_of(found: Sequence[RunScore]) -> tuple[list[str], list[list[str]]]:
    """(columns, one line a run): settings that say something about the runs, then the scores that fit."""
    scores = scores_shown(found)
    columns = ["run", "r", "targets", "bits", "parameters", "minutes", *map(label_of, scores)]
    lines = []
    for run in found:
        facts = run.facts
        parameters = f"{facts['parameters']:,}" if isinstance(facts["parameters"], int) else "-"
        known = [facts["r"], facts["targets"] or "all weights", facts["bits"], parameters, facts["minutes"]]
        values = [number(metric, run.intervals[metric].value) if metric in run.intervals else "-" for metric in scores]
        lines.append([Path(run.name).name, *("-" if value is None else str(value) for value in known), *values])
    return columns, lines


def scores_shown(found: Sequence[RunScore]) -> list[str]:
    """The scores of the table: known ones in their order, then those of the user's own."""
    metrics = list(dict.fromkeys(metric for run in found for metric in run.intervals))
    first = [metric for metric in IN_TABLE if metric in metrics]
    return first[:MOST_SCORES] or metrics[:MOST_SCORES]


def show_table(found: Sequence[RunScore]) -> None:
    """The table on stderr."""
    columns, lines = table_of(found)
    console.table("", columns, lines)


def write_results(settings: EvalSettings, found: Sequence[RunScore]) -> None:
    """One object a run on stdout or in a file, or one with all of them; the page where it was asked for."""
    rows = [
        {
            "run": run.name,
            **run.facts,
            "data": run.scored.task.data.source,
            "scored_rows": len(run.scored.rows),
            "scores": totals_of(run.scored.rows, list(run.intervals)),
            "intervals": {metric: [interval.low, interval.high] for metric, interval in run.intervals.items()},
        }
        for run in found
    ]
    if settings.report:
        with atomic_file(Path(settings.report)) as file:
            file.write(runs_page(settings, found))
        console.info(f"report: {settings.report}")
    if settings.json:
        sys.stdout.buffer.write(orjson.dumps({"schema": SCHEMA, "runs": rows}) + b"\n")
    if settings.output or not (settings.json or console.is_terminal(sys.stdout)):
        with rows_output(settings.output, force=settings.force) as write:
            for row in rows:
                write(row)


def runs_page(settings: EvalSettings, found: Sequence[RunScore]) -> str:
    """The table, and every score of the runs on a common scale."""
    columns, lines = table_of(found)
    charts = []
    for metric in dict.fromkeys(metric for run in found for metric in run.intervals):
        having = [run for run in found if metric in run.intervals]
        names = [Path(run.name).name for run in having]
        intervals = [run.intervals[metric] for run in having]
        ends = [(interval.low, interval.high) for interval in intervals]
        charts.append(page.bars(names, [interval.value for interval in intervals], ends, label_of(metric)))
    files = [run.scored.task.data for run in found]
    rows = ", ".join(dict.fromkeys(f"{len(file.rows):,} rows of {file.source}" for file in files))
    if all(file.rows == files[0].rows for file in files):
        rows = f"{len(files[0].rows):,} rows, the same for all: {files[0].source}"
    given = [run.name for run in found] + list(settings.data)
    return page.page(
        f"{len(found)} runs",
        rows,
        page.section("Settings and scores", page.table(columns, lines)),
        page.section("With 95 % intervals", *charts),
        page.section("How to repeat it", page.tag("pre", shlex.join(["ftkit", "eval", "--compare-runs", *given]))),
    )
