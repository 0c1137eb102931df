"""The loss in chunks of counted positions, so that the logits of all of them never exist at once.

The model's body runs once. Then its own forward pass runs for each chunk on hidden states that the body is made to
return, so whatever an architecture does around its output head (soft caps, scales) is done, without a list of them here.

Legend: N counted tokens, n of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from ftkit.core.batch_sizes import CHUNK_LOGITS, SMALLEST_CHUNK
from ftkit.core.compiled_shapes import PACK_MULTIPLE, fill_of

IGNORED = -100
"""A label that cross-entropy passes over."""
CACHED_LOGITS = 2**20
"""Logits that are worked on at once on a CPU: 4 MiB in float32."""


def chunk_size(vocabulary: int) -> int:
    """Positions of a chunk."""
    return max(SMALLEST_CHUNK, CHUNK_LOGITS // vocabulary)


def loss_in_chunks(model: Any, hidden: Tensor, targets: "Targets", size: int) -> Tensor:
    """Summed next-token loss () in nats: hidden (N, D) of the model's body at counted positions.

    Where nothing is trained behind the body, the gradient of `hidden` is all that the backward pass needs: it is computed
    chunk by chunk on the way, and neither logits nor their gradients are kept. Else chunks are computed again in the
    backward pass.
    """
    causal = causal_model(model)
    body = set(causal.get_decoder().parameters())

    def nats(rows: Tensor, chosen: Targets) -> Tensor:
        fill = fill_of(len(rows), PACK_MULTIPLE, rows)
        return chosen.nats(logits_of_rows(causal, F.pad(rows, (0, 0, 0, fill))))

    pairs = zip(torch.split(hidden, size), targets.split(size), strict=True)
    head_learns = any(p.requires_grad and p not in body for p in causal.parameters()) or tied_head_learns(causal)
    if not torch.is_grad_enabled():
        return torch.stack([nats(rows, chosen) for rows, chosen in pairs]).sum()
    if head_learns or not hidden.requires_grad:
        return torch.stack([checkpoint(nats, rows, chosen, use_reentrant=False) for rows, chosen in pairs]).sum()
    loss: Tensor = GradientOnTheWay.apply(hidden, targets, nats, size)  # type: ignore[no-untyped-call]
    return loss


@dataclass(frozen=True)
class Targets:
    """What counted positions should say: labels int64 (n,), and what each counts, weights float32 (n,); None: each 1.

    smoothing: share s of a label's probability that goes to all V tokens evenly, so that the loss of a position is
    (1 - s) * -log p(label) + s * mean over V of -log p (arXiv:1512.00567, section 7).
    """

    labels: Tensor
    weights: Tensor | None = None
    smoothing: float = 0.0

    def split(self, size: int) -> "list[Targets]":
        """The same in chunks of `size` positions."""
        labels = torch.split(self.labels, size)
        weights = [None] * len(labels) if self.weights is None else torch.split(self.weights, size)
        return [Targets(*pair, self.smoothing) for pair in zip(labels, weights, strict=True)]

    def nats(self, logits: Tensor) -> Tensor:
        """The summed loss of logits (n, V) -> (), in float32 at least. On a CPU there may be further rows, for nothing."""
        if logits.device.type == "cpu":
            loss: Tensor = NatsInCache.apply(logits, self)  # type: ignore[no-untyped-call]
            return loss
        count = len(self.labels)
        labels = F.pad(self.labels, (0, len(logits) - count), value=IGNORED)  # a simulated CPU has further rows, too
        losses = F.cross_entropy(
            logits.to(wide_format(logits)),
            labels,
            reduction="none",
            label_smoothing=self.smoothing,
            ignore_index=IGNORED,
        )[:count]
        return (losses if self.weights is None else losses * self.weights).sum()


def wide_format(logits: Tensor) -> torch.dtype:
    """float32, or float64 for float64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


class NatsInCache(torch.autograd.Function):
    """Cross-entropy, summed, a few rows at a time, so that float32 copies of logits stay in a CPU's cache.

    The gradient of a row is softmax(logits) - (1 - s) onehot(label) - s / V, times its weight, so it is made of the
    softmax that the loss needs anyway.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Targets) -> Tensor:
        """logits (n, V) -> () in nats; keeps the gradient, (n, V) in the logits' format."""
        size, smoothing = rows_in_cache(logits), targets.smoothing
        gradient, count = torch.empty_like(logits), len(targets.labels)
        gradient[count:] = 0
        place = logits.new_empty((min(size, count), logits.shape[1]), dtype=wide_format(logits))
        losses = []
        parts = (torch.split(part[:count], size) for part in (logits, gradient))
        for rows, kept, target in zip(*parts, targets.split(size), strict=True):
            found, chosen = place[: len(rows)].copy_(rows), target.labels.unsqueeze(1)
            expected = found.gather(1, chosen).squeeze(1)
            if smoothing:
                expected = (1 - smoothing) * expected + smoothing * found.mean(dim=-1)
            likeliest = found.amax(dim=-1)
            torch._softmax(found, -1, False, out=found)
            # the label's own probability may be too small for the format, that of the likeliest token is not
            nats = likeliest - found.amax(dim=-1).log() - expected
            found.scatter_add_(1, chosen, found.new_full(chosen.shape, smoothing - 1))
            if smoothing:
                found -= smoothing / found.shape[1]
            if target.weights is not None:
                nats *= target.weights
                found *= target.weights.unsqueeze(1)
            losses.append(nats.sum())
            kept.copy_(found)
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        """(n, V) in the logits' format."""
        (gradient,) = ctx.saved_tensors
        return gradient if upstream[0] == 1 else gradient * upstream[0], None


def rows_in_cache(logits: Tensor) -> int:
    """Rows that are worked on at once."""
    return max(1, CACHED_LOGITS // logits.shape[1])


class GradientOnTheWay(torch.autograd.Function):
    """The summed loss of all chunks, with the gradient of the hidden states taken chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Targets, nats: Callable[[Tensor, Targets], Tensor], size: int
    ) -> Tensor:
        """() in nats; keeps the gradient, (N, D) in the format of `hidden`."""
        gradient = torch.empty_like(hidden)
        losses = []
        parts = (torch.split(tensor, size) for tensor in (hidden, gradient))
        for rows, place, chosen in zip(*parts, targets.split(size), strict=True):
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                loss = nats(leaf, chosen)
                (found,) = torch.autograd.grad(loss, leaf)
            place.copy_(found)
            losses.append(loss.detach())
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        """The kept gradient times the loss's own, which in float16 may be infinite where the product is not."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None, None


def causal_model(model: Any) -> Any:
    """The transformers model inside PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def tied_head_learns(causal: Any) -> bool:
    """True if the output head's own weight is trained, also where it is the body's embedding."""
    return any(p.requires_grad for p in causal.get_output_embeddings().parameters())


def logits_of_rows(causal: Any, rows: Tensor) -> Tensor:
    """What the model makes of hidden states (n, D) of its body: logits (n, V)."""
    ids = torch.zeros((1, len(rows)), dtype=torch.int64, device=rows.device)
    with body_returns(causal.get_decoder(), rows.unsqueeze(0)):
        logits: Tensor = causal(input_ids=ids, use_cache=False).logits
    return logits.squeeze(0)


class OnlyHidden(BaseModelOutputWithPast):  # type: ignore[misc]
    """What a body returns; all else that a model asks of its own kind of output (router logits) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@contextmanager
def body_returns(body: nn.Module, hidden: Tensor) -> Iterator[None]:
    """While open, the body computes nothing and returns `hidden` (1, n, D)."""
    body.forward = lambda *_, **__: OnlyHidden(last_hidden_state=hidden)
    try:
        yield
    finally:
        del body.forward


def counted_hidden(model: Any, counted: Tensor, run: Callable[[], Any]) -> Tensor | None:
    """Hidden states (N, D) of the body at `counted`, from one forward pass `run` of the whole model.

    The output head sees a single position in it. None if the model does not call the body that transformers names.
    """
    caught: list[Tensor] = []
    body = causal_model(model).get_decoder()

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        caught.append(output[0])

    hook = body.register_forward_hook(keep)
    try:
        run()
    finally:
        hook.remove()
    return caught[0].flatten(0, 1).index_select(0, counted) if len(caught) == 1 else None
