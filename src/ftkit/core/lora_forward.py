"""LoRA's forward pass without waste, on PEFT's own layers, parameters and files.

PEFT casts the layer's whole input and output to the adapter's float32 and adds them there. Here the small matrices are
cast to the input's format instead, and the product is added in one operation; gradients reach the float32 parameters
through the cast.
"""

from types import MethodType
from typing import Any

import torch
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
    fed = layer.lora_dropout[name](x.to(format_))
    added: Tensor = LoraTerm.apply(  # type: ignore[no-untyped-call]
        result.flatten(0, -2), fed.flatten(0, -2), a, b, layer.scaling[name]
    )
    return added.view_as(result)


class LoraTerm(torch.autograd.Function):
    """result + scale * (x A^T) B^T: result (N, out), x (N, in), A (r, in), B (out, r) -> (N, out).

    Forward as PEFT has it, to the bit in float32. Of the ways to write the four thin products on the way back, those that
    read the large matrix row by row: on a CPU they take two thirds of the time of what autograd derives.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """x and the inner products are kept."""
        inner = x @ a.t()  # (N, r)
        ctx.save_for_backward(x, inner, a, b)
        ctx.scale = scale
        return torch.addmm(result, inner, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of result, x, A and B."""
        [grad] = grad_outputs
        x, inner, a, b = ctx.saved_tensors
        back = (b.t().contiguous() @ grad.t()).mul_(ctx.scale)  # (r, N)
        grad_x = back.t() @ a if ctx.needs_input_grad[1] else None
        return grad, grad_x, back @ x, (inner.t() @ grad).mul_(ctx.scale).t(), None
