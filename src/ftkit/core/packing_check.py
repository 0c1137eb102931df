"""Does this architecture attend as a pack says? Asked of the model itself, on a few short rows, before training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from typing import Any

import torch
from torch import Tensor, nn

from ftkit.core.adapters import virtual_tokens
from ftkit.core.batching import Batch, make_batch, pack_to_batch
from ftkit.core.encoding import Example
from ftkit.core.loss import counted_logits
from ftkit.core.packed_attention import packed_attention
from ftkit.core.packing import SHORTEST_SHARED, make_pack
from ftkit.core.tree_attention import Layout, segment_attention, tree_attention
from ftkit.core.varlen_attention import REFUSED, fits_kernel, varlen_attention
from ftkit.errors import is_out_of_memory

TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float32: 5e-5, torch.float64: 1e-6}
"""Largest relative difference of logits that rounding explains: ten times what models of 8 layers show."""
KERNEL_LAYOUT = Layout((300, 130, 17, 1, 70, 200), ((), (0,), (0, 1), (0, 1), (0,), ()))
KERNEL_WINDOW = 20
"""So narrow that a window one token too wide or too narrow shows."""
FEW_ROWS = 16
"""Logits that are compared at once, in float64."""
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")


@dataclass(frozen=True)
class Call:
    """How a layer attends: query and key/value heads, their width and format, and what it asks of the attention.

    in_one: whether the pack goes through FlashAttention's kernel in one call.
    """

    heads: int
    groups: int
    width: int
    dtype: torch.dtype
    scaling: float | None
    window: int | None
    in_one: bool


@torch.no_grad()
def packing_fault(
    model: Any, examples: Sequence[Example], device: str, say: Callable[[str], None] | None = None
) -> str | None:
    """None if packed rows give the logits of padded ones in this model, with shared tokens laid out once; else why not.

    Rows of this data, short ones, and one that goes beyond the model's attention window where there is such a row.
    Where the card attends to a pack in one call, that is what is checked, gradients too. A call that gives other numbers,
    or fails, is not used again in this process, which `say` is told, and the loop over segments is checked in its place.
    """
    if virtual_tokens(model):
        return "virtual tokens stand in front of every row"
    rows = sorted(rows_to_check(examples, window_of(model)), key=lambda row: row.ids)
    calls: set[Call] = set()
    fault = fault_of_rows(model, rows, device, calls)
    in_one = [call for call in calls if call.in_one]
    if not in_one or (fault is None and (fault := kernel_fault(in_one, device)) is None):
        return fault
    REFUSED.append(fault)
    without = fault_of_rows(model, rows, device, set())
    if without is not None:  # it is the model, not the kernel
        REFUSED.pop()
    elif say is not None:
        say(
            f"packs are attended to segment by segment, which is slower: the card's kernel for them is not used, {fault}"
        )
    return without


def fault_of_rows(model: Any, rows: Sequence[Example], device: str, calls: set[Call]) -> str | None:
    """The same for rows in the order of their tokens; how the layers attended is added to `calls`."""
    was_training = model.training
    model.eval()

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **options: Any) -> Any:
        calls.add(call_of(query, key, value, options))
        return tree_attention(module, query, key, value, *mask, **options)

    try:
        padded = logits_of(model, make_batch(rows).to(device))
        with packed_attention(model, watched):
            packed = logits_of(model, pack_to_batch(make_pack(rows, share=True)).to(device))
    except (
        ImportError,
        TypeError,
        ValueError,
        IndexError,
        RuntimeError,
    ) as error:  # its forward pass does not know positions or layouts
        if is_out_of_memory(error):
            raise
        return f"it cannot be told of packs ({first_line(error)})"
    finally:
        model.train(was_training)
    if not calls:
        return "it brings its own attention"
    difference = relative_difference(packed, padded)
    if not difference <= tolerance_of(model, padded.dtype):
        return f"its packed rows give other logits than padded ones (by {difference:.1e})"
    return None


def call_of(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Call:
    """What a layer asks for: query (1, H, T, d), key (1, G, T, d)."""
    layout, softcap, window = (options.get(name) for name in ("layout", "softcap", "sliding_window"))
    in_one = layout is not None and layout.spans is not None
    in_one = in_one and fits_kernel(query, value, options.get("dropout", 0.0), softcap)
    width = query.shape[3]
    return Call(query.shape[1], key.shape[1], width, query.dtype, options.get("scaling"), window, in_one)


def kernel_fault(calls: Sequence[Call], device: str) -> str | None:
    """None if one call for a pack gives what the loop over its segments gives, and its gradients, else why it cannot be used.

    Random queries, keys and values in the shapes of a model's layers, in a pack whose segments cross the kernel's blocks.
    """
    layout = KERNEL_LAYOUT.on(device)
    for call in calls:
        for window in {call.window, call.window and min(call.window, KERNEL_WINDOW)}:
            try:
                difference = kernel_difference(replace(call, window=window), layout, device)
            except Exception as error:  # whatever a kernel that was never tried here may raise
                if is_out_of_memory(error):
                    raise
                return f"it fails here ({first_line(error)})"
            if not difference <= TOLERANCE[call.dtype]:
                return f"it gives other numbers or gradients (by {difference:.1e})"
    return None


@torch.enable_grad()
def kernel_difference(call: Call, layout: Layout, device: str) -> float:
    """The largest relative difference of outputs and of gradients of queries, keys and values."""
    assert layout.spans is not None
    generator = torch.Generator().manual_seed(0)  # not the run's own, which must be where it was

    def draw(heads: int) -> Tensor:
        values = torch.randn((1, heads, sum(layout.lengths), call.width), generator=generator)
        return values.to(device, call.dtype).requires_grad_()

    q, k, v, upstream = (draw(heads) for heads in (call.heads, call.groups, call.groups, call.heads))
    results = []
    for out in (
        varlen_attention(q, k, v, layout.spans, call.scaling, call.window),
        segment_attention(q, k, v, layout, call.scaling, 0.0, call.window, None),
    ):
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), upstream.detach().transpose(1, 2))])
    pairs = [(ours.double(), theirs.double()) for ours, theirs in zip(*results, strict=True)]
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


def first_line(error: Exception) -> str:
    """What an error says, shortened; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def rows_to_check(examples: Sequence[Example], window: int | None) -> list[Example]:
    """The ends of two short rows, and the same behind a start that they share; their last tokens are counted.

    With a long end each: were positions those of the pack, the second one's would be far off.
    """
    longest, most = max(map(length_of, examples)), 4 * SHORTEST_SHARED
    short = [row.ids[-most:] for row in nsmallest(2, examples, key=length_of)]
    stem = (short[0] + short[-1]) * most
    stem = stem[: min(most, longest // 2)]
    rows = [short[0], short[-1], stem + short[0] + stem, stem + short[-1] + stem]
    if window is not None:
        beyond = min((row for row in examples if length_of(row) > window + 1), key=length_of, default=None)
        rows += [beyond.ids] if beyond else []
    cut = [ids[:longest] for ids in rows]
    return [Example(ids, [len(ids) - at <= 2 * most for at in range(len(ids))]) for ids in cut]


def length_of(row: Example) -> int:
    """Tokens of an example."""
    return len(row.ids)


def window_of(model: Any) -> int | None:
    """The narrowest attention window that the config speaks of."""
    config = model.config.get_text_config()
    widths = [getattr(config, name, None) for name in WINDOWS]
    return min((width for width in widths if isinstance(width, int) and width > 0), default=None)


def logits_of(model: Any, batch: Batch) -> Tensor:
    """Logits (N, V) of a batch."""
    return counted_logits(model, batch.input_ids, batch.counted, **batch.packing)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| of logits (N, V), each row without its mean, which no softmax sees; a few rows at a time."""
    off = size = 0.0
    for x, y in zip(torch.split(a, FEW_ROWS), torch.split(b, FEW_ROWS), strict=True):
        x, y = x.double(), y.double()
        off += float((x - y).var(-1, correction=0).sum())
        size += float(y.var(-1, correction=0).sum())
    return math.sqrt(off) / max(math.sqrt(size), 1e-300)


def tolerance_of(model: nn.Module, dtype: torch.dtype) -> float:
    """What rounding may change; scales of 8-bit layers depend on all tokens that are fed together."""
    is_8bit = any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    formats = {p.dtype for p in model.parameters() if p.is_floating_point()} | {dtype}
    return max(TOLERANCE.get(format_, 0.0) for format_ in ({*formats, torch.bfloat16} if is_8bit else formats))
