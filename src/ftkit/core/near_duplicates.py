"""Rows that are nearly equal to an earlier one, found by MinHash (Broder 1997, On the resemblance and containment of documents).

Two texts are near if the Jaccard similarity of their word triples is at least a threshold, as estimated from 128 minima.
Making a row's sketch depends on the row alone, so any process can do it; comparing sketches is done in one place.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from xxhash import xxh32_intdigest

from ftkit.errors import ExitCode, UserError

WORDS = re.compile(r"[^\W_]+")
SHINGLE_WORDS = 3
PERMUTATIONS = 128
MINIMUM_BYTES = 4
SKETCH_TYPE = f"<u{MINIMUM_BYTES}"


class Sketcher:
    """Makes the sketches of rows."""

    def __init__(self) -> None:
        self._sketch = import_datasketch().MinHash(num_perm=PERMUTATIONS, hashfunc=xxh32_intdigest)

    def sketch(self, texts: Iterable[str]) -> bytes:
        """The minima of a row's word triples under each permutation, 512 bytes."""
        self._sketch.clear()
        self._sketch.update_batch(list(shingles(texts)))
        minima: bytes = self._sketch.hashvalues.astype(SKETCH_TYPE).tobytes()
        return minima


class NearDuplicates:
    """Remembers the sketch of every row that was new, about 1.5 KB each. The first row of a cluster is the one kept."""

    def __init__(self, threshold: float) -> None:
        import_datasketch()
        import numpy as np

        self.threshold = threshold
        self.clusters: Counter[str] = Counter()
        """Near duplicates of each row that has any, by the row's place."""
        self._numpy = np
        self._kept: list[tuple[str, bytes]] = []
        self._bands = [(first, last, dict[int, tuple[int, ...]]()) for first, last in bands(threshold)]

    def is_new(self, sketch: bytes, place: str) -> bool:
        """False, and counted to its cluster, for a row that is near to an earlier one."""
        keys = [hash(sketch[first:last]) for first, last, _ in self._bands]
        found: set[int] = set()
        for key, (_, _, rows) in zip(keys, self._bands, strict=True):
            found.update(rows.get(key, ()))
        for number in sorted(found):
            earlier, other = self._kept[number]
            if self.similarity(sketch, other) >= self.threshold:
                self.clusters[earlier] += 1
                return False
        this = (len(self._kept),)  # one tuple for all bands, where nothing else lies
        for key, (_, _, rows) in zip(keys, self._bands, strict=True):
            rows[key] = rows.get(key, ()) + this
        self._kept.append((place, sketch))
        return True

    def similarity(self, one: bytes, other: bytes) -> float:
        """Estimated Jaccard similarity: the share of equal minima."""
        minima, others = (self._numpy.frombuffer(sketch, SKETCH_TYPE) for sketch in (one, other))
        return int((minima == others).sum()) / PERMUTATIONS


def bands(threshold: float) -> list[tuple[int, int]]:
    """Parts of a sketch (bytes from, to) of which near rows have one in common, most likely.

    How many and how long is what datasketch chooses, where rows that are found in vain and those that are missed are few.
    """
    index: Any = import_datasketch().MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    size = index.r * MINIMUM_BYTES
    return [(number * size, (number + 1) * size) for number in range(index.b)]


def import_datasketch() -> Any:
    """The library, or an error that says how to get it."""
    try:
        import datasketch
    except ImportError:
        raise UserError(
            "--dedupe near needs datasketch", ExitCode.ENVIRONMENT, hint="pip install 'ftkit[near]', or --dedupe exact"
        ) from None
    return datasketch


def shingles(texts: Iterable[str]) -> Iterator[bytes]:
    """The triples of words in lower case; a text of fewer words is one shingle. Without spaces: letters."""
    for text in texts:
        words = WORDS.findall(text.lower())
        if len(words) < SHINGLE_WORDS:
            words = list("".join(words))
        for at in range(max(1, len(words) - SHINGLE_WORDS + 1)):
            yield " ".join(words[at : at + SHINGLE_WORDS]).encode()
