"""A set of 16-byte digests in 21 to 32 bytes each: a Python set of bytes takes about 100."""

DIGEST_BYTES = 16
TABLES = 256
FIRST_SLOTS = 8
FULLEST = 0.75
GROWTH = 1.5
EMPTY = bytes(DIGEST_BYTES)


class DigestSet:
    """Digests spread over 256 small tables by their first byte; each grows on its own, so growing costs no peak.

    Open addressing with linear probing (Knuth, The Art of Computer Programming, volume 3, section 6.4). The digest of
    sixteen zero bytes stands for an empty slot; a hash gives it with a chance of 2^-128.
    """

    def __init__(self) -> None:
        self._tables = [bytearray(FIRST_SLOTS * DIGEST_BYTES) for _ in range(TABLES)]
        self._used = [0] * TABLES

    def __len__(self) -> int:
        return sum(self._used)

    def __contains__(self, digest: bytes) -> bool:
        table = self._tables[digest[0]]
        return table[(at := find_slot(table, digest)) : at + DIGEST_BYTES] == digest

    def add(self, digest: bytes) -> bool:
        """True if the digest is new."""
        number = digest[0]
        table = self._tables[number]
        at = find_slot(table, digest)
        if table[at : at + DIGEST_BYTES] == digest:
            return False
        table[at : at + DIGEST_BYTES] = digest
        self._used[number] += 1
        if self._used[number] * DIGEST_BYTES > FULLEST * len(table):
            self._tables[number] = grown(table)
        return True

    @property
    def size_bytes(self) -> int:
        """Memory of the tables."""
        return sum(map(len, self._tables))


def find_slot(table: bytearray, digest: bytes) -> int:
    """Byte offset of the digest, or of the empty slot where it belongs."""
    size = len(table)
    at = int.from_bytes(digest[1:8], "little") % (size // DIGEST_BYTES) * DIGEST_BYTES
    while (found := table[at : at + DIGEST_BYTES]) != EMPTY and found != digest:
        at += DIGEST_BYTES
        if at == size:
            at = 0
    return at


def grown(table: bytearray) -> bytearray:
    """The same digests in a larger table."""
    larger = bytearray(int(len(table) // DIGEST_BYTES * GROWTH) * DIGEST_BYTES)
    for start in range(0, len(table), DIGEST_BYTES):
        digest = bytes(table[start : start + DIGEST_BYTES])
        if digest != EMPTY:
            at = find_slot(larger, digest)
            larger[at : at + DIGEST_BYTES] = digest
    return larger
