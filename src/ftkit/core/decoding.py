"""Prompts that are continued token by token with a KV cache: what is fed, what is masked, which adapter each row has.

Legend: B rows, T tokens of a row, V vocabulary, H heads, d their width.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ftkit.core.adapter_choice import use_adapter, use_any_adapter
from ftkit.core.adapters import virtual_tokens
from ftkit.core.batching import PAD_ID
from ftkit.core.loss import selecting


@dataclass(frozen=True)
class SharedStart:
    """The tokens that all prompts of a task begin with, and their KV cache, of one row.

    is_ours: nobody else goes on from this cache, so it need not be copied.
    """

    length: int
    cache: Any
    is_ours: bool = False


class Decoding:
    """Prompts that are continued together: a batch padded on the left, with its KV cache.

    Pads are masked and positions count from each row's first token, so a row's logits do not depend on its company.
    Rows that have ended are taken out with `keep`, and with them the columns that no remaining row needs.
    With a shared start the pads stand behind it: its columns are the first of every row. An adapter's virtual tokens are
    such a start.

    lengths: tokens of each row so far; width: the longest of them. pending (B, T): tokens not yet in the cache.
    adapters: for each row the name of its adapter, or BASE; where they differ, PEFT runs them in one pass, which must
    be possible (`adapter_choice.unmixable`). None: whatever is on.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        start: SharedStart | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> None:
        from transformers import DynamicCache

        self.tuned = model
        virtual = virtual_tokens(model)
        if virtual:
            start = start or SharedStart(virtual, virtual_cache(model), is_ours=True)
            prompts = [[PAD_ID] * virtual + list(prompt) for prompt in prompts]
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.adapters = list(adapters or [None])
        self.device = self.model.get_input_embeddings().weight.device
        self.takes_positions = "position_ids" in signature(self.model.forward).parameters
        self.lengths = [len(prompt) for prompt in prompts]
        self.width = max(self.lengths)
        self.shared = start.length if start else 0
        if start:
            self.cache = start.cache if start.is_ours else deepcopy(start.cache)
            if len(prompts) > 1:
                self.cache.batch_repeat_interleave(len(prompts))
        else:
            self.cache = DynamicCache(config=self.model.config)
        padded = [[PAD_ID] * (self.width - len(prompt)) + list(prompt[self.shared :]) for prompt in prompts]
        self.pending = torch.tensor(padded, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Logits (B, V), float32, of each row's next token."""
        rows, new = self.pending.shape
        options: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        columns = torch.arange(self.width, device=self.device)
        # (B, 1): how many columns of each row are pads
        pads = torch.tensor([self.width - length for length in self.lengths], device=self.device).unsqueeze(1)
        if min(self.lengths) < self.width:
            options["attention_mask"] = ((columns < self.shared) | (columns >= self.shared + pads)).long()
        if self.takes_positions:
            options["position_ids"] = (columns[-new:] - pads).clamp(min=0)
        last = torch.arange(1, rows + 1, device=self.device) * new - 1
        with selecting(self.model.get_output_embeddings(), last):
            out = self._pass(input_ids=self.pending, **options)
        return out.logits.reshape(rows, -1).float()  # type: ignore[no-any-return]

    def _pass(self, **inputs: Any) -> Any:
        """One pass, each row through its adapter."""
        if len(set(self.adapters)) == 1:
            use_adapter(self.tuned, self.adapters[0])
            return self.model(**inputs)
        use_any_adapter(self.tuned)
        return self.tuned(adapter_names=self.adapters, **inputs)

    def append(self, tokens: Sequence[int]) -> None:
        """The next token of each row."""
        self.pending = torch.tensor(tokens, dtype=torch.int64, device=self.device).unsqueeze(1)
        self.lengths = [length + 1 for length in self.lengths]
        self.width += 1

    def keep(self, places: list[int]) -> None:
        """Go on with these rows of the batch only."""
        index = torch.tensor(places, dtype=torch.int64, device=self.device)
        self.pending, self.lengths = self.pending[index], [self.lengths[place] for place in places]
        if len(self.adapters) > 1:
            self.adapters = [self.adapters[place] for place in places]
        self.cache.batch_select_indices(index)
        self._drop_columns(self.width - max(self.lengths))

    def _drop_columns(self, columns: int) -> None:
        """Forget columns that are padding in every row: less work, and no cache longer than the model's context."""
        from transformers.cache_utils import DynamicLayer

        layers = self.cache.layers
        if columns == 0 or any(type(layer) is not DynamicLayer for layer in layers):
            return
        for layer in layers:
            layer.keys, layer.values = (without_columns(t, self.shared, columns) for t in (layer.keys, layer.values))
        self.width -= columns


def without_columns(tensor: Tensor, at: int, count: int) -> Tensor:
    """(B, H, T, d) without `count` columns from `at`."""
    rest = tensor[:, :, at + count :]
    return torch.cat([tensor[:, :, :at], rest], dim=2) if at else rest


@torch.no_grad()
def virtual_cache(model: Any) -> Any:
    """The KV cache, of one row, that an adapter's virtual tokens give: a prefix is one, a prompt goes through the model."""
    from transformers import DynamicCache

    found = model.get_prompt(batch_size=1)
    if not isinstance(found, Tensor):
        return found
    base = model.get_base_model()
    embeddings = found.to(base.get_input_embeddings().weight.dtype)
    out = base(inputs_embeds=embeddings, past_key_values=DynamicCache(config=base.config), use_cache=True)
    return out.past_key_values
