"""The training loop: it yields a result per optimizer step; logging, saving and drawing are outside."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ftkit.core.adapters import trainable_parameters
from ftkit.core.batching import Batch, global_batches, micro_batches, packed_batches
from ftkit.core.encoding import Example
from ftkit.core.optimizers import learning_rate, set_learning_rate
from ftkit.errors import ExitCode, UserError

Objective = Callable[[nn.Module, Batch], Tensor]
"""From model and micro-batch to the summed loss in nats over batch.counted."""


@dataclass(frozen=True)
class Plan:
    """What a run does, resolved: rows per optimizer step and per forward pass, steps, learning rate and its course.

    With `pack` a forward pass takes up to `micro_tokens` tokens in one sequence, where the model must be inside
    `packed_attention`; without, `micro_batch` padded rows. Which rows are in a step is the same for both.
    """

    batch: int
    micro_batch: int
    steps: int
    lr: float
    schedule: str
    warmup: float
    max_grad_norm: float
    seed: int
    pack: bool = False
    share_prefix: bool = False
    micro_tokens: int = 0

    def cut(self, rows: Sequence[Example]) -> list[Batch]:
        """The micro-batches of some rows: packs, or padded."""
        if self.pack:
            return packed_batches(rows, self.micro_tokens, share=self.share_prefix)
        return micro_batches(rows, self.micro_batch)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. loss: nats per counted token over the global batch. tokens: in its rows, pads left out."""

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    counted: int
    seconds: float


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    objective: Objective,
    scaler: torch.amp.GradScaler,
    max_norm: float,
) -> tuple[float, float]:
    """One optimizer update from the micro-batches of one global batch: (nats per counted token, gradient norm).

    The loss is divided once, by the counted tokens of the whole global batch, so that accumulation is exact for rows
    of any length. `scaler` keeps float16 gradients from vanishing; it does nothing for the other formats.
    """
    counted = sum(batch.counted.numel() for batch in batches)
    nats = torch.zeros((), device=batches[0].input_ids.device)
    for batch in batches:
        loss = objective(model, batch)  # () nats, summed
        scaler.scale(loss / counted).backward()  # type: ignore[no-untyped-call]
        nats += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = clip_grad_norm_(trainable_parameters(model), max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return float(nats) / counted, float(grad_norm)


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    objective: Objective,
    plan: Plan,
    device: str,
) -> Iterator[StepResult]:
    """Train for plan.steps optimizer steps, yielding after each. A loss that is no number stops with exit 7."""
    model.train()
    half = any(p.dtype == torch.float16 for p in model.parameters())
    scaler = torch.amp.GradScaler(device, enabled=half)
    order = global_batches(examples, plan.batch, plan.seed)
    for step in range(1, plan.steps + 1):
        started = time.perf_counter()
        epoch, rows = next(order)
        batches = [batch.to(device) for batch in plan.cut(rows)]
        rate = learning_rate(step, plan.steps, plan.lr, plan.schedule, plan.warmup)
        set_learning_rate(optimizer, rate)
        loss, norm = train_step(model, optimizer, batches, objective, scaler, plan.max_grad_norm)
        require_finite(loss, norm, step, half=half)
        tokens, counted = sum(b.tokens for b in batches), sum(b.counted.numel() for b in batches)
        yield StepResult(step, epoch, loss, rate, norm, tokens, counted, time.perf_counter() - started)


def require_finite(loss: float, norm: float, step: int, *, half: bool) -> None:
    """Exit 7 for a loss or gradient that is no number; float16's scaler skips steps with overflown gradients itself."""
    if not math.isfinite(loss) or not (half or math.isfinite(norm)):
        raise UserError(
            f"step {step}: the loss is {loss}, the gradient norm {norm}: training diverged",
            ExitCode.DIVERGED,
            hint="make --lr smaller, or look at the rows of this step",
        )
