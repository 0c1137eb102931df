"""The KV caches of what was read last, kept between the turns of a conversation: only what is new is computed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ftkit.core.adapters import virtual_tokens
from ftkit.core.decoding import Decoding, SharedStart


class KeptCaches:
    """For each adapter of one model: the tokens that it read last, and their KV cache, of one row.

    A prompt that begins with the same tokens goes on from there; what follows them in the cache is cut off, so a turn
    that is taken back or answered again costs no more than one that follows. Caches of attention layers can be cut;
    one with a window only while it has lost nothing; recurrent states cannot, and are not kept.

    computed: how many tokens of the last prompt had to be computed.
    """

    def __init__(self) -> None:
        self.computed = 0
        self._kept: dict[str | None, tuple[list[int], Any]] = {}

    @contextmanager
    def decoding(
        self, model: Any, adapter: str | None, prompt: Sequence[int], written: Sequence[int]
    ) -> Iterator[Decoding]:
        """Continue a prompt; what was read of it and of `written`, which grows meanwhile, is kept afterwards.

        Not after an error or an interruption, which may have come in the middle of a pass; and not where virtual tokens
        stand in front, which no prompt names.
        """
        if virtual_tokens(model):
            self.computed = len(prompt)
            yield Decoding(model, [prompt], None, [adapter])
            return
        start = self._take(adapter, prompt)
        self.computed = len(prompt) - (start.length if start else 0)
        decoding = Decoding(model, [prompt], start, [adapter])
        try:
            yield decoding
        except GeneratorExit:  # whoever listens has heard enough
            self._keep(adapter, decoding.cache, [*prompt, *written])
            raise
        self._keep(adapter, decoding.cache, [*prompt, *written])

    def drop(self) -> None:
        """Forget them all, where memory is short or the model has changed."""
        self._kept.clear()

    def _take(self, adapter: str | None, prompt: Sequence[int]) -> SharedStart | None:
        """What the prompt shares with the kept tokens, taken out. One token at least is left to feed."""
        ids, cache = self._kept.pop(adapter, ([], None))
        shared = common_length(ids, prompt[:-1])
        if shared == 0 or not can_cut(cache, len(ids) - shared):
            return None
        if shared < len(ids):
            cache.crop(shared - len(ids))
        return SharedStart(shared, cache, is_ours=True)

    def _keep(self, adapter: str | None, cache: Any, ids: list[int]) -> None:
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            self._kept[adapter] = (ids[: cache.get_seq_length()], cache)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def can_cut(cache: Any, count: int) -> bool:
    """True if the last `count` tokens can be taken out of the cache: a window has not yet moved on past others."""
    windows = [layer for layer in cache.layers if getattr(layer, "sliding_window", None) is not None]
    return count == 0 or all(layer.get_seq_length() < layer.sliding_window for layer in windows)
