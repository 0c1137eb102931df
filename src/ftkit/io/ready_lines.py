"""Lines of a stream, and whether another one is there already: who asks line by line is answered line by line."""

import os
import select
from collections.abc import Iterator
from typing import IO

PIECE_BYTES = 65_536


class ReadyLines:
    """The lines of a binary stream, each with its end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._bytes = b""
        self._ended = False
        try:
            self._file: int | None = stream.fileno()
        except OSError:  # in memory
            self._file = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while b"\n" not in self._bytes and not self._ended:
            self._read()
        line, end, self._bytes = self._bytes.partition(b"\n")
        if not line and not end:
            raise StopIteration
        return line + end

    def is_ready(self) -> bool:
        """True if the next line that is not blank, or the end, can be had without waiting."""
        while not self._has_line() and not self._ended:
            if self._file is not None and not select.select([self._file], [], [], 0)[0]:
                return False
            self._read()
        return True

    def _has_line(self) -> bool:
        lines = self._bytes[: self._bytes.rfind(b"\n") + 1]
        return bool(lines) and not lines.isspace()

    def _read(self) -> None:
        read = self._stream.read(PIECE_BYTES) if self._file is None else os.read(self._file, PIECE_BYTES)
        self._bytes += read
        self._ended = not read
