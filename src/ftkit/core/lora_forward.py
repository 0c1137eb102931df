"""LoRA's forward pass without waste, on PEFT's own layers, parameters and files.

PEFT casts the layer's whole input and output to the adapter's float32 and adds them there. Here the small matrices are
cast to the input's format instead, and the product is added in one operation; gradients reach the float32 parameters
through the cast.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def speed_up_lora(model: nn.Module) -> int:
    """Give every plain LoRA layer of a PEFT model the faster forward pass; how many got it.

    Parameters, names and files stay PEFT's. What is not plain keeps PEFT's own forward.
    """
    from peft.tuners.lora import LoraLayer

    plain = [module for module in model.modules() if isinstance(module, LoraLayer) and is_plain(module)]
    for layer in plain:
        layer.forward = MethodType(lora_forward, layer)
    return len(plain)


def is_plain(layer: Any) -> bool:
    """True for linear layers (of 16, 8 or 4 bits; Conv1D) whose one adapter is A and B alone: no DoRA, no bias."""
    names = list(layer.lora_A)
    if len(names) != 1 or layer.lora_variant or layer.merged:
        return False
    return type(layer.lora_A[names[0]]) is nn.Linear and layer.lora_B[names[0]].bias is None


def lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """base(x) + scale * B (A dropout(x)): x (..., in) -> (..., out), in the base's format (arXiv:2106.09685, section 4.1)."""
    if layer.disable_adapters or layer.merged or args or kwargs or layer.active_adapters != list(layer.lora_A):
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    [name] = layer.lora_A
    result: Tensor = layer.base_layer(x)
    format_ = result.dtype
    a, b = layer.lora_A[name].weight.to(format_), layer.lora_B[name].weight.to(format_)
    inner = F.linear(layer.lora_dropout[name](x.to(format_)), a)  # (..., r)
    added = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), b.t(), alpha=layer.scaling[name])
    return added.view_as(result)
