"""Next-token loss in nats, summed over the counted tokens; the output head runs only where a token is counted.

Legend: B rows, T tokens of a row, N counted tokens, D width, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkit.core.adapters import virtual_tokens
from ftkit.core.batching import Batch
from ftkit.core.chunked_loss import Targets, chunk_size, counted_hidden, loss_in_chunks
from ftkit.core.compiled_shapes import PACK_MULTIPLE, fill_of
from ftkit.core.packed_attention import attends_in_packs
from ftkit.core.tree_attention import Layout


def summed_loss(model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
    """Sum of -log p(counted token | tokens before it), () in nats; divide by batch.divisor for the mean.

    Each token counts times its weight. smoothing: see `Targets`. float32, or float64 for a float64 model.
    """
    targets = Targets(batch.labels, batch.weights, smoothing)
    head = model.get_output_embeddings()  # type: ignore[operator]
    size = chunk_size(getattr(head, "out_features", 0) or batch.labels.numel())
    if batch.counted.numel() > size:
        first = batch.counted[:1]  # one position goes through the head: the body is what this pass is for
        counted = behind_virtual(model, batch.counted, batch.input_ids)
        hidden = counted_hidden(model, counted, lambda: counted_logits(model, batch.input_ids, first, **batch.packing))
        if hidden is not None:
            return loss_in_chunks(model, hidden, targets, size)
    fill = fill_of(batch.counted.numel(), PACK_MULTIPLE, getattr(head, "weight", batch.counted))
    return targets.nats(counted_logits(model, batch.input_ids, F.pad(batch.counted, (0, fill)), **batch.packing))


def counted_logits(
    model: Any, input_ids: Tensor, counted: Tensor, position_ids: Tensor | None = None, layout: Layout | None = None
) -> Tensor:
    """Logits (N, V) at the positions `counted`, int64 (N,), of the flattened input_ids (B, T).

    A hook in front of the output head keeps only those hidden states, so whatever the architecture does with the
    logits afterwards (soft cap, scale) still happens, on N instead of B*T rows. Rows are padded on the right and
    attention is causal, so no counted token ever sees a pad: no attention mask is needed. A packed sequence brings its
    position_ids (1, T) and its layout, for which the model must be inside `packed_attention`.
    """
    packing: dict[str, Any] = {}
    counted = behind_virtual(model, counted, input_ids)
    if layout is not None:
        assert attends_in_packs(model), "rows of a pack would see each other"
        embeddings = model.get_input_embeddings().weight
        input_ids, packing = filled_pack(input_ids, position_ids, layout, embeddings)
    with selecting(model.get_output_embeddings(), counted):
        logits: Tensor = model(input_ids=input_ids, use_cache=False, **packing).logits
    return logits.flatten(0, 1)


def filled_pack(
    input_ids: Tensor, position_ids: Tensor | None, layout: Layout, embeddings: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Ids, position_ids and layout of a pack, with one more segment where its length should come again; nobody sees it."""
    fill = fill_of(input_ids.shape[1], PACK_MULTIPLE, embeddings)
    if not fill or position_ids is None or layout.spans is not None:
        return input_ids, {"position_ids": position_ids, "layout": layout}
    layout = Layout((*layout.lengths, fill), (*layout.ancestors, ()))
    return F.pad(input_ids, (0, fill)), {"position_ids": F.pad(position_ids, (0, fill)), "layout": layout}


def behind_virtual(model: Any, counted: Tensor, input_ids: Tensor) -> Tensor:
    """Positions of the flattened input_ids (B, T) among hidden states that have those of virtual tokens in front."""
    virtual = virtual_embeddings(model)
    return counted + virtual * (counted // input_ids.shape[1] + 1) if virtual else counted


def virtual_embeddings(model: Any) -> int:
    """Virtual tokens that go through the model as embeddings (a prompt); those of a prefix are in the cache only."""
    is_prefix = any(c.peft_type == "PREFIX_TUNING" for c in getattr(model, "peft_config", {}).values())
    return 0 if is_prefix else virtual_tokens(model)


@contextmanager
def selecting(head: nn.Module, counted: Tensor) -> Iterator[None]:
    """While open, `head` sees hidden states (1, N, D) at `counted` instead of (B, T, D)."""

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden.flatten(0, 1).index_select(0, counted).unsqueeze(0), *inputs[1:])

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], device: str) -> tuple[float, int]:
    """(nats per counted token, counted tokens) over batches, in evaluation mode; the mode is set back afterwards.

    Losses are asked for at the end: a GPU works on the next batch while this one's is prepared.
    """
    was_training = model.training
    model.eval()
    losses: list[Tensor] = []
    tokens = 0
    try:
        for batch in batches:
            losses.append(summed_loss(model, batch.to(device)))
            tokens += batch.counted.numel()
        nats = sum(torch.stack(losses).tolist())
    finally:  # where memory runs out it is tried again, and a stop is saved: the mode must not stay behind
        model.train(was_training)
    return nats / tokens, tokens
