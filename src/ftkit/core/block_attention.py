"""Causal attention on a CPU, block of queries by block, that keeps no weights of pairs for its backward pass.

FlashAttention's plan (arXiv:2205.14135, section 3.1) made of batched products: in bfloat16 they reach most of what the
processor can do, where torch's fused kernel for CPUs is half as fast. A block's weights are computed again on the way
back, so memory grows with the tokens, not with the pairs; keys that no query of a block may see are not touched.

Legend: B rows, H query heads, G key/value heads, R = H / G, L queries, P + L keys, d head width, C queries of a block.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MOST_QUERIES, MOST_ROWS = 256, 512
"""C, and R * C, at most: so many scores against a thousand keys stay in the processor's cache (measured on an AMD EPYC)."""


def block_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """q (B, H, L, d), k and v (B, G, P + L, d) -> (B, H, L, d): query i looks at the keys up to P + i, `window` of them."""
    scale = scaling if scaling is not None else 1 / math.sqrt(q.shape[-1])
    out: Tensor = BlockAttention.apply(q, k, v, scale, window)  # type: ignore[no-untyped-call]
    return out


class BlockAttention(torch.autograd.Function):
    """softmax(scale q k^T + mask) v, and its gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Block by block; only what came in is kept."""
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.window = scale, window
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        out = q.new_empty(q.shape)
        for here, seen, mask in blocks(q, k, window):
            weights = weights_of(queries_of(q, k, here) * scale, keys[:, seen], mask)
            out[:, :, here] = (weights @ values[:, seen]).view(*q.shape[:2], -1, q.shape[3])
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of q, k and v; those of k and v are summed over blocks in float32."""
        [grad] = grad_outputs
        q, k, v = ctx.saved_tensors
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        grad_q = q.new_empty(q.shape)
        grad_k, grad_v = (
            torch.zeros(keys.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device) for _ in "kv"
        )
        for here, seen, mask in blocks(q, k, ctx.window):
            queries = queries_of(q, k, here) * ctx.scale
            back = queries_of(grad, k, here)
            weights = weights_of(queries, keys[:, seen], mask)
            grad_v[:, seen] += weights.transpose(1, 2) @ back
            grad_weights = back @ values[:, seen].transpose(1, 2)
            scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_q[:, :, here] = (scores @ keys[:, seen]).mul_(ctx.scale).view(*q.shape[:2], -1, q.shape[3])
            grad_k[:, seen] += scores.transpose(1, 2) @ queries
        return grad_q, grad_k.view(k.shape).to(k.dtype), grad_v.view(v.shape).to(v.dtype), None, None


def blocks(q: Tensor, k: Tensor, window: int | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """(queries, the keys that they may see, mask (R * C, keys)) of each block."""
    repeats, length, before = q.shape[1] // k.shape[1], q.shape[2], k.shape[2] - q.shape[2]
    most = max(1, min(MOST_QUERIES, MOST_ROWS // repeats))
    for start in range(0, length, most):
        stop = min(start + most, length)
        first = 0 if window is None else max(0, before + start + 1 - window)
        make_mask = block_mask if q.device.type == "meta" else kept_mask  # a simulation must see what is made
        mask = make_mask(stop - start, before + stop - first, window, repeats, q.dtype, q.device)
        yield slice(start, stop), slice(first, before + stop), mask


def queries_of(q: Tensor, k: Tensor, here: slice) -> Tensor:
    """Queries (or their gradients) of a block, those that share a key head together: (B * G, R * C, d)."""
    groups = k.shape[0] * k.shape[1]
    return q[:, :, here].reshape(groups, -1, q.shape[3])


def weights_of(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """softmax of scores: (B * G, R * C, d), (B * G, keys, d) -> (B * G, R * C, keys)."""
    return torch.softmax(torch.baddbmm(mask, queries, keys.transpose(1, 2)), dim=-1)


def block_mask(
    count: int, total: int, window: int | None, repeats: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(R * C, keys): 0 where a query may look, else -inf; the last query sees the last key."""
    position = torch.arange(total - count, total, device=device)[:, None]
    distance = position - torch.arange(total, device=device)[None, :]
    refused = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return (
        torch.zeros((count, total), dtype=dtype, device=device).masked_fill_(refused, float("-inf")).repeat(repeats, 1)
    )


kept_mask = lru_cache(maxsize=64)(block_mask)
"""The same for every layer of a pack; 1 MiB in bfloat16 against a thousand keys."""
