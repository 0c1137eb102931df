"""Attention over a pack in one call on a CUDA card: FlashAttention's kernel for sequences of different lengths.

A segment of the pack is a sequence of the kernel: its queries are its own L tokens, its keys those of its P ancestors and
its own, in the order of the row. The kernel's causal mask ends in the lower right corner of (L, P + L), so query i sees
keys 0..P + i: what `segment_attention` computes in a loop, with a few small kernels for each segment. Keys of ancestors are
gathered once for each segment below them; where nothing is shared, nothing is gathered.

Written without a card at hand, so it is not trusted: `packing_fault` holds it against the loop before the first step, on
the card, in the model's own shapes, with gradients. What it refuses is the loop's for the rest of the process.

Legend: H query heads, G key/value heads, T tokens of the pack, L of a segment, P of its ancestors, S = sum of P + L over
segments, N segments, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

WIDEST_HEAD = 256
REFUSED: list[str] = []
"""Why this process does not use the kernel although the card has it; empty while it does."""


@dataclass(frozen=True, eq=False)
class Spans:
    """A pack as the kernel reads it.

    query_starts, key_starts: int32 (N + 1), where each sequence begins among T queries and S keys, and the end.
    places: int64 (S,), the token of each key; None where they are the T tokens in order.
    longest_query, longest_keys: of one sequence.
    """

    query_starts: Tensor
    key_starts: Tensor
    places: Tensor | None
    longest_query: int
    longest_keys: int

    def to(self, device: str) -> "Spans":
        """The same on a device; a copy to a GPU does not wait for it."""
        places = None if self.places is None else moved_to(self.places, device)
        starts, keys = moved_to(self.query_starts, device), moved_to(self.key_starts, device)
        return replace(self, query_starts=starts, key_starts=keys, places=places)


def moved_to(tensor: Tensor, device: str) -> Tensor:
    """A copy on a device. From pinned memory a GPU fetches it by itself; from other memory Python would wait for it."""
    if device == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def make_spans(lengths: Sequence[int], ancestors: Sequence[Sequence[int]]) -> Spans:
    """Of the segments of a pack, in order: their lengths, and for each the segments above it, from the root down."""
    starts = list(accumulate(lengths, initial=0))
    paths = [(*above, number) for number, above in enumerate(ancestors)]
    widths = [sum(lengths[at] for at in path) for path in paths]
    places = None
    if any(ancestors):
        places = torch.cat([torch.arange(starts[at], starts[at + 1]) for path in paths for at in path])
    query_starts, key_starts = (
        torch.tensor(ends, dtype=torch.int32) for ends in (starts, list(accumulate(widths, initial=0)))
    )
    return Spans(query_starts, key_starts, places, max(lengths), max(widths))


def is_used_on(device: str) -> bool:
    """True where packs are attended to in one call: on a CUDA card with FlashAttention's kernels, unless it was refused."""
    return device == "cuda" and not REFUSED and has_kernel()


@cache
def has_kernel() -> bool:
    """FlashAttention-2 is in this torch and runs on this card (Ampere and newer)."""
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability() >= (8, 0)


def fits_kernel(query: Tensor, value: Tensor, dropout: float, softcap: float | None) -> bool:
    """True for inputs that the kernel takes: 16 bits, heads of a multiple of 8 up to 256, no dropout, no soft cap."""
    width = query.shape[-1]
    is_plain = not dropout and softcap is None
    return is_plain and query.element_size() == 2 and width == value.shape[-1] and width % 8 == 0 < width <= WIDEST_HEAD


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scaling: float | None, window: int | None
) -> Tensor:
    """query (1, H, T, d), key and value (1, G, T, d) -> (1, T, H, d): each segment sees its ancestors and, causally, itself.

    window: at most so many tokens back, itself included.
    """
    from torch.nn.attention import varlen  # loads torch's compiler, which no other path needs

    queries, keys, values = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # (T, heads, d)
    if spans.places is not None:
        keys, values = (Gathered.apply(tensor, spans.places) for tensor in (keys, values))  # type: ignore[no-untyped-call]
    is_local = window is not None and window < spans.longest_keys
    out = varlen.varlen_attn(
        queries,
        keys,
        values,
        spans.query_starts,
        spans.key_starts,
        spans.longest_query,
        spans.longest_keys,
        scale=scaling,
        window_size=(window - 1, 0) if is_local and window is not None else (-1, 0),  # tokens beside itself
        enable_gqa=True,
    )
    assert isinstance(out, Tensor)  # it gives more only where more is asked for
    return out.unsqueeze(0)


class Gathered(torch.autograd.Function):
    """Rows of (T, G, d) at `places` (S,) -> (S, G, d). Gradients of a token that many segments see are summed in float32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        """One copy; only the places are kept."""
        ctx.save_for_backward(places)
        ctx.shape = rows.shape
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        """(T, G, d) in the format of the gradient."""
        [grad] = upstream
        [places] = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=grad.device)
        return total.index_add_(0, places, grad.to(wide)).to(grad.dtype), None
