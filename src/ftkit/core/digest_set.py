"""A set of 16-byte digests in about 20 bytes each: a Python set of bytes takes about 100."""

import sys

DIGEST_BYTES = 16
FIRST_BUCKETS = 16
FULLEST = 32
"""Digests in a bucket, on average, when the number of buckets doubles."""


class DigestSet:
    """Digests one behind the other in buckets, which their first bytes choose; a bucket is searched as bytes are.

    Buckets are split one by one, so that growing costs no peak.
    """

    def __init__(self) -> None:
        self._buckets = [bytearray() for _ in range(FIRST_BUCKETS)]
        self._mask = FIRST_BUCKETS - 1
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, digest: bytes) -> bool:
        return find(self._buckets[int.from_bytes(digest[:4], "little") & self._mask], digest)

    def add(self, digest: bytes) -> bool:
        """True if the digest is new."""
        bucket = self._buckets[int.from_bytes(digest[:4], "little") & self._mask]
        if bucket.find(digest) >= 0 and find(bucket, digest):
            return False
        bucket += digest
        self._count += 1
        if self._count > FULLEST * (self._mask + 1):
            self._double()
        return True

    def _double(self) -> None:
        """Move about half of each bucket to a new one, by one more bit."""
        bit = self._mask + 1
        for number in range(bit):
            stay, move = bytearray(), bytearray()
            bucket = self._buckets[number]
            for at in range(0, len(bucket), DIGEST_BYTES):
                digest = bucket[at : at + DIGEST_BYTES]
                if int.from_bytes(digest[:4], "little") & bit:
                    move += digest
                else:
                    stay += digest
            self._buckets[number] = stay
            self._buckets.append(move)
        self._mask = 2 * bit - 1

    @property
    def size_bytes(self) -> int:
        """Memory of the buckets and of the list of them."""
        return sum(map(sys.getsizeof, self._buckets)) + sys.getsizeof(self._buckets)


def find(bucket: bytearray, digest: bytes) -> bool:
    """True if the digest stands in the bucket, at a place where digests begin."""
    at = bucket.find(digest)
    while at >= 0 and at % DIGEST_BYTES:
        at = bucket.find(digest, at + 1)
    return at >= 0
