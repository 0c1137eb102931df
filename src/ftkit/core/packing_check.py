"""Does this architecture attend as a pack says? Asked of the model itself, on a few short rows, before training."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftkit.core.adapters import virtual_tokens
from ftkit.core.batching import Batch, make_batch, pack_to_batch
from ftkit.core.encoding import Example
from ftkit.core.loss import counted_logits
from ftkit.core.packed_attention import packed_attention
from ftkit.core.packing import SHORTEST_SHARED, make_pack
from ftkit.core.tree_attention import tree_attention
from ftkit.errors import is_out_of_memory

TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float32: 5e-5, torch.float64: 1e-6}
"""Largest relative difference of logits that rounding explains: ten times what models of 8 layers show."""
FEW_ROWS = 16
"""Logits that are compared at once, in float64."""
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")


@torch.no_grad()
def packing_fault(model: Any, examples: Sequence[Example], device: str) -> str | None:
    """None if packed rows give the logits of padded ones in this model, with shared tokens laid out once; else why not.

    Rows of this data, short ones, and one that goes beyond the model's attention window where there is such a row.
    """
    if virtual_tokens(model):
        return "virtual tokens stand in front of every row"
    rows = sorted(rows_to_check(examples, window_of(model)), key=lambda row: row.ids)
    was_training = model.training
    model.eval()
    seen: list[nn.Module] = []

    def watched(module: nn.Module, *inputs: Any, **options: Any) -> tuple[Tensor, None]:
        seen.append(module)
        return tree_attention(module, *inputs, **options)

    try:
        padded = logits_of(model, make_batch(rows).to(device))
        with packed_attention(model, watched):
            packed = logits_of(model, pack_to_batch(make_pack(rows, share=True)).to(device))
    except (
        TypeError,
        ValueError,
        IndexError,
        RuntimeError,
    ) as error:  # its forward pass does not know positions or layouts
        if is_out_of_memory(error):
            raise
        return f"it cannot be told of packs ({str(error).splitlines()[0][:120]})"
    finally:
        model.train(was_training)
    if not seen:
        return "it brings its own attention"
    difference = relative_difference(packed, padded)
    if not difference <= tolerance_of(model, padded.dtype):
        return f"its packed rows give other logits than padded ones (by {difference:.1e})"
    return None


def rows_to_check(examples: Sequence[Example], window: int | None) -> list[Example]:
    """The ends of two short rows, and the same behind a start that they share; their last tokens are counted.

    With a long end each: were positions those of the pack, the second one's would be far off.
    """
    by_length = sorted(examples, key=lambda example: len(example.ids))
    longest, most = len(by_length[-1].ids), 4 * SHORTEST_SHARED
    short = [row.ids[-most:] for row in by_length[:2]]
    stem = (short[0] + short[-1]) * most
    stem = stem[: min(most, longest // 2)]
    rows = [short[0], short[-1], stem + short[0] + stem, stem + short[-1] + stem]
    if window is not None:
        rows += next(([row.ids] for row in by_length if len(row.ids) > window + 1), [])
    cut = [ids[:longest] for ids in rows]
    return [Example(ids, [len(ids) - at <= 2 * most for at in range(len(ids))]) for ids in cut]


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
