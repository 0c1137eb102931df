"""RMSNorm with frozen weights on a CPU: the model's own numbers, in pieces that stay in the processor's cache.

As transformers writes it, each norm makes five float32 copies of its input and keeps two of them for the backward pass.
Here float32 lives only inside a piece, and what is kept is the input, which the model keeps anyway, and one number a row.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

PIECE = 2**17
"""Numbers at once."""


def speed_up_norms(model: nn.Module) -> int:
    """Give each frozen RMSNorm of 16 bits on a CPU the faster pass, where it gives the same bits; how many got it."""
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm") and is_plain(module)]
    for norm in norms:
        norm.forward = MethodType(norm_forward, norm)
    return len(norms)


def is_plain(norm: Any) -> bool:
    """True for weight * (x / rms(x)), the product in x's format, told by what comes out for some random rows."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.requires_grad or weight.ndim != 1 or epsilon(norm) is None:
        return False
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((8, len(weight)), generator=generator).to(weight.dtype)
    with torch.no_grad():
        return torch.equal(norm(rows), RootMeanSquare.apply(rows, weight, epsilon(norm)))  # type: ignore[no-untyped-call]


def epsilon(norm: Any) -> float | None:
    """What is added to the mean of squares; transformers has two names for it."""
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else None


def norm_forward(norm: Any, x: Tensor) -> Tensor:
    """x (..., width) in 16 bits -> the same shape and format (arXiv:1910.07467, equation 4); others go the model's way."""
    if x.dtype != norm.weight.dtype or norm.weight.requires_grad:
        return type(norm).forward(norm, x)  # type: ignore[no-any-return]
    return RootMeanSquare.apply(x, norm.weight, epsilon(norm))  # type: ignore[no-untyped-call, no-any-return]


class RootMeanSquare(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), with no gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Rounded where transformers rounds: the quotient to x's format, then its product with the weight."""
        rows = x.reshape(-1, x.shape[-1])
        out, scales = torch.empty_like(rows), rows.new_empty((len(rows), 1), dtype=torch.float32)
        for piece, result, scale in in_pieces(rows, out, scales):
            exact = piece.float()
            torch.rsqrt(exact.pow(2).mean(-1, keepdim=True).add_(eps), out=scale)
            torch.mul(exact.mul_(scale).to(x.dtype), weight, out=result)
        ctx.save_for_backward(rows, weight, scales)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """scale * (g - n mean(g n)) with n = x * scale and g = grad * weight, in float32."""
        [grad] = grad_outputs
        rows, weight, scales = ctx.saved_tensors
        out = torch.empty_like(rows)
        for piece, result, scale, back in in_pieces(rows, out, scales, grad.reshape(rows.shape)):
            normed, wanted = piece.float().mul_(scale), (back * weight).float()
            mean = torch.linalg.vecdot(normed, wanted).div_(rows.shape[1]).unsqueeze(-1)
            result.copy_(wanted.addcmul_(normed, mean, value=-1).mul_(scale))
        return out.view(grad.shape), None, None


def in_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each (N, ...), some at a time."""
    count = max(1, PIECE // tensors[0].shape[1])
    return zip(*(torch.split(tensor, count) for tensor in tensors), strict=True)
