"""Random generators that training, or a library of it, may draw from: Python's, NumPy's, torch's on CPU and GPUs."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON values) from which `restore_random` sets all of them back."""
    kind, keys, *place = np.random.get_state()  # the global generator is what libraries draw from
    tensors = {"random.numpy": torch.from_numpy(np.asarray(keys).copy()), **torch_state()}
    return tensors, {"python": random.getstate(), "numpy": [kind, *place]}


def restore_random(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Set the generators to where they were."""
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, *place = values["numpy"]
    np.random.set_state((kind, tensors["random.numpy"].numpy(), *place))
    restore_torch(tensors)


def torch_state() -> dict[str, Tensor]:
    """Of torch alone, which dropout draws from; neither this nor putting it back waits for a GPU."""
    tensors = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{at:03d}": state for at, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def restore_torch(tensors: dict[str, Tensor]) -> None:
    """Set torch's generators to where they were."""
    torch.set_rng_state(tensors["random.torch"])
    if torch.cuda.is_available():
        states = [tensors[key] for key in sorted(tensors) if key.startswith("random.cuda.")]
        for device, state in zip(range(torch.cuda.device_count()), states, strict=False):  # fewer may be here now
            torch.cuda.set_rng_state(state, device)
