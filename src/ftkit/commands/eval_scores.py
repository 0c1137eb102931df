"""Models on the same rows: loaded one after another, scored, compared."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftkit import __version__, console
from ftkit.commands.eval_forgetting import GeneralText, forgetting_of_adapter, forgetting_of_two, remember
from ftkit.commands.eval_gates import check_gates, read_gates
from ftkit.commands.eval_metrics import Plan, expected_metrics
from ftkit.commands.eval_subject import identity_of, settle_template
from ftkit.core.answering import how_together
from ftkit.core.bootstrap import Interval
from ftkit.core.class_evaluation import class_task, score_classes
from ftkit.core.comparison import Comparison, compare, spread
from ftkit.core.encoding import Encoder
from ftkit.core.eval_settings import EvalSettings
from ftkit.core.evaluation import (
    Task,
    generate,
    likeliest_labels,
    make_task,
    score_answers,
    score_likelihoods,
    with_label,
)  # fmt: skip
from ftkit.core.forgetting import Forgetting
from ftkit.core.generation import Answer, Sampling, own_stop_ids
from ftkit.core.packing_check import packing_fault
from ftkit.core.scoring import RowScore, merged, metrics_of
from ftkit.io.answer_cache import AnswerCache, key_of
from ftkit.io.row_file import RowFile
from ftkit.io.trained import Loaded, Trained, load_trained, without_adapter

TUNED, BASE = "tuned", "base"
OF_ONE_TOKENIZER = ("loss", "perplexity")
"""Scores per token, which say nothing between models that cut text into other tokens."""


@dataclass(frozen=True)
class Scored:
    """One model on the rows; `seeds` holds the rows of each seed, `rows` what they come to together."""

    name: str
    task: Task
    rows: list[RowScore]
    seeds: list[list[RowScore]]


@dataclass(frozen=True)
class Result:
    """The scores of a model and of those that it is compared with, the untuned base first.

    metrics: what is shown. comparisons: one for each rival, by metric.
    """

    subject: Scored
    rivals: list[Scored]
    metrics: list[str]
    intervals: dict[str, Interval]
    comparisons: list[dict[str, Comparison]]
    forgetting: Forgetting | None

    @property
    def base(self) -> Scored | None:
        """The untuned base, where it was asked for."""
        return next((rival for rival in self.rivals if rival.name == BASE), None)


@dataclass(frozen=True)
class Work:
    """What is the same for all models: the rows, what is done with them, where, and the answers that are known."""

    settings: EvalSettings
    data: RowFile
    plan: Plan
    device: str
    cache: AnswerCache

    def load(self, trained: Trained, *, dtype: str = "auto") -> Loaded:
        """A model on the device."""
        return load_trained(trained, self.device, dtype=dtype)

    def task(self, loaded: Loaded, trained: Trained) -> Task:
        """The rows as this model is asked them."""
        if loaded.classes:
            return class_task(self.data, Encoder(loaded.tokenizer, classes=loaded.classes), loaded.context)
        encoder = Encoder(loaded.tokenizer, settle_template(self.settings, self.data, trained))
        task = make_task(
            self.data,
            encoder,
            loaded.card,
            own_stop_ids(loaded.model),
            loaded.context,
            generates=self.plan.generates,
            as_classes=self.plan.as_classes,
        )
        if task.left_out:
            of = f"{task.left_out:,} of {len(self.data.rows):,} rows"
            console.warn(f"{of} left out: longer than the model's context of {task.context} tokens")
        return task


def evaluate(
    work: Work, trained: Trained, untuned: Trained | None, others: Sequence[Trained], general: GeneralText | None
) -> Result:
    """Score the rows by the model; by its base, which is the same weights with the adapter off; by the others.

    untuned: the base, where --baseline or --forgetting need it. At most one model is in memory at a time.
    """
    settings = work.settings
    loaded = work.load(trained)
    task = work.task(loaded, trained)
    expected = [*expected_metrics(work.plan, task), *(["forgetting"] if general else [])]
    check_gates(read_gates(settings.fail_under), expected)
    name = TUNED if settings.baseline else "rows"
    subject = score(work, loaded.model, task, identity_of(trained), TUNED if untuned else trained.name, name)
    rivals, forgetting = [], None
    if trained.adapter is not None:
        if settings.baseline:
            with without_adapter(loaded.model) as model:
                rivals.append(score(work, model, task, identity_of(replace(trained, adapter=None)), BASE, BASE))
        if general:
            forgetting = forgetting_of_adapter(general, loaded, settings.seeds[0])
    elif untuned is not None:
        dtype = trained.card.dtype if trained.card else "auto"
        after = remember(general, loaded) if general else None
        del loaded  # two whole models need not fit into memory at once
        loaded = load_next(work, untuned, dtype)
        if settings.baseline:
            rivals.append(score(work, loaded.model, task, identity_of(untuned), BASE, BASE))
        if general and after:
            forgetting = forgetting_of_two(general, remember(general, loaded), after, settings.seeds[0])
    del loaded
    for other in others:
        loaded = load_next(work, other, "auto")
        rivals.append(score(work, loaded.model, work.task(loaded, other), identity_of(other), other.name, other.name))
        del loaded
    return compared(settings, work.plan, subject, rivals, forgetting)


def load_next(work: Work, trained: Trained, dtype: str) -> Loaded:
    """A model, once the memory of the one before is free."""
    gc.collect()
    return work.load(trained, dtype=dtype)


def compared(
    settings: EvalSettings, plan: Plan, subject: Scored, rivals: list[Scored], forgetting: Forgetting | None
) -> Result:
    """The subject against each rival."""
    seed = settings.seeds[0]
    metrics = [metric for metric in metrics_of(subject.rows) if plan.shows(metric)]
    intervals = {metric: spread(subject.rows, metric, seed=seed) for metric in metrics}
    comparisons = [compare_all(subject, rival, metrics, seed) for rival in rivals]
    return Result(subject, rivals, metrics, intervals, comparisons, forgetting)


def compare_all(subject: Scored, rival: Scored, metrics: Sequence[str], seed: int) -> dict[str, Comparison]:
    """All metrics that two models can be compared in, over the rows that both could read."""
    ours, theirs = (dict(zip(scored.task.places, scored.rows, strict=True)) for scored in (subject, rival))
    both = [place for place in subject.task.places if place in theirs]
    rows, others = [ours[place] for place in both], [theirs[place] for place in both]
    if not both:
        return {}
    same = rival.task is subject.task or same_tokens(subject.task, rival.task)
    fit = [metric for metric in metrics if same or metric not in OF_ONE_TOKENIZER]
    if len(fit) < len(metrics):
        console.info(f"{rival.name} cuts text into other tokens: compare bits per byte, not loss")
    return {metric: compare(others, rows, metric, seed=seed) for metric in fit if any(r.parts(metric) for r in others)}


def same_tokens(one: Task, other: Task) -> bool:
    """True if two models read the same ids."""
    vocabularies = [task.encoder.tokenizer.get_vocab() for task in (one, other)]
    return bool(vocabularies[0] == vocabularies[1])


def score(work: Work, model: Any, task: Task, identity: Sequence[Any], name: str, doing: str) -> Scored:
    """Every row of the task: its likelihood, its label, its answers, their scores."""
    if task.encoder.classes:
        rows = score_classes(model, task)
        return Scored(name, task, rows, [rows])
    packed = packing_fault(model, task.examples, work.device, console.info) is None
    rows = score_likelihoods(model, task, packed=packed)
    facts = [__version__, *identity, str(model.dtype), work.device]
    if task.classes:
        rows = score_labels(work, model, task, rows, facts, doing, packed=packed)
    if not task.generates:
        return Scored(name, task, rows, [rows])
    seeds = [
        score_answers(rows, task, answers_of(work, model, task, sampling, facts, doing), work.plan.scoring)
        for sampling in samplings(work.settings, task)
    ]
    return Scored(name, task, [merged(same) for same in zip(*seeds, strict=True)], seeds)


def samplings(settings: EvalSettings, task: Task) -> list[Sampling]:
    """How answers are chosen, one way a seed; a label needs no more tokens than the longest one, and a stop token."""
    longest = max((sum(example.counted) for example in task.examples), default=0)
    most = min(settings.max_new, longest) if task.classes else settings.max_new
    return [Sampling(most, settings.temperature, seed) for seed in settings.seeds]


def score_labels(
    work: Work, model: Any, task: Task, rows: list[RowScore], facts: Sequence[Any], doing: str, *, packed: bool
) -> list[RowScore]:
    """The rows with their likeliest labels."""
    keys = [key_of("label", facts, example.ids, task.classes) for example in task.examples]
    missing = [item for item, key in enumerate(keys) if work.cache.get(key) not in task.classes]
    with console.Progress(f"labels ({doing})", len(missing)) as progress:
        for found in likeliest_labels(model, task, missing, packed=packed):
            work.cache.keep((keys[item], label) for item, label in found)
            progress.advance(len(found))
    truths = [reference.strip() for reference in task.references]
    labels = [str(work.cache.get(key)) for key in keys]
    return [
        with_label(row, *pair, task.classes) for row, pair in zip(rows, zip(labels, truths, strict=True), strict=True)
    ]


def answers_of(
    work: Work, model: Any, task: Task, sampling: Sampling, facts: Sequence[Any], doing: str
) -> list[Answer]:
    """The answers to all items, those that the cache knows from there; each batch is kept as soon as it is there."""
    how = (sampling.max_new, sampling.temperature, sampling.seed if sampling.temperature else None)
    ends = (task.stop_ids, task.stop_strings, task.context)
    keys = [key_of("answer", facts, prompt, how, ends) for prompt in task.prompts]
    missing = [item for item, key in enumerate(keys) if work.cache.get(key) is None]
    if known := len(keys) - len(missing):
        console.info(f"answers ({doing}): {known:,} of {len(keys):,} are in {work.settings.cache}")
    if missing:
        together = how_together(model, [task.prompts[item] for item in missing])
        if not together.can_pad:
            console.warn(
                "this architecture does not honour padding: only prompts of equal length are generated together"
            )
        if together.start:
            console.detail(f"all prompts begin with the same {together.start.length} tokens: computed once")
        with console.Progress(f"answers ({doing})", len(missing)) as progress:
            for items, batch in generate(model, task, missing, sampling, batch=work.settings.batch, together=together):
                found = [(answer.ids, answer.text, answer.finish) for answer in batch]
                work.cache.keep((keys[item], facts_) for item, facts_ in zip(items, found, strict=True))
                progress.advance(len(items))
    return [Answer(*work.cache.get(key)) for key in keys]
