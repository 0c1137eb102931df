"""Many prompts -> their answers, in batches by length: for eval, for what comes through a pipe, for answers side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ftkit.core.adapter_choice import unmixable, use_adapter
from ftkit.core.decoding import SharedStart
from ftkit.core.generation import Answer, Asked, answer_together, honours_padding, length_batches, start_of
from ftkit.core.out_of_memory import in_halves

BATCH = 16
"""Rows that are generated together."""


@dataclass(frozen=True)
class Together:
    """How a model can answer prompts together, asked of the model itself: padded or not, behind a shared start or not."""

    can_pad: bool
    start: SharedStart | None


def how_together(model: Any, prompts: Sequence[Sequence[int]], *, share: bool = True) -> Together:
    """Padding only where it changes no logits, a shared start only where it does not either."""
    if not honours_padding(model, prompts):
        return Together(False, None)
    start = start_of(model, prompts) if share else None
    return Together(True, start if start and honours_padding(model, prompts, start) else None)


def answer_batches(
    model: Any, asked: Sequence[Asked], *, batch: int, together: Together
) -> Iterator[tuple[list[int], list[Answer]]]:
    """(places, their answers) batch by batch, longest prompts first; one that memory lacks for goes on in halves."""

    def write(places: list[int]) -> list[Answer]:
        return answer_together(model, [asked[place] for place in places], together.start)

    for places in length_batches([one.prompt for one in asked], batch, equal_lengths=not together.can_pad):
        yield from in_halves(write, places)


def answer_all(model: Any, asked: Sequence[Asked], batch: int = BATCH) -> list[Answer]:
    """Answers in the order of the prompts, each as it would be alone.

    Prompts for different adapters share their passes where PEFT can do that; a start that prompts share has the keys
    and values of one adapter, so only prompts for one adapter begin with it together.
    """
    found: dict[int, Answer] = {}
    for group in passes(model, [one.adapter for one in asked]):
        some = [asked[place] for place in group]
        adapters = {one.adapter for one in some}
        use_adapter(model, some[0].adapter)
        together = how_together(model, [one.prompt for one in some], share=len(adapters) == 1)
        for places, answers in answer_batches(model, some, batch=batch, together=together):
            found |= zip((group[place] for place in places), answers, strict=True)
    return [found[place] for place in range(len(asked))]


def passes(model: Any, adapters: Sequence[str | None]) -> list[list[int]]:
    """Places of the rows that may be generated together: all, or those of each adapter that mixes with no other."""
    alone = unmixable(model, {name for name in adapters if name is not None}) if len(set(adapters)) > 1 else []
    groups: dict[str | None, list[int]] = {}
    for place, name in enumerate(adapters):
        groups.setdefault(name if name in alone else None, []).append(place)
    return list(groups.values())
