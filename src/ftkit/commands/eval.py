"""`ftkit eval`: rows -> scores and answers, beside the untuned base and other runs where asked, on a page too."""

import sys
from pathlib import Path

import orjson

from ftkit import console
from ftkit.commands.eval_forgetting import read_general_text
from ftkit.commands.eval_gates import faults_of, read_gates, refuse
from ftkit.commands.eval_metrics import make_plan, plan_of_head
from ftkit.commands.eval_output import gate_scores, show_findings, show_scores, summary, write_predictions
from ftkit.commands.eval_report import write_report
from ftkit.commands.eval_runs import compare_runs
from ftkit.commands.eval_scores import Result, Work, evaluate
from ftkit.commands.eval_subject import (
    base_of,
    find_subject,
    open_rival,
    read_rows,
    refuse_base_of_head,
    require_fitting_head,
)
from ftkit.core.eval_settings import EvalSettings
from ftkit.io.answer_cache import AnswerCache
from ftkit.io.atomic import refuse_existing
from ftkit.io.devices import pick_device
from ftkit.io.trained import Trained


def run(settings: EvalSettings) -> None:
    """Find what to score and the rows, score, report, and fail where a gate says so."""
    prepare_outputs(settings)
    if settings.compare_runs:
        compare_runs(settings)
        return
    trained = find_subject(settings)
    result = score_rows(settings, trained)
    write_predictions(settings, result)
    show_scores(result)
    faults = failed_gates(settings, result)
    show_findings(result, faults)
    if settings.report:
        write_report(settings, trained, result, faults)
        console.info(f"report: {settings.report}")
    if settings.json:
        sys.stdout.buffer.write(orjson.dumps(summary(settings, trained, result, faults)) + b"\n")
        sys.stdout.buffer.flush()
    refuse(faults)


def prepare_outputs(settings: EvalSettings) -> None:
    """What cannot be written fails now rather than after the work."""
    read_gates(settings.fail_under)
    for path in filter(None, (settings.output, settings.report)):
        refuse_existing(Path(path), replace=settings.force)
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def score_rows(settings: EvalSettings, trained: Trained) -> Result:
    """Everything checked that can be checked without a model, then the scores of all models."""
    refuse_base_of_head(settings, trained)
    untuned = base_of(trained, "--baseline") if settings.baseline else None
    if untuned is None and settings.forgetting:
        untuned = base_of(trained, "--forgetting")
    others = [open_rival(name) for name in settings.against]
    data = read_rows(settings, trained)
    general = read_general_text(settings.forgetting) if settings.forgetting else None
    plan = plan_of_head(settings) if trained.classes else make_plan(settings, data)
    require_fitting_head(trained, others, data)
    work = Work(settings, data, plan, pick_device(settings.device), AnswerCache(settings.cache))
    console.info(f"{trained.name}: {len(data.rows):,} row{'' if len(data.rows) == 1 else 's'} of {data.source}")
    return evaluate(work, trained, untuned, others, general)


def failed_gates(settings: EvalSettings, result: Result) -> list[str]:
    """The gates that did not pass, in words."""
    faults = faults_of(read_gates(settings.fail_under), gate_scores(result))
    if settings.fail_if_worse:
        for rival, comparisons in zip(result.rivals, result.comparisons, strict=True):
            worse = [metric for metric, found in comparisons.items() if found.verdict == "worse"]
            faults += [f"clearly worse than {rival.name} in {', '.join(worse)}"] if worse else []
    return faults
