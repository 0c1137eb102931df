"""How likely a model finds the answers that it should give: nats per row, in micro-batches that stay small.

Legend: N counted tokens of a micro-batch, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftkit.core.batching import AUTO_TOKENS, Batch, make_batch, pack_to_batch
from ftkit.core.chunked_loss import causal_model, chunk_size, counted_hidden, logits_of_rows
from ftkit.core.encoding import Example
from ftkit.core.loss import behind_virtual, counted_logits
from ftkit.core.out_of_memory import in_halves
from ftkit.core.packed_attention import packed_attention
from ftkit.core.packing import make_pack, rows_of_packs

Piece = tuple[int, Example]
"""A window of a row, with the row's number."""


@dataclass(frozen=True)
class Likelihood:
    """Of one row: the negative log likelihood of its counted tokens in nats, and how many they are."""

    nats: float
    tokens: int


def row_likelihoods(
    model: Any, examples: Sequence[Example], context: int | None, *, packed: bool = False
) -> list[Likelihood]:
    """One for each example, in their order; an example longer than `context` tokens is read in windows.

    packed: rows one after another in a sequence, what they share from their start computed once. Only for models that
    `packing_fault` finds fit.
    """
    nats, tokens = [0.0] * len(examples), [0] * len(examples)
    pieces = [(row, piece) for row, example in enumerate(examples) for piece in windows(example, context)]
    with attention_for(model, packed=packed):
        for batch in micro_batches_of(pieces, packed=packed):
            for rows, values in in_halves(lambda part: batch_nats(model, part, packed=packed), batch):
                for (row, piece), value in zip(rows, values, strict=True):
                    nats[row] += value
                    tokens[row] += sum(piece.counted[1:])
    return [Likelihood(*pair) for pair in zip(nats, tokens, strict=True)]


def attention_for(model: Any, *, packed: bool) -> AbstractContextManager[Any]:
    """Inside, the model's attention understands the batches."""
    return packed_attention(model) if packed else nullcontext()


def batch_nats(model: Any, pieces: Sequence[Piece], *, packed: bool) -> list[float]:
    """Nats of the counted tokens of each piece: -log p(token | tokens before it), summed in float64."""
    batch = as_batch(pieces, packed=packed).to(device_of(model))
    return sums_by_piece(token_nats(model, batch), pieces)


def sums_by_piece(values: Tensor, pieces: Sequence[Piece]) -> list[float]:
    """The sum over each piece's counted tokens, which stand in `values` (N,) piece after piece."""
    counts = [sum(piece.counted[1:]) for _, piece in pieces]
    return [float(part.double().sum()) for part in torch.split(values.cpu(), counts)]


def as_batch(pieces: Sequence[Piece], *, packed: bool) -> Batch:
    """Pieces as one padded or packed micro-batch."""
    examples = [piece for _, piece in pieces]
    return pack_to_batch(make_pack(examples, share=True)) if packed else make_batch(examples)


def device_of(model: Any) -> str:
    """Where a model's inputs belong."""
    kind: str = model.get_input_embeddings().weight.device.type
    return kind


@torch.no_grad()
def token_nats(model: Any, batch: Batch) -> Tensor:
    """-log p of each counted token (N,), float32: the body once, then the output head in chunks."""
    size = chunk_size(model.get_output_embeddings().weight.shape[0])
    hidden = hidden_of(model, batch) if batch.counted.numel() > size else None
    if hidden is None:
        return nats_of(counted_logits(model, batch.input_ids, batch.counted, **batch.packing), batch.labels)
    parts = zip(torch.split(hidden, size), torch.split(batch.labels, size), strict=True)
    return torch.cat([nats_of(logits_of_rows(causal_model(model), rows), labels) for rows, labels in parts])


def hidden_of(model: Any, batch: Batch) -> Tensor | None:
    """Hidden states (N, D) of the body at the counted places; None for a model whose body cannot be watched."""
    first = batch.counted[:1]  # one position goes through the head: the body is what this pass is for
    counted = behind_virtual(model, batch.counted, batch.input_ids)
    return counted_hidden(model, counted, lambda: counted_logits(model, batch.input_ids, first, **batch.packing))


def nats_of(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of logits (n, V), in float32 -> (n,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


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


def micro_batches_of(pieces: Sequence[Piece], *, packed: bool) -> list[list[Piece]]:
    """All pieces in micro-batches of at most AUTO_TOKENS tokens (pads counted, shared ones once), or a single piece.

    In a pack the pieces stand in the order in which their tokens are counted.
    """
    if packed:
        row_of = {id(piece): row for row, piece in pieces}
        packs = rows_of_packs([piece for _, piece in pieces], AUTO_TOKENS, share=True)
        return [[(row_of[id(piece)], piece) for piece in pack] for pack in packs]
    batches: list[list[Piece]] = []
    for row, piece in sorted(pieces, key=lambda item: -len(item[1].ids)):
        longest = len(batches[-1][0][1].ids) if batches else 0
        if not batches or (len(batches[-1]) + 1) * longest > AUTO_TOKENS:
            batches.append([])
        batches[-1].append((row, piece))
    return batches
