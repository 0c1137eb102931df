"""Rows of a global batch -> packs: one sequence each, no padding, tokens that rows share from their start laid out once.

A pack is a forest (prefix trie). Each segment is a run of tokens that the same rows share; it attends to its ancestors
and causally to itself; positions are those of a row alone. Every row is a path from a root to a leaf, so its loss and
gradients are those of the row run alone (up to rounding), and shared tokens are computed once for all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ftkit.core.encoding import Example

SHORTEST_SHARED = 16
"""Tokens that rows must share for a segment of its own: shorter ones cost more calls than they save work."""


@dataclass(frozen=True)
class Segment:
    """Tokens start..start+length of a pack, at positions `depth`... of their rows, below the segment `parent` (or -1)."""

    start: int
    length: int
    depth: int
    parent: int


@dataclass(frozen=True)
class Pack:
    """One sequence of T tokens: ids and positions (T), its segments in order, and where tokens are counted.

    counted: places in the sequence whose next token is trained, once for each row that trains it; labels: those tokens.
    tokens: tokens of the rows, shared ones as often as they occur.
    """

    ids: list[int]
    positions: list[int]
    segments: list[Segment]
    counted: list[int]
    labels: list[int]
    tokens: int


@dataclass
class Builder:
    """A pack while rows are laid out in it."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    tokens: int = 0

    def add_segment(self, tokens: Sequence[int], depth: int, parent: int) -> int:
        """Append a run of tokens; its number."""
        self.segments.append(Segment(len(self.ids), len(tokens), depth, parent))
        self.ids += tokens
        self.positions += range(depth, depth + len(tokens))
        return len(self.segments) - 1

    def count(self, example: Example, leaf: int) -> None:
        """Mark the counted tokens of a row whose path ends in segment `leaf`."""
        places = self.places(leaf)
        for at in range(1, len(example.ids)):
            if example.counted[at]:
                self.counted.append(places[at - 1])
                self.labels.append(example.ids[at])
        self.tokens += len(example.ids)

    def places(self, leaf: int) -> list[int]:
        """Places in the pack of a row's tokens, from its root to its leaf."""
        path = []
        while leaf >= 0:
            path.append(self.segments[leaf])
            leaf = path[-1].parent
        return [place for segment in reversed(path) for place in range(segment.start, segment.start + segment.length)]


def make_packs(examples: Sequence[Example], most_tokens: int, *, share: bool) -> list[Pack]:
    """All examples in as few packs as `most_tokens` allows (a longer row is a pack of its own).

    With `share`, rows are laid out in the order of their tokens, so that rows with a common start come together.
    """
    ordered = (
        sorted(examples, key=lambda example: example.ids) if share else sorted(examples, key=lambda e: -len(e.ids))
    )
    groups: list[list[Example]] = []
    used = 0
    for place, example in enumerate(ordered):
        shared = useful_prefix(ordered[place - 1], example) if share and groups else 0
        cost = len(example.ids) - 1 - shared
        if not groups or used + cost > most_tokens:
            groups.append([])
            used, cost = 0, len(example.ids) - 1
        groups[-1].append(example)
        used += cost
    return [make_pack(group, share=share) for group in groups]


def make_pack(examples: Sequence[Example], *, share: bool) -> Pack:
    """Lay out rows in one pack; with `share` they are in the order of their tokens."""
    builder = Builder()
    if share:
        grow(builder, list(examples), 0, -1)
    else:
        for example in examples:
            builder.count(example, builder.add_segment(example.ids[:-1], 0, -1))
    return Pack(builder.ids, builder.positions, builder.segments, builder.counted, builder.labels, builder.tokens)


def grow(builder: Builder, rows: list[Example], depth: int, parent: int) -> None:
    """Lay out rows that share their first `depth` tokens, which end in segment `parent`."""
    for run in runs_that_share(rows, depth):
        if len(run) == 1:
            rest = run[0].ids[depth:-1]
            builder.count(run[0], builder.add_segment(rest, depth, parent) if rest else parent)
            continue
        common = min(shared_length(a, b) for a, b in pairwise(run))
        grow(builder, run, common, builder.add_segment(run[0].ids[depth:common], depth, parent))


def runs_that_share(rows: list[Example], depth: int) -> list[list[Example]]:
    """Neighbours that share at least SHORTEST_SHARED tokens beyond `depth` stay together."""
    runs: list[list[Example]] = []
    for row in rows:
        if runs and shared_length(runs[-1][-1], row) >= depth + SHORTEST_SHARED:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def useful_prefix(before: Example, row: Example) -> int:
    """Tokens that a row shares with the one before it, if they are enough to be laid out once."""
    shared = shared_length(before, row)
    return shared if shared >= SHORTEST_SHARED else 0


def shared_length(a: Example, b: Example) -> int:
    """Tokens that two rows have in common from their start, their last ones (which are never fed) left out."""
    most = min(len(a.ids), len(b.ids)) - 1
    low, high = 0, most
    if a.ids[:most] == b.ids[:most]:
        return most
    while low < high:  # the first difference, by halving: slices compare in C
        middle = (low + high + 1) // 2
        if a.ids[low:middle] == b.ids[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
