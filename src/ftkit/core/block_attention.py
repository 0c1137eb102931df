"""Attention of a pack or of padded rows on a CPU in products that it is fast at, one autograd function for all segments.

FlashAttention's plan (arXiv:2205.14135, section 3.1) made of batched products: a block of queries at a time, against its
ancestors' keys and its own up to the last query. In bfloat16 such products reach most of what the processor can do, where
torch's fused kernel for CPUs is half as fast. Weights of pairs are kept for the backward pass where they are few, else made
again there, so that memory grows with the tokens.

Legend: B rows, H query heads, G key/value heads, R = H / G, L queries, P + L keys, d head width, C queries of a block, N keys
that it looks at, ancestors' and own; C and N filled up to multiples in which products are fast and shapes come again.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftkit.core.compiled_shapes import SEGMENT_MULTIPLE, fill_of

MOST_QUERIES, MOST_ROWS = 256, 512
"""C, and R * C where C is not the multiple itself, at most: so many scores against a thousand keys stay in the processor's cache
(measured on an AMD EPYC)."""
KEPT_KEYS, KEPT_WIDTHS = 512, 16
"""Weights are kept for the backward pass where N <= 512 or N <= 16 d: for its pairs, 2 N H bytes a token, a layer then keeps no
more than about as much as for all the rest."""


@dataclass(frozen=True)
class Block:
    """Queries of one segment, and the keys that they look at.

    queries: where they stand. above: where keys in front of them stand, in the order of their row. own: where their own keys
    stand. is_seen: whether queries of a later block look at these keys.
    """

    queries: slice
    above: tuple[slice, ...]
    own: slice
    is_seen: bool

    @property
    def before(self) -> int:
        """Keys in front of the first query."""
        return sum(span.stop - span.start for span in self.above)

    @property
    def count(self) -> int:
        """C, not filled up."""
        return len(range(self.queries.start, self.queries.stop))


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    window: int | None,
    lengths: Sequence[int] | None = None,
    ancestors: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """q (B, H, L, d), k and v (B, G, P + L, d) -> (B, L, H, d): query i looks at the keys up to P + i, `window` of them.

    With lengths and ancestors of a pack's segments (P = 0), a query looks at its segment and the ones above that only.
    """
    width, repeats, before = q.shape[3], q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    scale = scaling if scaling is not None else 1 / math.sqrt(width)
    most = max(SEGMENT_MULTIPLE, min(MOST_QUERIES, MOST_ROWS // repeats) // SEGMENT_MULTIPLE * SEGMENT_MULTIPLE)
    blocks = list(blocks_of(lengths or [q.shape[2]], ancestors or [()], before, window, most))
    keeps = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out: Tensor = BlockAttention.apply(q, k, v, blocks, scale, window, keeps)  # type: ignore[no-untyped-call]
    return out


def blocks_of(
    lengths: Sequence[int], ancestors: Sequence[Sequence[int]], before: int, window: int | None, most: int
) -> Iterator[Block]:
    """The blocks of at most `most` queries of each segment, in order: keys of a block never stand behind it."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    parents = {above for path in ancestors for above in path}
    for segment, (length, path) in enumerate(zip(lengths, ancestors, strict=True)):
        start = starts[segment]
        for at in range(start, start + length, most):
            stop = min(at + most, start + length)
            above = [slice(starts[i], starts[i + 1]) for i in path]
            above.append(slice(before + start if segment else 0, before + at))  # a cache stands in front of the first
            if window is not None:
                above = last_keys(above, window - 1)
            is_seen = segment in parents or stop < start + length
            filled = tuple(span for span in above if span.stop > span.start)
            yield Block(slice(at, stop), filled, slice(before + at, before + stop), is_seen)


def last_keys(spans: list[slice], count: int) -> list[slice]:
    """The last `count` keys of spans."""
    kept: list[slice] = []
    for span in reversed(spans):
        length = min(count, span.stop - span.start)
        kept.append(slice(span.stop - length, span.stop))
        count -= length
    return kept[::-1]


class BlockAttention(torch.autograd.Function):
    """softmax(scale q k^T + mask) v, and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], scale: float, window: int | None, keeps: bool
    ) -> Tensor:
        """(B, L, H, d), block by block."""
        (batch, heads, length, width), groups = q.shape, k.shape[1]
        queries = torch.mul(q, scale, out=q.new_empty(q.shape)).view(batch * groups, heads // groups, length, width)
        pairs = torch.cat([k.flatten(0, 1), v.flatten(0, 1)])  # (2 B G, P + L, d): keys, then values
        out = q.new_empty(batch, length, groups, heads // groups, width)
        kept: list[Tensor | None] = []
        for block in blocks:
            here = rows_of(queries, block)
            keys, values = gathered(pairs, block).chunk(2)
            weights = weights_of(here, keys, block, window)
            mixed = torch.bmm(weights, values).view(batch, groups, heads // groups, -1, width)
            out[:, block.queries] = mixed[:, :, :, : block.count].permute(0, 3, 1, 2, 4)
            kept.append(weights if keeps and is_kept(keys) else None)
        ctx.save_for_backward(queries, pairs, *kept)
        ctx.blocks, ctx.scale, ctx.window = blocks, scale, window
        return out.view(batch, length, heads, width)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        """Gradients of q, k and v.

        From the last block to the first: when it is a block's turn, all that look at its keys have been. What they add is
        summed in float32.
        """
        queries, pairs, *kept = ctx.saved_tensors
        (both, repeats, length, width), groups = queries.shape, len(pairs) // 2
        batch = len(grad_outputs[0])
        back = grad_outputs[0].reshape(batch, length, -1, repeats, width).permute(0, 2, 3, 1, 4)
        grad_q = queries.new_empty(batch, length, both // batch, repeats, width)
        grad_pairs = torch.empty_like(pairs)
        sums = pairs.new_empty(pairs.shape, dtype=torch.promote_types(pairs.dtype, torch.float32))
        cache = slice(0, pairs.shape[1] - length)
        for span in (cache, *(block.own for block in ctx.blocks if block.is_seen)):
            sums[:, span].zero_()
        for block, weights in zip(reversed(ctx.blocks), reversed(kept), strict=True):
            here, upstream = rows_of(queries, block), rows_of(back, block)
            there = gathered(pairs, block)
            keys, values = there.chunk(2)
            if weights is None:
                weights = weights_of(here, keys, block, ctx.window)
            found = torch.empty_like(there)
            torch.bmm(weights.transpose(1, 2), upstream, out=found[groups:])
            scores = torch.bmm(upstream, values.transpose(1, 2))
            torch._softmax_backward_data(scores, weights, -1, weights.dtype, grad_input=scores)
            torch.bmm(scores.transpose(1, 2), here, out=found[:groups])
            mixed = torch.bmm(scores, keys).view(batch, -1, repeats, scores.shape[1] // repeats, width)
            grad_q[:, block.queries] = mixed[:, :, :, : block.count].permute(0, 3, 1, 2, 4)
            at = 0
            for span in block.above:
                sums[:, span].add_(found[:, at : at + span.stop - span.start])
                at += span.stop - span.start
            own = found[:, at : at + block.count]
            grad_pairs[:, block.own] = sums[:, block.own].add_(own) if block.is_seen else own
        grad_pairs[:, cache] = sums[:, cache]
        grad_k, grad_v = grad_pairs.view(2, batch, -1, *pairs.shape[1:])
        grad_q = grad_q.mul_(ctx.scale).view(batch, length, -1, width).transpose(1, 2)
        return grad_q, grad_k, grad_v, None, None, None, None


def is_kept(keys: Tensor) -> bool:
    """True if the weights of keys (B G, N, d) are few enough to be kept until the backward pass."""
    return keys.shape[1] <= max(KEPT_KEYS, KEPT_WIDTHS * keys.shape[2])


def rows_of(x: Tensor, block: Block) -> Tensor:
    """A block's part of queries or of their gradients (..., R, L, d) -> (B G, R C, d), zeros behind it."""
    part, fill = x[..., block.queries, :], fill_of(block.count, SEGMENT_MULTIPLE, x)
    return (F.pad(part, (0, 0, 0, fill)) if fill else part).reshape(-1, x.shape[-3] * (block.count + fill), x.shape[-1])


def gathered(pairs: Tensor, block: Block) -> Tensor:
    """Keys and values of a block (2 B G, P + L, d) -> (2 B G, N, d): so many behind its own that each query has its own.

    A copy, though it may be a slice of few keys: oneDNN would copy slices itself, turned over, eight times as slowly.
    """
    filled = block.count + fill_of(block.count, SEGMENT_MULTIPLE, pairs)
    fill = filled - block.count + fill_of(block.before + filled, SEGMENT_MULTIPLE, pairs)
    parts = [pairs[:, span] for span in (*block.above, block.own)]
    if fill:
        parts.append(pairs.new_zeros((len(pairs), fill, pairs.shape[2])))
    return torch.cat(parts, dim=1)


def weights_of(queries: Tensor, keys: Tensor, block: Block, window: int | None) -> Tensor:
    """Softmax of scores: (B G, R C, d), (B G, N, d) -> (B G, R C, N)."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    count, total = block.count + fill_of(block.count, SEGMENT_MULTIPLE, queries), keys.shape[1]
    make_mask = block_mask if queries.device.type == "meta" else kept_mask  # a simulation must see what is made
    if window is None or total <= window:  # every query looks at all in front of the block
        first, mask = block.before, make_mask(count, count + SEGMENT_MULTIPLE, 0, None, queries.dtype, queries.device)
    else:
        first, mask = 0, make_mask(count, total, block.before, window, queries.dtype, queries.device)
    scores.view(len(scores), -1, count, total)[..., first:].add_(mask[:, : total - first])
    return torch._softmax(scores, -1, False, out=scores)


def block_mask(
    count: int, total: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(count, total), to be added: 0 where query i, which has the place before + i, may look, else -inf."""
    distance = torch.arange(before, before + count, device=device)[:, None] - torch.arange(total, device=device)
    refused = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.zeros((count, total), dtype=dtype, device=device).masked_fill_(refused, float("-inf"))


kept_mask = lru_cache(maxsize=64)(block_mask)
"""The same for every layer of a pack; 128 KiB in bfloat16 where no window is."""
