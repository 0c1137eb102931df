"""Examples -> micro-batches, packed or padded, in an order that only the seed decides."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ftkit.core.batch_sizes import AUTO_TOKENS as AUTO_TOKENS
from ftkit.core.batch_sizes import auto_micro_batch as auto_micro_batch
from ftkit.core.batch_sizes import auto_micro_tokens as auto_micro_tokens
from ftkit.core.batch_sizes import steps_per_epoch as steps_per_epoch
from ftkit.core.encoding import Example
from ftkit.core.packing import Pack, make_packs
from ftkit.core.tree_attention import Layout, make_layout
from ftkit.core.varlen_attention import moved_to

PAD_ID = 0
"""Any id will do: rows are padded on the right, causal attention never looks there, pads are never counted."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    input_ids: int64 (B, T), right-padded, each row without its last token, which predicts nothing.
    counted: int64 (N,), positions in the flattened input_ids whose next token is trained.
    labels: int64 (N,), those next tokens.
    tokens: tokens in the rows: pads left out, shared ones as often as they occur.
    lengths: positions of each row, pads left out; in a pack of each segment, which is a row where nothing is shared.

    A packed one is a single sequence, input_ids (1, T), with all rows in it:
    position_ids: int64 (1, T), where each token stands in its row. layout: which tokens may look at which.

    Where rows have weights, weights: float32 (N,), of each counted token. weight_sum: their sum, known without the device.
    """

    input_ids: Tensor
    counted: Tensor
    labels: Tensor
    tokens: int
    position_ids: Tensor | None = None
    layout: Layout | None = None
    weights: Tensor | None = None
    weight_sum: float = 0.0
    lengths: tuple[int, ...] = ()

    @property
    def divisor(self) -> float:
        """What the summed loss is divided by for its mean: the weights of the counted tokens, or their number."""
        return self.counted.numel() if self.weights is None else self.weight_sum

    @property
    def packing(self) -> dict[str, Any]:
        """What the model must be told of a packed batch; nothing of a padded one."""
        return {} if self.layout is None else {"position_ids": self.position_ids, "layout": self.layout}

    def to(self, device: str) -> "Batch":
        """The same batch on a device; copies do not wait for the GPU."""
        layout = self.layout and self.layout.on(device)
        if self.input_ids.device.type == device:
            return self if layout is self.layout else replace(self, layout=layout)
        names = ("input_ids", "counted", "labels", "position_ids", "weights")
        tensors = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        moved: dict[str, Any] = {name: moved_to(tensor, device) for name, tensor in tensors.items()}
        return replace(self, layout=layout, **moved)


def make_batch(examples: Sequence[Example]) -> Batch:
    """Pad examples to one micro-batch."""
    longest = max(len(example.ids) for example in examples) - 1
    input_ids = torch.full((len(examples), longest), PAD_ID, dtype=torch.int64)
    counted: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    for row, example in enumerate(examples):
        input_ids[row, : len(example.ids) - 1] = torch.tensor(example.ids[:-1], dtype=torch.int64)
        for place in range(1, len(example.ids)):
            if example.counted[place]:
                counted.append(row * longest + place - 1)
                labels.append(example.ids[place])
                weights.append(example.weight)
    return Batch(
        input_ids,
        torch.tensor(counted, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        sum(len(e.ids) for e in examples),
        lengths=tuple(len(e.ids) - 1 for e in examples),
        **as_weights(weights),
    )


def as_weights(weights: Sequence[float]) -> dict[str, Any]:
    """The weights of counted tokens as a batch holds them; nothing where all are 1."""
    if all(weight == 1 for weight in weights):
        return {}
    return {"weights": torch.tensor(weights, dtype=torch.float32), "weight_sum": math.fsum(weights)}


def micro_batches(examples: Sequence[Example], rows: int) -> list[Batch]:
    """A global batch cut into micro-batches of `rows`, longest rows first.

    So there is little padding, and a lack of memory shows at once.
    """
    ordered = sorted(examples, key=lambda example: -len(example.ids))
    return [make_batch(ordered[at : at + rows]) for at in range(0, len(ordered), rows)]


def packed_batches(examples: Sequence[Example], micro_tokens: int, *, share: bool) -> list[Batch]:
    """A global batch in packs of at most `micro_tokens` tokens; a longer row is a pack of its own."""
    return [pack_to_batch(pack) for pack in make_packs(examples, micro_tokens, share=share)]


def pack_to_batch(pack: Pack) -> Batch:
    """A pack as tensors."""
    return Batch(
        torch.tensor([pack.ids], dtype=torch.int64),
        torch.tensor(pack.counted, dtype=torch.int64),
        torch.tensor(pack.labels, dtype=torch.int64),
        pack.tokens,
        torch.tensor([pack.positions], dtype=torch.int64),
        make_layout(pack.segments),
        lengths=tuple(segment.length for segment in pack.segments),
        **as_weights(pack.weights),
    )


def global_batches(
    examples: Sequence[Example], batch: int, seed: int, done: int = 0
) -> Iterator[tuple[int, list[Example]]]:
    """(epoch from 0, examples of one optimizer step) without end, from the step after the first `done`.

    Each epoch is shuffled anew; its last batch may be smaller.
    """
    epoch, skipped = divmod(done, steps_per_epoch(len(examples), batch))
    while True:
        order = list(range(len(examples)))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        for at in range(skipped * batch, len(order), batch):
            yield epoch, [examples[i] for i in order[at : at + batch]]
        epoch, skipped = epoch + 1, 0
