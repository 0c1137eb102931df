"""PEFT's own merge, one parameter at a time: for the kinds of adapters whose arithmetic ftkit does not have itself.

The adapter is in memory, on a model of placeholders (core/streaming.py); the base's values come in and go out one tensor
at a time. LoHa: arXiv:2108.06098. LoKr: arXiv:2309.14859. OFT: arXiv:2306.07280. (IA)3: arXiv:2205.05638.
VeRA: arXiv:2310.11454.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Update = Callable[[Tensor], Tensor]
"""Values of one parameter of the base, float32 -> the same with the adapter merged into them, float32."""


def updates_by_peft(tuned: Any) -> dict[str, Update]:
    """Name of each parameter of the base that the adapter changes -> what PEFT's merge makes of its values.

    tuned: PEFT's model, its base of placeholders.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, list[Any]] = {}
    for path, module in tuned.named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "merge"):
            layer = path.removeprefix("base_model.model.").replace(".base_layer", "")
            for name in changed_parameters(module):
                layers.setdefault(f"{layer}.{name}", []).append(module)
    return {name: partial(merged_by_peft, found, name.rpartition(".")[2]) for name, found in layers.items()}


def changed_parameters(layer: Any) -> Iterator[str]:
    """Names of the base layer's parameters that merging one of PEFT's layers changes."""
    yield getattr(layer, "parameter_name", "weight")
    scales_outputs = getattr(layer, "is_feedforward", None) is False  # (IA)3
    adds_bias = any(getattr(layer, "lora_bias", {}).values())
    if (scales_outputs or adds_bias) and getattr(layer.get_base_layer(), "bias", None) is not None:
        yield "bias"


def merged_by_peft(layers: list[Any], name: str, values: Tensor) -> Tensor:
    """One parameter of a base layer, float32, after these of PEFT's layers were merged into it.

    Merging changes a layer's other parameters, too: they are zeros meanwhile.
    """
    base = layers[0].get_base_layer()
    kept = dict(base._parameters)
    for other, parameter in kept.items():
        if parameter is not None:
            data = values if other == name else torch.zeros(parameter.shape)
            base._parameters[other] = nn.Parameter(data, requires_grad=False)
    try:
        for layer in layers:
            layer.merge()
        return base._parameters[name].data  # type: ignore[no-any-return]
    finally:
        base._parameters.update(kept)
        for layer in layers:
            layer.merged_adapters = []
