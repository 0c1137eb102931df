"""Switch a model's attention to packs for as long as it trains, and back."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from transformers import AttentionInterface

from ftkit.core.tree_attention import tree_attention

NAME = "ftkit_tree"
"""What transformers knows our attention by. No mask function has this name, so transformers builds no mask."""


@contextmanager
def packed_attention(
    model: nn.Module, attention: Callable[..., Any] = tree_attention
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """While open, the model's layers attend by `attention`; backward passes that recompute activations belong inside.

    Padded batches keep working in it. Afterwards every config says what it said before, so what is saved or evaluated
    later is not touched. Architectures that bring their own attention ignore all this: see `packing_fault`.
    Gives what opens a block in which they say it already, for passes with a cache.
    """
    AttentionInterface.register(NAME, attention)
    before = [(config, config._attn_implementation) for config in configs_of(model)]
    ours = [(config, NAME) for config, _ in before]

    @contextmanager
    def suspended() -> Iterator[None]:
        set_attention(before)
        try:
            yield
        finally:
            set_attention(ours)

    set_attention(ours)
    try:
        yield suspended
    finally:
        set_attention(before)


def set_attention(names: list[tuple[Any, str]]) -> None:
    """Let each config name this attention."""
    for config, name in names:
        config._attn_implementation = name


def attends_in_packs(model: Any) -> bool:
    """True inside `packed_attention`."""
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def configs_of(model: nn.Module) -> list[Any]:
    """The configs that a model's modules read, outer ones (which set inner ones) first."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())
