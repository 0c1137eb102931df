"""A file that threads of its own write and hash, while its maker computes what comes next."""

import ctypes
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

WAITING_BYTES = 1 << 23
"""Of pieces that wait to be written: they are memory. A larger piece is waited for."""
FLUSHED_BYTES = 1 << 25
SYNC_FILE_RANGE_WRITE = 2  # of fcntl.h


class HashedFile:
    """A new file that takes pieces of bytes (anything with the buffer protocol, not changed afterwards).

    What goes wrong in a thread is raised by a later `write` or by the end of the block.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._sha256 = sha256()
        self._threads = ThreadPoolExecutor(1, "write"), ThreadPoolExecutor(1, "hash")
        self._waiting: deque[tuple[Future[int], Future[None]]] = deque()
        self._bytes = 0
        self._flushed = 0

    def __enter__(self) -> "HashedFile":
        return self

    def write(self, piece: Any) -> None:
        """Hand over a piece; waits while too much waits already."""
        view = memoryview(piece).cast("B")
        self._bytes += len(view)
        writing, hashing = self._threads
        self._waiting.append((writing.submit(self._write, view), hashing.submit(self._sha256.update, view)))
        while self._bytes > WAITING_BYTES:
            self._settle_first()

    def _settle_first(self) -> None:
        written, hashed = self._waiting.popleft()
        hashed.result()
        self._bytes -= written.result()

    def _write(self, piece: memoryview) -> int:
        rest = piece
        while rest:  # one call may take a part of it
            rest = rest[self._file.write(rest) :]
        if self._file.tell() - self._flushed >= FLUSHED_BYTES:
            start_flush(self._file.fileno(), self._flushed)
            self._flushed = self._file.tell()
        return len(piece)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Write what still waits; after an error, drop it."""
        try:
            while kind is None and self._waiting:
                self._settle_first()
        finally:
            for thread in self._threads:
                thread.shutdown(cancel_futures=True)
            self._file.close()

    @property
    def sha256(self) -> str:
        """Of the whole file, in hex, once the block has ended."""
        return self._sha256.hexdigest()


def start_flush(descriptor: int, start: int) -> None:
    """Ask Linux to send what was written behind `start` to the disk, without waiting for it: the later fsync finds less
    to do, and is the one that tells of errors. Left alone, the disk does nothing until then."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "sync_file_range"):
            library.sync_file_range(
                descriptor, ctypes.c_longlong(start), ctypes.c_longlong(0), ctypes.c_uint(SYNC_FILE_RANGE_WRITE)
            )
