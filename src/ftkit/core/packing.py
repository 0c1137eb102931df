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

    counted: places in the sequence whose next token is trained, once for each row that trains it; labels: those tokens;
    weights: what each counts in the loss.
    tokens: tokens of the rows, shared ones as often as they occur.
    """

    ids: list[int]
    positions: list[int]
    segments: list[Segment]
    counted: list[int]
    labels: list[int]
    weights: list[float]
    tokens: int


@dataclass
class Builder:
    """A pack while rows are laid out in it."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
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
                self.weights.append(example.weight)
        self.tokens += len(example.ids)

    def places(self, leaf: int) -> list[int]:
        """Places in the pack of a row's tokens, from its root to its leaf."""
        path = []
        while leaf >= 0:
            path.append(self.segments[leaf])
            leaf = path[-1].parent
        return [place for segment in reversed(path) for place in range(segment.start, segment.start + segment.length)]


def make_packs(examples: Sequence[Example], most_tokens: int, *, share: bool) -> list[Pack]:
    """All examples in few packs of at most `most_tokens` tokens; a longer row is a pack of its own.

    Rows of a single token feed and train nothing: they are in no pack.
    """
    return [make_pack(rows, share=share) for rows in rows_of_packs(examples, most_tokens, share=share)]


def rows_of_packs(examples: Sequence[Example], most_tokens: int, *, share: bool) -> list[list[Example]]:
    """Which rows go into which pack. `make_pack` counts their tokens in this order, row after row."""
    examples = [example for example in examples if len(example.ids) > 1]
    chunks = chunks_that_share(examples, most_tokens) if share else [([e], len(e.ids) - 1) for e in examples]
    packs = best_fit(chunks, most_tokens)
    return [sorted(rows, key=lambda example: example.ids) for rows in packs] if share else packs


def chunks_that_share(examples: Sequence[Example], most_tokens: int) -> list[tuple[list[Example], int]]:
    """(rows with a common start, in the order of their tokens; most tokens that they take), each within the budget."""
    chunks: list[tuple[list[Example], int]] = []
    before = None
    for example in sorted(examples, key=lambda example: example.ids):
        shared = shared_length(before, example) if before else 0
        before, alone = example, len(example.ids) - 1
        # a row may lay out up to SHORTEST_SHARED - 1 shared tokens again: a segment that short is not made
        cost = alone - max(0, shared - (SHORTEST_SHARED - 1))
        if shared >= SHORTEST_SHARED and chunks[-1][1] + cost <= most_tokens:
            rows, used = chunks[-1]
            rows.append(example)
            chunks[-1] = (rows, used + cost)
        else:
            chunks.append(([example], alone))
    return chunks


def best_fit(chunks: list[tuple[list[Example], int]], most_tokens: int) -> list[list[Example]]:
    """Chunks of (rows, tokens) in bins, largest first, each where the least room is left (best fit decreasing)."""
    bins: list[tuple[list[Example], int]] = []
    for rows, tokens in sorted(chunks, key=lambda chunk: -chunk[1]):
        room = [(most_tokens - used - tokens, place) for place, (_, used) in enumerate(bins)]
        best = min(((left, place) for left, place in room if left >= 0), default=None)
        if best is None:
            bins.append((rows, tokens))
        else:
            kept, used = bins[best[1]]
            bins[best[1]] = (kept + rows, used + tokens)
    return [rows for rows, _ in bins]


def make_pack(examples: Sequence[Example], *, share: bool) -> Pack:
    """Lay out rows in one pack; with `share` in the order of their tokens, what they have in common once."""
    builder = Builder()
    if share:
        grow(builder, sorted(examples, key=lambda example: example.ids), 0, -1)
    else:
        for example in examples:
            builder.count(example, builder.add_segment(example.ids[:-1], 0, -1))
    return Pack(**vars(builder))


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
