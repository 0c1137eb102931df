"""A file that a thread of its own writes and hashes, while its maker computes what comes next."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

WAITING_BYTES = 1 << 23
"""Of pieces that wait to be written: they are memory. A larger piece is waited for."""


class HashedFile:
    """A new file that takes pieces of bytes (anything with the buffer protocol, not changed afterwards).

    What goes wrong in the thread is raised by a later `write` or by the end of the block.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._sha256 = sha256()
        self._thread = ThreadPoolExecutor(1, "write")
        self._waiting: deque[Future[int]] = deque()
        self._bytes = 0

    def __enter__(self) -> "HashedFile":
        return self

    def write(self, piece: Any) -> None:
        """Hand over a piece; waits while too much waits already."""
        view = memoryview(piece).cast("B")
        self._bytes += len(view)
        self._waiting.append(self._thread.submit(self._write, view))
        while self._bytes > WAITING_BYTES:
            self._bytes -= self._waiting.popleft().result()

    def _write(self, piece: memoryview) -> int:
        self._sha256.update(piece)
        rest = piece
        while rest:  # one call may take a part of it
            rest = rest[self._file.write(rest) :]
        return len(piece)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Write what still waits; after an error, drop it."""
        try:
            if kind is None:
                for one in self._waiting:
                    one.result()
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._file.close()

    @property
    def sha256(self) -> str:
        """Of the whole file, in hex, once the block has ended."""
        return self._sha256.hexdigest()
