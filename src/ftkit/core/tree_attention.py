"""Attention over a pack of rows: each segment attends to its ancestors and causally to itself, never to other rows.

Legend: H query heads, G key/value heads, T tokens of the pack, L of a segment, P of its ancestors, d head width.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkit.core.block_attention import block_attention
from ftkit.core.compiled_shapes import SEGMENT_MULTIPLE, fill_of, is_compiled
from ftkit.core.packing import Segment
from ftkit.core.varlen_attention import (
    WIDEST_HEAD,
    Spans,
    fits_kernel,
    has_kernel,
    is_used_on,
    make_spans,
    varlen_attention,
)


@dataclass(frozen=True)
class Layout:
    """Segment lengths of a pack, in order, and for each the segments above it, from the root down.

    spans: the same as FlashAttention's kernel reads it, on a device that runs it.
    """

    lengths: tuple[int, ...]
    ancestors: tuple[tuple[int, ...], ...]
    spans: Spans | None = field(default=None, compare=False, repr=False)

    def on(self, device: str) -> "Layout":
        """The same for a device: with spans where packs are attended to in one call there."""
        if self.spans is not None or not is_used_on(device):
            return self
        return replace(self, spans=make_spans(self.lengths, self.ancestors).to(device))


def make_layout(segments: list[Segment]) -> Layout:
    """The layout of a pack's segments; a parent always comes before its children."""
    ancestors: list[tuple[int, ...]] = []
    for segment in segments:
        ancestors.append((*ancestors[segment.parent], segment.parent) if segment.parent >= 0 else ())
    return Layout(tuple(segment.length for segment in segments), tuple(ancestors))


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query (1, H, T, d), key and value (1, G, T, d) -> (1, T, H, d), as transformers' attention interface wants it.

    Without a layout, rows (B, H, T, d) that are padded on the right, each causal. Work grows with the pairs that are
    really attended, not with T squared.
    """
    if layout is not None and layout.spans is not None and fits_kernel(query, value, dropout, softcap):
        return varlen_attention(query, key, value, layout.spans, scaling, sliding_window), None
    has_one_width = query.shape[3] == value.shape[3]
    if (
        is_compiled(query) and softcap is None and not dropout and has_one_width
    ):  # in float32 torch's fused kernel is as fast
        segments = () if layout is None else (layout.lengths, layout.ancestors)
        return block_attention(query, key, value, scaling, sliding_window, *segments), None
    if layout is None:
        return attend(query, key, value, scaling, dropout, sliding_window, softcap).transpose(1, 2), None
    return segment_attention(query, key, value, layout, scaling, dropout, sliding_window, softcap), None


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The same segment by segment -> (1, T, H, d); on pieces (`split`), so that their gradients are joined once.

    Zeros behind a segment's end, where no token of its own looks, make lengths that come again (`compiled_shapes`).
    """
    queries, keys, values = (torch.split(tensor, list(layout.lengths), dim=2) for tensor in (query, key, value))
    outputs = []
    for number, (length, above) in enumerate(zip(layout.lengths, layout.ancestors, strict=True)):
        fill = fill_of(length, SEGMENT_MULTIPLE, query)
        q = joined([queries[number]], fill)
        k, v = (joined([*(pieces[i] for i in above), pieces[number]], fill) for pieces in (keys, values))
        outputs.append(attend(q, k, v, scaling, dropout, window, softcap)[:, :, :length])
    return torch.cat(outputs, dim=2).transpose(1, 2)


def joined(pieces: list[Tensor], fill: int) -> Tensor:
    """Pieces (1, heads, tokens, d) in a row, and `fill` tokens of zeros behind them."""
    if fill:
        heads, width = pieces[0].shape[1], pieces[0].shape[3]
        pieces = [*pieces, pieces[0].new_zeros((1, heads, fill, width))]
    return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, window: int | None, softcap: float | None
) -> Tensor:
    """The last L of P + L tokens attend causally, at most `window` tokens back: q (B, H, L, d), k (B, G, P + L, d)."""
    length, total = q.shape[2], k.shape[2]
    if softcap is not None:
        return capped_attention(q, k, v, scaling, dropout, window, softcap)
    is_causal = length == total and (window is None or window >= total)
    mask = None if is_causal else causal_mask(length, total, window, q.device)
    grouped = q.shape[1] != k.shape[1]
    if grouped and needs_copies(q, mask):
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scaling, enable_gqa=grouped
    )


def needs_copies(q: Tensor, mask: Tensor | None) -> bool:
    """True where a GPU would fall back to a kernel that holds all pairs, if several query heads shared a key head.

    Only FlashAttention takes such heads, without a mask, in 16 bits, on Ampere and newer; the memory-efficient kernel does not
    (torch's sdp_utils.cpp). A simulation makes the copies by itself (`cuda_operators`).
    """
    if q.device.type != "cuda":
        return False
    return mask is not None or q.element_size() != 2 or q.shape[3] > WIDEST_HEAD or not has_kernel()


def causal_mask(length: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """bool (L, P + L): True where the query may look; query i stands at position P + i."""
    position = torch.arange(total - length, total, device=device)[:, None]
    distance = position - torch.arange(total, device=device)[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, window: int | None, softcap: float
) -> Tensor:
    """Attention as it is written, without a copy of k and v for the R = H / G query heads that share them.

    Scores go through softcap * tanh(score / softcap) before the softmax (Gemma 2, arXiv:2408.00118, section 2).
    """
    (batch, heads, length, width), groups, total = q.shape, k.shape[1], k.shape[2]
    scale = scaling if scaling is not None else 1 / math.sqrt(width)
    grouped = (q * scale).reshape(batch * groups, -1, width)  # (B * G, R * L, d)
    keys, values = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    refused = ~causal_mask(length, total, window, q.device)
    mask = torch.zeros(refused.shape, dtype=q.dtype, device=q.device).masked_fill_(refused, float("-inf"))
    # added, not filled in: that costs the backward pass nothing
    scores = softcap * torch.tanh(torch.bmm(grouped, keys) / softcap) + mask.repeat(
        heads // groups, 1
    )  # (B * G, R * L, P + L)
    return (F.dropout(torch.softmax(scores, dim=-1), dropout) @ values).view(batch, heads, length, width)
