"""Which rows a run holds out for validation: decided by each row's content, so it stays when rows are added."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import orjson

LEAST_ROWS = 8
LARGEST_SHARE = 0.25


def content_hash(row: dict[str, Any]) -> int:
    """64 bits of the row's content; equal rows have equal hashes, whatever the order of their keys."""
    return int.from_bytes(blake2b(orjson.dumps(row, option=orjson.OPT_SORT_KEYS), digest_size=8).digest(), "big")


def hold_out(rows: Sequence[dict[str, Any]], share: float) -> tuple[list[int], list[int]]:
    """(indices to train on, indices held out). Equal rows stay together.

    At least LEAST_ROWS are held out where that is no more than a quarter of all; with fewer rows, a quarter.
    """
    if share <= 0:
        return list(range(len(rows))), []
    hashes = [content_hash(row) for row in rows]
    distinct = sorted(set(hashes))
    wanted = min(LEAST_ROWS, int(len(distinct) * LARGEST_SHARE))
    by_share = sum(value < share * 2**64 for value in distinct)
    chosen = set(distinct[: max(wanted, by_share)])
    if len(chosen) == len(distinct):
        chosen = set(distinct[: len(distinct) // 2])
    train = [i for i, value in enumerate(hashes) if value not in chosen]
    return train, [i for i, value in enumerate(hashes) if value in chosen]


def held_of(rows: Sequence[dict[str, Any]], origin: Sequence[int], share: float) -> set[int]:
    """Rows held out, of those that became examples; origin: the row of each example. A long row of many is on one side."""
    kept = sorted(set(origin))
    return {kept[place] for place in hold_out([rows[i] for i in kept], share)[1]}
