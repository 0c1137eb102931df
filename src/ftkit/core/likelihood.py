"""How likely a model finds the answers that it should give: nats per row, in micro-batches that stay small."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ftkit.core.batching import AUTO_TOKENS, make_batch
from ftkit.core.encoding import Example
from ftkit.core.loss import counted_logits

LOGITS_BYTES = 2**28
"""Float32 logits of one micro-batch, unless a single row has more."""


@dataclass(frozen=True)
class Likelihood:
    """Of one row: the negative log likelihood of its counted tokens in nats, and how many they are."""

    nats: float
    tokens: int


@torch.no_grad()
def row_likelihoods(model: Any, examples: Sequence[Example], context: int | None, vocabulary: int) -> list[Likelihood]:
    """One for each example, in their order; an example longer than `context` tokens is read in windows."""
    device = model.get_input_embeddings().weight.device
    nats, tokens = [0.0] * len(examples), [0] * len(examples)
    pieces = [(row, piece) for row, example in enumerate(examples) for piece in windows(example, context)]
    for batch in small_batches(pieces, vocabulary):
        for (row, piece), value in zip(
            batch, batch_nats(model, [piece for _, piece in batch], device.type), strict=True
        ):
            nats[row] += value
            tokens[row] += sum(piece.counted[1:])
    return [Likelihood(*pair) for pair in zip(nats, tokens, strict=True)]


def batch_nats(model: Any, examples: Sequence[Example], device: str) -> list[float]:
    """Nats of the counted tokens of each example: -log p(token | tokens before it), summed in float64."""
    batch = make_batch(examples).to(device)
    logits = counted_logits(model, batch.input_ids, batch.counted)
    each = F.cross_entropy(logits.float(), batch.labels, reduction="none")  # (N,)
    rows = batch.counted.cpu() // batch.input_ids.shape[1]
    sums: list[float] = (
        torch.zeros(len(examples), dtype=torch.float64).index_add_(0, rows, each.double().cpu()).tolist()
    )
    return sums


def windows(example: Example, context: int | None) -> Iterator[Example]:
    """The example in pieces of at most `context` tokens; each begins with the last token of the piece before.

    So every token but the first is predicted exactly once.
    """
    length = len(example.ids)
    for at in range(0, max(1, length - 1), (context or length) - 1 or 1):
        end = at + (context or length)
        piece = Example(example.ids[at:end], [False, *example.counted[at + 1 : end]])
        if any(piece.counted):
            yield piece


def small_batches(pieces: list[tuple[int, Example]], vocabulary: int) -> Iterator[list[tuple[int, Example]]]:
    """Micro-batches, longest first: at most AUTO_TOKENS padded tokens and LOGITS_BYTES of logits, or a single piece."""
    batch: list[tuple[int, Example]] = []
    counted = 0
    for row, piece in sorted(pieces, key=lambda item: -len(item[1].ids)):
        more = sum(piece.counted)
        longest = len(batch[0][1].ids) if batch else 0
        too_long = (len(batch) + 1) * longest > AUTO_TOKENS
        if batch and (too_long or (counted + more) * vocabulary * 4 > LOGITS_BYTES):
            yield batch
            batch, counted = [], 0
        batch.append((row, piece))
        counted += more
    if batch:
        yield batch
