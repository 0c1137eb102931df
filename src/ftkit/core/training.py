"""The training loop: it yields a result per optimizer step; logging, saving and drawing are outside."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ftkit import faults
from ftkit.core.adapters import trainable_parameters
from ftkit.core.batching import Batch, global_batches
from ftkit.core.encoding import Example
from ftkit.core.optimizers import learning_rate, set_learning_rate
from ftkit.core.plan import Plan, within_memory
from ftkit.core.random_state import restore_torch, torch_state
from ftkit.errors import ExitCode, UserError

Objective = Callable[[nn.Module, Batch], Tensor]
"""From model and micro-batch to the summed loss in nats over batch.counted, each token times its weight."""


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


MOST_SKIPPED = 30
"""Steps in a row that float16's scaler may skip: it begins at 2^16 and halves each time, so it has found its scale by then."""


@dataclass
class Training:
    """What goes from step to step beside the model, and into a checkpoint.

    step: optimizer steps that are done. plan: as asked for, or with smaller micro-batches where memory ran out.
    """

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plan: Plan
    step: int = 0


def begin_training(model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan) -> Training:
    """Before the first step. The scaler keeps float16 gradients from vanishing; for other formats it does nothing."""
    half = any(p.dtype == torch.float16 for p in model.parameters())
    device = next(model.parameters()).device.type
    return Training(optimizer, torch.amp.GradScaler(device, enabled=half), plan)


def train_steps(
    model: nn.Module, training: Training, examples: Sequence[Example], objective: Objective, device: str
) -> Iterator[StepResult]:
    """Train to the plan's last step, yielding after each. A loss that is no number stops with exit 7.

    Where memory runs out, the global batch goes on in smaller micro-batches: `training.plan` holds them.
    """
    model.train()
    plan = training.plan
    order = global_batches(examples, plan.batch, plan.seed, training.step)
    skipped = 0
    ahead = cut_ahead(order, training)
    while training.step < plan.steps:
        started = time.perf_counter()
        step = training.step + 1
        epoch, rows, ready = next(ahead)
        rate = learning_rate(step, plan.steps, plan.lr, plan.schedule, plan.warmup)
        set_learning_rate(training.optimizer, rate)
        batches, nats = accumulate_within_memory(model, training, rows, ready, objective, device)
        counted, divisor = (
            sum(sizes) for sizes in zip(*((b.counted.numel(), b.divisor) for b in batches), strict=True)
        )
        norm = update(model, training.optimizer, training.scaler, plan.max_grad_norm)
        loss = float(nats) / divisor
        skipped = 0 if math.isfinite(norm) else skipped + 1
        require_finite(loss, norm, step, half=training.scaler.is_enabled() and skipped <= MOST_SKIPPED)
        training.step = step
        tokens = sum(batch.tokens for batch in batches)
        yield StepResult(step, epoch, loss, rate, norm, tokens, counted, time.perf_counter() - started)


def cut_ahead(
    order: Iterator[tuple[int, list[Example]]], training: Training
) -> Iterator[tuple[int, list[Example], list[Batch] | None]]:
    """(epoch, rows, their micro-batches) of the steps, without end: those of a step are made while the one before it runs.

    None in their place, where memory ran out meanwhile and the plan is another.
    """

    def make() -> tuple[int, list[Example], Plan, list[Batch]]:
        (epoch, rows), plan = next(order), training.plan
        return epoch, rows, plan, plan.cut(rows)

    with ThreadPoolExecutor(1, "batches") as thread:
        waiting = thread.submit(make)
        while True:
            epoch, rows, plan, batches = waiting.result()
            waiting = thread.submit(make)
            yield epoch, rows, batches if plan == training.plan else None


def accumulate_within_memory(
    model: nn.Module,
    training: Training,
    rows: Sequence[Example],
    ready: list[Batch] | None,
    objective: Objective,
    device: str,
) -> tuple[list[Batch], Tensor]:
    """(micro-batches, summed nats) of one global batch; what did not fit is begun again in smaller micro-batches.

    ready: the micro-batches, if they are made.
    """

    drawn = torch_state()

    def work(batches: list[Batch]) -> tuple[list[Batch], Tensor]:
        restore_torch(drawn)  # a try that failed has drawn dropout masks
        training.optimizer.zero_grad(set_to_none=True)
        batches = [batch.to(device) for batch in batches]
        return batches, accumulate(model, batches, objective, training.scaler)

    try:
        done, training.plan = within_memory(training.plan, rows, work, ready)
    except UserError:  # not even one row fits: the step is left as if it had not begun
        restore_torch(drawn)
        raise
    return done


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    objective: Objective,
    scaler: torch.amp.GradScaler,
    max_norm: float,
) -> tuple[float, float]:
    """One optimizer update from the micro-batches of one global batch: (nats per counted token, gradient norm)."""
    nats = accumulate(model, batches, objective, scaler)
    norm = update(model, optimizer, scaler, max_norm)
    return float(nats) / sum(batch.divisor for batch in batches), norm


def accumulate(
    model: nn.Module, batches: Sequence[Batch], objective: Objective, scaler: torch.amp.GradScaler
) -> Tensor:
    """Gradients of one global batch; returns its loss, () summed nats.

    The loss is divided once, by the counted tokens of the whole global batch (by their weights, where rows have some),
    so that accumulation is exact for rows of any length.
    """
    divisor = sum(batch.divisor for batch in batches)
    nats = torch.zeros((), device=batches[0].input_ids.device)
    for batch in batches:
        faults.point("pass")
        loss = objective(model, batch)  # () nats, summed
        scaler.scale(loss / divisor).backward()  # type: ignore[no-untyped-call]
        nats += loss.detach()
    return nats * math.nan if faults.point("loss") else nats


def update(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_norm: float) -> float:
    """One optimizer step from the accumulated gradients, which are cleared; returns their norm before clipping."""
    scaler.unscale_(optimizer)
    norm = clip_grad_norm_(trainable_parameters(model), max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return math.nan if faults.point("gradient") else float(norm)


def require_finite(loss: float, norm: float, step: int, *, half: bool) -> None:
    """Exit 7 for a loss or gradient that is no number; float16's scaler skips steps with overflown gradients itself."""
    if not math.isfinite(loss) or not (half or math.isfinite(norm)):
        raise UserError(
            f"step {step}: the loss is {loss}, the gradient norm {norm}: training diverged",
            ExitCode.DIVERGED,
            hint="make --lr smaller (a run that is gone on with takes --allow-change for it), or look at the step's rows",
        )
