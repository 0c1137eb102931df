"""Rows that are nearly equal to an earlier one, found by MinHash."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from ftkit.errors import ExitCode, UserError

WORDS = re.compile(r"[^\W_]+")
SHINGLE_WORDS = 3
PERMUTATIONS = 128


class NearDuplicates:
    """Remembers the sketch of every row that was new (about 2 KB each).

    Two texts are near if the Jaccard similarity of their word triples is at least the threshold, as estimated from 128
    minima (Broder 1997, On the resemblance and containment of documents). The first row of a cluster is the one kept.
    """

    def __init__(self, threshold: float) -> None:
        datasketch = import_datasketch()
        self.threshold = threshold
        self.clusters: Counter[str] = Counter()
        """Near duplicates of each row that has any, by the row's place."""
        self._sketch = datasketch.MinHash
        self._sketches: dict[str, Any] = {}
        self._index = datasketch.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)

    def is_new(self, texts: Iterable[str], place: str) -> bool:
        """False, and counted to its cluster, for a row that is near to an earlier one."""
        sketch = self._sketch(num_perm=PERMUTATIONS, hashfunc=hash_32)
        sketch.update_batch(list(shingles(texts)))
        for other in sorted(self._index.query(sketch)):
            if sketch.jaccard(self._sketches[other]) >= self.threshold:
                self.clusters[other] += 1
                return False
        self._index.insert(place, sketch)
        self._sketches[place] = sketch
        return True


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


def hash_32(data: bytes) -> int:
    """32 bits that are the same on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big")
