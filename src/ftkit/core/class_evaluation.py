"""Rows of classes for a model with a head for them: what it is fed, and what it says."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ftkit.core.batching import AUTO_TOKENS, make_batch
from ftkit.core.classes import class_logits
from ftkit.core.encoding import Encoder, Example
from ftkit.core.evaluation import Task, with_label
from ftkit.core.examples import checked_example
from ftkit.core.likelihood import Likelihood
from ftkit.core.out_of_memory import in_halves
from ftkit.core.scoring import RowScore
from ftkit.io.row_file import RowFile


def class_task(data: RowFile, encoder: Encoder, context: int | None) -> Task:
    """Texts, cut to `context` tokens, and their labels; one that training did not have is a data error at its place."""
    examples = []
    for row, place in zip(data.rows, data.places, strict=True):
        number = checked_example(encoder, row, place).ids[-1]
        examples.append(as_example(encoder.class_ids(row["text"], context), number))
    labels = [encoder.classes[example.ids[-1]] for example in examples]
    return Task(
        data=data,
        encoder=encoder,
        places=list(range(len(examples))),
        rows=data.rows,
        examples=examples,
        texts=labels,
        prompts=[],
        references=labels,
        fields=[],
        stop_ids=[],
        stop_strings=(),
        context=context,
        classes=list(encoder.classes),
    )


def as_example(ids: list[int], number: int = 0) -> Example:
    """A text as a head for classes is given it, with the number of its class where that is known."""
    return Example([*ids, number], [False] * len(ids) + [True])


def score_classes(model: Any, task: Task) -> list[RowScore]:
    """Each row's likelihood of its label, in nats, and the likeliest label."""
    logs = log_probabilities(model, task.examples)
    rows = []
    for example, truth, found in zip(task.examples, task.references, logs, strict=True):
        row = RowScore(Likelihood(-float(found[example.ids[-1]]), 1), len(truth.encode()))
        rows.append(with_label(row, task.classes[int(found.argmax())], truth, task.classes))
    return rows


@torch.no_grad()
def log_probabilities(model: Any, examples: Sequence[Example]) -> list[torch.Tensor]:
    """log p of each class (C,), float32 on the CPU, for each example in their order; longest ones first through the model."""
    device = str(model.get_input_embeddings().weight.device.type)
    order = sorted(range(len(examples)), key=lambda item: -len(examples[item].ids))
    batches: list[list[int]] = []
    for item in order:
        longest = len(examples[batches[-1][0]].ids) if batches else 0
        if not batches or (len(batches[-1]) + 1) * longest > AUTO_TOKENS:
            batches.append([])
        batches[-1].append(item)
    found: dict[int, torch.Tensor] = {}

    def work(items: list[int]) -> torch.Tensor:
        return class_logits(model, make_batch([examples[item] for item in items]).to(device))

    for batch in batches:
        for items, logits in in_halves(work, batch):
            found |= dict(zip(items, F.log_softmax(logits.float(), dim=-1).cpu(), strict=True))
    return [found[item] for item in range(len(examples))]
