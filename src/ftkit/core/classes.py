"""Rows of classes: the loss of a head for them, what it tells, and how often that is right.

Legend: N rows, T tokens of the longest one, C classes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ftkit.core.batching import Batch
from ftkit.core.chunked_loss import Targets
from ftkit.core.labels import label_counts, macro_f1


def class_names(labels: Iterable[str | int]) -> tuple[str, ...]:
    """The different labels as text: numbers by size, texts by the alphabet."""
    distinct = set(labels)
    if all(isinstance(label, int) for label in distinct):
        return tuple(map(str, sorted(distinct)))
    return tuple(sorted({str(label) for label in distinct}))


def balanced_weights(classes: Sequence[int]) -> list[float]:
    """For each row N / (C * rows of its class), so that every class weighs the same (scikit-learn's "balanced")."""
    counts = Counter(classes)
    return [len(classes) / (len(counts) * counts[number]) for number in classes]


def class_loss(model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
    """Sum over rows of -log p(class), () in nats; each times its weight. smoothing: as `Targets`."""
    return Targets(batch.labels, batch.weights, smoothing).nats(class_logits(model, batch))


def class_logits(model: Any, batch: Batch) -> Tensor:
    """Logits (N, C) of padded rows, in float32 at least.

    A row of classes is its text and then its class as one more id, which is never fed: so the one counted position of a
    row is its last token, and what lies behind it are pads.
    """
    rows, width = batch.input_ids.shape
    last = (batch.counted % width).unsqueeze(1)  # (N, 1)
    is_text = torch.arange(width, device=batch.input_ids.device).expand(rows, width) <= last
    ids = batch.input_ids.masked_fill(~is_text, model.config.get_text_config().pad_token_id)
    logits: Tensor = model(input_ids=ids, attention_mask=is_text.long()).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def measure_classes(
    model: nn.Module, batches: Iterable[Batch], device: str, names: Sequence[str]
) -> tuple[float, int, dict[str, float]]:
    """(nats per row, rows, accuracy and macro-F1), in evaluation mode; the mode is set back afterwards."""
    was_training = model.training
    model.eval()
    nats, truths, told = 0.0, [], []
    try:
        for batch in batches:
            here = batch.to(device)
            logits = class_logits(model, here)
            nats += float(Targets(here.labels).nats(logits))
            truths += here.labels.tolist()
            told += logits.argmax(-1).tolist()
    finally:
        model.train(was_training)
    return nats / len(truths), len(truths), class_scores(truths, told, names)


def class_scores(truths: Sequence[int], told: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """Accuracy and macro-F1 of classes by their numbers."""
    pairs = list(zip(truths, told, strict=True))
    counts = np.array([label_counts(names[truth], names[other], names) for truth, other in pairs]).sum(axis=0)
    right = sum(truth == other for truth, other in pairs)
    return {"accuracy": right / len(pairs), "macro_f1": float(macro_f1(counts[:, None])[0])}
