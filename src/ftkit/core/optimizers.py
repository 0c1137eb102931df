"""Optimizers and learning-rate schedules."""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ftkit.core.adapters import trainable_parameters
from ftkit.errors import ExitCode, UserError

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def make_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) fused, its 8-bit and paged forms (arXiv:2110.02861; bitsandbytes), or SGD with momentum.

    Weight decay is on matrices only. paged-adamw-8bit keeps its state in memory that CUDA pages: elsewhere exit 6.
    """
    groups = decay_groups(trainable_parameters(model), weight_decay)
    device = next(model.parameters()).device.type
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPSILON, fused=device in ("cuda", "cpu"))
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    check_optimizer(name, device)
    import bitsandbytes as bnb

    kind: Any = {"adamw-8bit": bnb.optim.AdamW8bit, "paged-adamw-8bit": bnb.optim.PagedAdamW8bit}[name]
    return kind(groups, lr=lr, betas=BETAS, eps=EPSILON)  # type: ignore[no-any-return]


def check_optimizer(name: str, device: str) -> None:
    """Exit 6 for an optimizer that cannot run on this device, or whose library is not installed."""
    if name == "paged-adamw-8bit" and device != "cuda":
        hint = "--optimizer adamw-8bit works here"
        raise UserError("--optimizer paged-adamw-8bit needs a CUDA GPU", ExitCode.ENVIRONMENT, hint=hint)
    if name.endswith("8bit") and find_spec("bitsandbytes") is None:
        hint = "pip install bitsandbytes; or --optimizer adamw"
        raise UserError(
            f"--optimizer {name} needs bitsandbytes, which is not installed", ExitCode.ENVIRONMENT, hint=hint
        )


def decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, vectors (norms, biases) do not."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup: float) -> float:
    """The rate of optimizer step `step`, from 1 to `total`: rises over the share `warmup`, then as the schedule says.

    linear falls to 0 after the last step, cosine likewise along half a wave (arXiv:1608.03983), constant stays.
    """
    rising = math.ceil(total * warmup)
    if step <= rising:
        return peak * (step / rising)
    share = (step - rising) / max(1, total - rising + 1)
    if schedule == "linear":
        return peak * (1 - share)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * share))
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
