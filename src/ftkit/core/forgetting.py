"""What training did to a model's general abilities: loss on general text before and after, and how far predictions moved.

Legend: N counted tokens of a micro-batch, n of a chunk, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftkit.core.batching import Batch
from ftkit.core.bootstrap import Interval, paired_interval
from ftkit.core.chunked_loss import causal_model, chunk_size, logits_of_rows
from ftkit.core.encoding import Example
from ftkit.core.likelihood import (
    Likelihood,
    Piece,
    as_batch,
    attention_for,
    device_of,
    hidden_of,
    micro_batches_of,
    sums_by_piece,
    windows,
)  # fmt: skip
from ftkit.core.loss import counted_logits
from ftkit.core.out_of_memory import in_halves

Made = TypeVar("Made")
TOO_MUCH = 0.1
"""Nats per token by which the loss on general text may rise before a warning: a perplexity a tenth higher."""
Switch = Callable[[], AbstractContextManager[Any]]
"""Opens a block in which the model is the untuned base."""


@dataclass(frozen=True)
class Forgetting:
    """Loss on general text in nats per token, before and after training; rise: after - before.

    divergence: KL(base || tuned), nats per token, averaged over the text; None where it was not computed.
    """

    source: str
    rows: int
    tokens: int
    before: float
    after: float
    rise: Interval
    divergence: float | None

    @property
    def is_too_much(self) -> bool:
        """True if the loss clearly rose, and by more than TOO_MUCH."""
        return self.rise.low > 0 and self.rise.value > TOO_MUCH


def measure_forgetting(
    source: str, before: Sequence[Likelihood], after: Sequence[Likelihood], divergence: float | None, *, seed: int
) -> Forgetting:
    """From the likelihoods of the same rows by the base and by the tuned model."""
    sides = [np.array([(row.nats, row.tokens) for row in side], dtype=np.float64).T for side in (before, after)]
    old, new = (float(nats.sum() / tokens.sum()) for nats, tokens in sides)
    rise = paired_interval(*sides, seed=seed)
    return Forgetting(source, len(before), int(sides[0][1].sum()), old, new, rise, divergence)


def mean_divergence(
    model: Any, base: Switch, examples: Sequence[Example], context: int | None, *, packed: bool
) -> float:
    """KL(base || tuned) of the next token, in nats, averaged over all counted places; both are one loaded model.

    KL(p || q) = sum p log(p / q) (Kullback and Leibler 1951, equation 2.4).
    """
    pieces = [(row, piece) for row, example in enumerate(examples) for piece in windows(example, context)]

    def work(part: list[Piece]) -> list[float]:
        batch = as_batch(part, packed=packed).to(device_of(model))
        return sums_by_piece(divergences(model, base, batch), part)

    total = sum(sum(sums) for _, sums in in_micro_batches(model, pieces, work, packed=packed))
    return total / sum(counted_places(piece) for _, piece in pieces)


def counted_places(piece: Example) -> int:
    """Tokens of a piece that are predicted."""
    return sum(piece.counted[1:])


@torch.no_grad()
def in_micro_batches(
    model: Any, pieces: list[Piece], work: Callable[[list[Piece]], Made], *, packed: bool
) -> Iterator[tuple[list[Piece], Made]]:
    """Pieces and what `work` makes of them, micro-batch by micro-batch, in halves where memory runs out."""
    with attention_for(model, packed=packed):
        for batch in micro_batches_of(pieces, packed=packed):
            yield from in_halves(work, batch)


def divergences(model: Any, base: Switch, batch: Batch) -> Tensor:
    """KL(base || tuned) at each counted place (N,), float32: two passes of the body, then the heads in chunks."""
    tuned = hidden_of(model, batch)
    with base():
        untuned = hidden_of(model, batch)
    if tuned is None or untuned is None:
        after = counted_logits(model, batch.input_ids, batch.counted, **batch.packing)
        with base():
            before = counted_logits(model, batch.input_ids, batch.counted, **batch.packing)
        return divergence_of(before, after)
    size = chunk_size(model.get_output_embeddings().weight.shape[0]) // 2 or 1  # two sets of logits at a time
    found = []
    for old, new in zip(torch.split(untuned, size), torch.split(tuned, size), strict=True):
        after = logits_of_rows(causal_model(model), new)
        with base():
            before = logits_of_rows(causal_model(model), old)
        found.append(divergence_of(before, after))
    return torch.cat(found)


def divergence_of(before: Tensor, after: Tensor) -> Tensor:
    """KL(p || q) of logits (n, V) each -> (n,)."""
    log_p, log_q = (F.log_softmax(logits.float(), dim=-1) for logits in (before, after))
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at each counted place of some text, without the model: its last hidden states and its head.

    hidden: by piece, (n, D) each on the CPU. head: the model, its body without weights.
    """

    hidden: dict[int, Tensor]
    head: Any


def keep_predictions(
    model: Any, examples: Sequence[Example], context: int | None, *, packed: bool
) -> Predictions | None:
    """The predictions, and then the end of the model: the weights of its body are freed.

    None where the body cannot be watched.
    """
    pieces = [piece for example in examples for piece in windows(example, context)]
    hidden: dict[int, Tensor] = {}

    def work(part: list[Piece]) -> Tensor | None:
        found = hidden_of(model, as_batch(part, packed=packed).to(device_of(model)))
        return None if found is None else found.cpu()

    for part, states in in_micro_batches(model, list(enumerate(pieces)), work, packed=packed):
        if states is None:
            return None
        split = torch.split(states, [counted_places(piece) for _, piece in part])
        hidden |= {number: rows for (number, _), rows in zip(part, split, strict=True)}
    causal = causal_model(model)
    kept = set(causal.get_output_embeddings().parameters())
    for parameter in causal.get_decoder().parameters():
        if parameter not in kept:
            parameter.data = parameter.data.new_empty(0)
    return Predictions(hidden, causal)


@torch.no_grad()
def divergence_of_two(base: Predictions, tuned: Predictions) -> float | None:
    """KL(base || tuned) in nats, averaged over all places; None where vocabularies differ, so that tokens do."""
    heads = [side.head.get_output_embeddings().weight for side in (base, tuned)]
    if heads[0].shape[0] != heads[1].shape[0]:
        return None
    size = chunk_size(heads[0].shape[0]) // 2 or 1
    total, places = 0.0, 0
    for number, states in base.hidden.items():
        for pair in zip(torch.split(states, size), torch.split(tuned.hidden[number], size), strict=True):
            logits = [
                logits_of_rows(side.head, rows.to(head.device))
                for side, rows, head in zip((base, tuned), pair, heads, strict=True)
            ]
            total += float(divergence_of(*logits).double().sum())
            places += len(pair[0])
    return total / places
