"""Work on several rows that goes on in halves where memory runs out."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from ftkit.core.heap import give_back_free_memory
from ftkit.errors import ExitCode, UserError, is_out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_halves(work: Callable[[list[Item]], Result], items: Sequence[Item]) -> Iterator[tuple[list[Item], Result]]:
    """(items, what `work` made of them): of all at once, or of halves, as often as memory runs out.

    A single item that does not fit is exit 5.
    """
    waiting = [list(items)]
    while waiting:
        part = waiting.pop(0)
        try:
            result = work(part)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                hint = "a smaller --max-new, shorter rows, or a machine with more memory"
                raise UserError("out of memory with a single row", ExitCode.MEMORY, hint=hint) from None
        else:
            yield part, result
            continue
        give_memory_back()
        middle = -(-len(part) // 2)
        waiting[:0] = [part[:middle], part[middle:]]


def give_memory_back() -> None:
    """What the failed attempt held, freed; outside of its `except` block, where its frames are gone."""
    gc.collect()
    give_back_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
