"""The state of a training run beside the model's weights, as named tensors and JSON values, and back to the bit.

Optimizer, loss scaler, and the random generators of Python, NumPy and torch (CPU and every GPU).
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftkit.core.training import Training

Values = dict[str, Any]


def collect_state(training: Training) -> tuple[dict[str, Tensor], Values]:
    """(tensors on the CPU, JSON values) from which `restore_state` goes on."""
    tensors, values = optimizer_state(training.optimizer)
    random_tensors, random_values = random_state()
    return {**tensors, **random_tensors}, {
        "optimizer": values,
        "scaler": training.scaler.state_dict(),
        "random": random_values,
    }


def restore_state(training: Training, tensors: dict[str, Tensor], values: Values) -> None:
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


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Values]:
    """What the optimizer keeps of each parameter: tensors by `optimizer.<group>.<place>.<name>`, other values likewise.

    Not `state_dict()`: loading one casts states to the parameter's format (torch) or wraps them (bitsandbytes).
    """
    tensors: dict[str, Tensor] = {}
    values: Values = {}
    for group_at, at, parameter in parameters_of(optimizer):
        for name, value in optimizer.state.get(parameter, {}).items():
            key = f"optimizer.{group_at}.{at}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value.detach().cpu().clone()  # bitsandbytes shares its code books
            else:
                values[key] = value
    return tensors, values


def restore_optimizer(optimizer: Any, tensors: dict[str, Tensor], values: Values) -> None:
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


def random_state() -> tuple[dict[str, Tensor], Values]:
    """Every random generator that training or a library of it may draw from."""
    kind, keys, *place = np.random.get_state()  # the global generator is what libraries draw from
    tensors = {"random.torch": torch.get_rng_state(), "random.numpy": torch.from_numpy(np.asarray(keys).copy())}
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{at}": state for at, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"python": random.getstate(), "numpy": [kind, *place]}


def restore_random(tensors: dict[str, Tensor], values: Values) -> None:
    """Set the generators to where they were."""
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, *place = values["numpy"]
    np.random.set_state((kind, tensors["random.numpy"].numpy(), *place))
    torch.set_rng_state(tensors["random.torch"])
    if torch.cuda.is_available():
        states = [tensors[key] for key in sorted(tensors) if key.startswith("random.cuda.")]
        torch.cuda.set_rng_state_all(states)
