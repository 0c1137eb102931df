"""What a run minimises, from its settings: the loss on counted tokens, smoothed or with noise where asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkit.core.batching import Batch
from ftkit.core.classes import class_loss
from ftkit.core.loss import summed_loss
from ftkit.core.train_settings import TrainSettings
from ftkit.core.training import Objective


def training_objective(settings: TrainSettings) -> Objective:
    """The objective of the steps; held-out rows are measured without noise, smoothing and weights."""
    loss = class_loss if settings.objective == "classify" else summed_loss
    objective: Objective = partial(loss, smoothing=settings.label_smoothing)
    return partial(noisy_loss, objective, settings.neftune) if settings.neftune else objective


def noisy_loss(objective: Objective, alpha: float, model: nn.Module, batch: Batch) -> Tensor:
    """The loss with noise on the embeddings: NEFTune, arXiv:2310.05914, algorithm 1."""
    with noisy_embeddings(model, batch, alpha):
        return objective(model, batch)


@contextmanager
def noisy_embeddings(model: Any, batch: Batch, alpha: float) -> Iterator[None]:
    """While open, input embeddings X (B, T, D) become X + alpha / sqrt(L D) * E, E uniform in [-1, 1).

    L is the length of a token's own row, also in a pack; the noise comes from torch's generator of the device.
    """

    def add_noise(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        noise = torch.rand(embedded.shape, device=embedded.device) * 2 - 1
        lengths = row_lengths(batch, embedded.shape[1]).to(embedded.device)
        scales = alpha / (lengths * embedded.shape[-1]).sqrt()
        return embedded + (noise * scales).to(embedded.dtype)

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


def row_lengths(batch: Batch, count: int) -> Tensor:
    """Length of the row of each position, float32: (B, 1, 1) of a padded batch, (1, T, 1) of a pack of `count` positions."""
    lengths = torch.tensor(batch.lengths, dtype=torch.float32)
    if batch.layout is None:
        return lengths.view(-1, 1, 1)
    of_positions = lengths.repeat_interleave(torch.tensor(batch.lengths))
    return F.pad(of_positions, (0, count - len(of_positions)), value=1.0).view(1, -1, 1)
