"""The state of a training run beside the model's weights, as named tensors and JSON values, and back to the bit.

Optimizer, loss scaler, and the random generators of Python, NumPy and torch (CPU and every GPU).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ftkit.core.random_state import random_state, restore_random
from ftkit.core.training import Training


def collect_state(training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, JSON values) from which `restore_state` goes on."""
    tensors, values = optimizer_state(training.optimizer)
    random_tensors, random_values = random_state()
    return {**tensors, **random_tensors}, {
        "optimizer": values,
        "scaler": training.scaler.state_dict(),
        "random": random_values,
    }


def restore_state(training: Training, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put a collected state back. Raises KeyError, ValueError or RuntimeError where it is not of such a run."""
    restore_optimizer(training.optimizer, tensors, values["optimizer"])
    if training.scaler.is_enabled():
        training.scaler.load_state_dict(values["scaler"])
    restore_random(tensors, values["random"])


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, int, Any]]:
    """(group, place in the group, parameter) in a fixed order."""
    for group_at, group in enumerate(optimizer.param_groups):
        for at, parameter in enumerate(group["params"]):
            yield group_at, at, parameter


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the optimizer keeps of each parameter: tensors by `optimizer.<group>.<place>.<name>`, other values likewise.

    Not `state_dict()`: loading one casts states to the parameter's format (torch) or wraps them (bitsandbytes).
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for group_at, at, parameter in parameters_of(optimizer):
        for name, value in optimizer.state.get(parameter, {}).items():
            key = f"optimizer.{group_at}.{at}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value.detach().cpu().clone()  # bitsandbytes shares its code books
            else:
                values[key] = value
    return tensors, values


def restore_optimizer(optimizer: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Fill the states of an optimizer that has made no step."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    kept = {key: value for key, value in tensors.items() if key.startswith("optimizer.")}
    for key, value in {**kept, **values}.items():
        _, group, place, name = key.split(".", 3)
        found.setdefault((int(group), int(place)), {})[name] = value
    for group_at, at, parameter in parameters_of(optimizer):
        known = found.pop((group_at, at), {})
        if known and hasattr(optimizer, "init_state"):  # bitsandbytes: paged states live in memory of their own
            optimizer.init_state(optimizer.param_groups[group_at], parameter, group_at, at)
        for name, value in known.items():
            put_state(optimizer.state[parameter], name, value, parameter)
    if found:
        raise ValueError("the checkpoint has states of parameters that this run does not train")


def put_state(state: dict[str, Any], name: str, value: Any, parameter: Tensor) -> None:
    """One value of one parameter, in the tensor that is there, or as a new one on the parameter's device."""
    present = state.get(name)
    if isinstance(value, Tensor) and isinstance(present, Tensor):
        if present.shape != value.shape or present.dtype != value.dtype:
            raise ValueError(f"{name} is {tuple(value.shape)}, should be {tuple(present.shape)}")
        present.copy_(value)
    else:
        state[name] = value.to(parameter.device) if isinstance(value, Tensor) else value
