"""PEFT's own merge, one parameter at a time: for the kinds of adapters whose arithmetic ftkit does not have itself.

The adapter is in memory, on a model of placeholders (core/streaming.py); the base's values come in and go out one tensor
at a time. LoHa: arXiv:2108.06098. LoKr: arXiv:2309.14859. OFT: arXiv:2306.07280. (IA)3: arXiv:2205.05638.
VeRA: arXiv:2310.11454.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftkit.core.checkpoint_names import Piece

Update = Callable[[Tensor], Tensor]
"""Values of one tensor of the base, float32 -> the same with the adapter merged into them, float32."""
PeftLayers = Mapping[str, Sequence[Any]]
"""Name of a parameter of the base -> PEFT's layers that change it, innermost last."""


def layers_of_peft(tuned: Any) -> PeftLayers:
    """PEFT's layers by the parameter that each changes. tuned: PEFT's model, its base of placeholders."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, list[Any]] = {}
    for path, module in tuned.named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "merge"):
            layer = path.removeprefix("base_model.model.").replace(".base_layer", "")
            for name in changed_parameters(module):
                layers.setdefault(f"{layer}.{name}", []).append(module)
    return layers


def changed_parameters(layer: Any) -> Iterator[str]:
    """Names of the base layer's parameters that merging one of PEFT's layers changes."""
    yield getattr(layer, "parameter_name", "weight")
    scales_outputs = getattr(layer, "is_feedforward", None) is False  # (IA)3
    adds_bias = any(getattr(layer, "lora_bias", {}).values())
    if (scales_outputs or adds_bias) and getattr(layer.get_base_layer(), "bias", None) is not None:
        yield "bias"


def merged_by_peft(layers: Sequence[Any], name: str, values: Tensor) -> Tensor:
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


def merged_piece(layers: Sequence[Any], piece: Piece, values: Tensor) -> Tensor:
    """One expert's matrix (rows, columns), float32, that loading joins into a parameter which these layers change.

    The same sum as PEFT's `ParamWrapper.merge`, of one expert: W + scale * B A.
    """
    for layer in layers:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        own_a = a.reshape(layer.num_experts, -1, a.shape[-1])[piece.expert]  # (r, columns)
        own_b = b.reshape(b.shape[0], -1, layer.num_experts)[..., piece.expert]  # (rows of all parts, r)
        rows = own_b.chunk(piece.parts)[piece.part]
        values = values + (rows @ own_a).detach() * layer.scaling["default"]
    return values
