"""Put a stream in random order, whatever its size: rows that memory does not hold wait in files."""

import random
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import IO

HELD_BYTES = 64 * 2**20
"""What is shuffled in memory; a longer stream goes through files."""
FILES = 64
KEY_BITS = 64
HEADER = struct.Struct("<QI")
"""The row's random key and its length."""


def shuffled(lines: Iterator[bytes], seed: int, held_bytes: int = HELD_BYTES) -> Iterator[bytes]:
    """The lines in the order of random keys, one drawn for each: every order is equally likely.

    The order is the same whether files are used or not: keys are sorted either way, in files by their first bits.
    """
    draw = random.Random(f"shuffle {seed}").getrandbits
    held: list[tuple[int, bytes]] = []
    size = 0
    for line in lines:
        held.append((draw(KEY_BITS), line))
        size += len(line)
        if size > held_bytes:
            yield from through_files(held, lines, draw)
            return
    held.sort(key=lambda pair: pair[0])
    for _, line in held:
        yield line


def through_files(held: list[tuple[int, bytes]], rest: Iterator[bytes], draw: Callable[[int], int]) -> Iterator[bytes]:
    """The same order by way of files, each of which holds the lines of one range of keys."""
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(prefix="ftkit-shuffle-")) for _ in range(FILES)]
        for key, line in held:
            put(files, key, line)
        held.clear()
        for line in rest:
            put(files, draw(KEY_BITS), line)
        for file in files:
            for _, line in sorted(pairs_in(file), key=lambda pair: pair[0]):
                yield line


def put(files: Sequence[IO[bytes]], key: int, line: bytes) -> None:
    """Append a line to the file of its key."""
    files[key * len(files) >> KEY_BITS].write(HEADER.pack(key, len(line)) + line)


def pairs_in(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The keys and lines of a file."""
    file.seek(0)
    while header := file.read(HEADER.size):
        key, length = HEADER.unpack(header)
        yield key, file.read(length)
