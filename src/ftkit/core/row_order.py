"""Which rows of a stream are taken, and how several streams become one: all seeded, all without knowing the end."""

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ftkit.errors import ExitCode, UserError

T = TypeVar("T")


def parse_sample(text: str) -> int | float:
    """`500` rows as an int, `0.1` of the rows as a float."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if number.is_integer() and number >= 1 and "." not in text:
        return int(number)
    if 0 < number < 1:
        return number
    raise UserError(f"--sample {text} is no number of rows", ExitCode.USAGE, hint="--sample 500, or a share: 0.1")


def sampled(rows: Iterator[T], wanted: int | float, seed: int, leave_out: Callable[[], None]) -> Iterator[T]:
    """A uniform sample in the order of the rows; `leave_out` is called for each row that is not in it.

    Each row draws a number; a share takes those below it, a count takes the smallest, which it holds in memory.
    """
    draw = random.Random(f"sample {seed}").random
    if isinstance(wanted, float):
        for row in rows:
            if draw() < wanted:
                yield row
            else:
                leave_out()
        return
    kept: list[tuple[float, int, T]] = []
    for number, row in enumerate(rows):
        entry = (-draw(), number, row)  # numbers differ, so rows are never compared
        if len(kept) < wanted:
            heapq.heappush(kept, entry)
        else:
            heapq.heappushpop(kept, entry)
            leave_out()
    yield from (row for _, _, row in sorted(kept, key=lambda entry: entry[1]))


def quotas(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in these proportions that sum to total: the largest remainders are rounded up."""
    exact = [total * weight for weight in weights]
    whole = [int(number) for number in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def mixed(
    streams: Sequence[Iterator[T]], weights: Sequence[float], leave_out: Callable[[], None]
) -> Iterator[tuple[int, T]]:
    """(number of its stream, row): always from the stream that is furthest behind its weight.

    So any beginning of the output has the proportions, to within a row for each stream. It ends when the stream whose
    turn it is has no row left: none is repeated; `leave_out` is called for each row of the others that remains.
    """
    taken = [0] * len(streams)
    while True:
        total = sum(taken) + 1
        turn = max(range(len(streams)), key=lambda i: weights[i] * total - taken[i])
        try:
            row = next(streams[turn])
        except StopIteration:
            break
        taken[turn] += 1
        yield turn, row
    for stream in streams:
        for _ in stream:
            leave_out()
