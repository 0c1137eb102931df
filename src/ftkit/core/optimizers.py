"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ftkit.core.adapters import trainable_parameters
from ftkit.errors import ExitCode, UserError

BETAS = (0.9, 0.999)
LION_BETAS = (0.9, 0.99)
DECAY_SHARE = 0.1
"""Of the steps of warmup-stable-decay, the last ones."""
EPSILON = 1e-8


def make_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, lora_plus: float | None = None
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) fused, Adafactor (arXiv:1804.04235), Lion (arXiv:2302.06675), or SGD with momentum.

    8-bit and paged forms (arXiv:2110.02861) and Lion are of bitsandbytes. Adafactor is transformers', without its own
    schedule and scale, so that --lr means what it means elsewhere. Weight decay is on matrices only. Paged ones keep their
    state in memory that CUDA pages: elsewhere exit 6. lora_plus: how many times as fast LoRA's second factors learn.
    """
    factors = {id(p) for name, p in model.named_parameters() if ".ia3_l." in name}  # vectors that PEFT stands on end
    groups = decay_groups(trainable_parameters(model), weight_decay, factors)
    if lora_plus is not None:
        groups = faster_groups(groups, {id(p) for name, p in model.named_parameters() if ".lora_B." in name}, lora_plus)
    device = next(model.parameters()).device.type
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPSILON, fused=device in ("cuda", "cpu"))
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False)  # type: ignore[no-any-return]
    check_optimizer(name, device)
    from bitsandbytes import optim

    lions: dict[str, Any] = {"lion": optim.Lion, "lion-8bit": optim.Lion8bit, "paged-lion-8bit": optim.PagedLion8bit}
    if name in lions:
        return lions[name](groups, lr=lr, betas=LION_BETAS)  # type: ignore[no-any-return]
    adams: dict[str, Any] = {
        "paged-adamw": optim.PagedAdamW,
        "adamw-8bit": optim.AdamW8bit,
        "paged-adamw-8bit": optim.PagedAdamW8bit,
    }
    return adams[name](groups, lr=lr, betas=BETAS, eps=EPSILON)  # type: ignore[no-any-return]


def check_optimizer(name: str, device: str) -> None:
    """Exit 6 for an optimizer that cannot run on this device, or whose library is not installed."""
    if name.startswith("paged-") and device != "cuda":
        hint = f"--optimizer {name.removeprefix('paged-')} works here"
        raise UserError(f"--optimizer {name} needs a CUDA GPU", ExitCode.ENVIRONMENT, hint=hint)
    if (name.endswith("8bit") or "lion" in name or name.startswith("paged-")) and find_spec("bitsandbytes") is None:
        hint = "pip install bitsandbytes; or --optimizer adamw"
        raise UserError(
            f"--optimizer {name} needs bitsandbytes, which is not installed", ExitCode.ENVIRONMENT, hint=hint
        )


def decay_groups(
    parameters: list[nn.Parameter], weight_decay: float, factors: Collection[int] = ()
) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; vectors (norms, biases) and those whose ids are in `factors` do not."""
    matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in factors]
    vectors = [p for p in parameters if p.ndim < 2 or id(p) in factors]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def faster_groups(groups: list[dict[str, Any]], fast: set[int], ratio: float) -> list[dict[str, Any]]:
    """The groups, each divided: parameters whose id is in `fast` learn `ratio` times as fast (LoRA+, arXiv:2402.12354)."""
    divided = []
    for group in groups:
        for is_fast in (False, True):
            own = [p for p in group["params"] if (id(p) in fast) == is_fast]
            if own:
                divided.append({**group, "params": own, "lr_ratio": ratio if is_fast else 1.0})
    return divided


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup: float) -> float:
    """The rate of optimizer step `step`, from 1 to `total`: rises during `warmup`, then goes as the schedule says.

    warmup: a share of the steps below 1, a number of steps from 1 on. linear falls to 0 after the last step, cosine
    likewise along half a wave (arXiv:1608.03983), constant stays, wsd (warmup-stable-decay, arXiv:2404.06395) stays and
    falls linearly to 0 over the last DECAY_SHARE of all steps.
    """
    rising = warmup_steps(total, warmup)
    if step <= rising:
        return peak * (step / rising)
    share = (step - rising) / max(1, total - rising + 1)
    if schedule == "linear":
        return peak * (1 - share)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * share))
    if schedule == "wsd":
        falling = max(1, min(round(total * DECAY_SHARE), total - rising))
        return peak * min(1.0, (total - step + 1) / (falling + 1))
    return peak


def warmup_steps(total: int, warmup: float) -> int:
    """Steps in which the rate rises: `warmup` itself from 1 on, else that share of all."""
    return round(warmup) if warmup >= 1 else math.ceil(total * warmup)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of all parameter groups; of some a multiple."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)
