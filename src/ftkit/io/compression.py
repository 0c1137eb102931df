"""Packed inputs: gzip and Zstandard are unpacked as they are read, known by their first bytes."""

import gzip
import io
import zlib
from pathlib import PurePath
from typing import IO, Any

from ftkit.errors import ExitCode, UserError

CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard"}
CODEC_OF_SUFFIX = {".gz": "gzip", ".zst": "Zstandard"}
MAGIC_BYTES = 4


class Rewound(io.RawIOBase):
    """A stream whose head was read, readable again from its start."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self.head, self.rest = io.BytesIO(head), rest

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """From the head as long as there is some, then from the rest."""
        return self.head.readinto(buffer) or what_has_come(self.rest, buffer)


def what_has_come(stream: Any, buffer: memoryview) -> int:
    """Put into the buffer what can be had of a stream without waiting more than once; how many bytes that is.

    Not readinto1: for a buffer larger than its own, it waits although it has something.
    """
    data = stream.read1(len(buffer))
    buffer[: len(data)] = data
    return len(data)


class Unpacked(io.RawIOBase):
    """The content of a packed stream; damage is a data error that names file and codec."""

    def __init__(self, packed: Any, name: str, codec: str) -> None:
        self.packed, self.name, self.codec = packed, name, codec

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """The next bytes."""
        try:
            data = self.packed.read(len(buffer))
        except (EOFError, OSError, zlib.error) as error:
            reason = str(error).strip().rstrip(".") or type(error).__name__
            raise UserError(
                f"{self.name}: damaged {self.codec}: {reason}", ExitCode.DATA, hint="get the file again"
            ) from None
        buffer[: len(data)] = data
        return len(data)


def unpack(stream: IO[bytes], name: str) -> IO[bytes]:
    """The stream itself, or what is in it where it is gzip or Zstandard."""
    head = stream.read(MAGIC_BYTES)
    whole = io.BufferedReader(Rewound(head, stream), buffer_size=1 << 16)
    codec = next((codec for magic, codec in CODECS.items() if head.startswith(magic)), None)
    promised = CODEC_OF_SUFFIX.get(PurePath(name).suffix.lower())
    if promised != codec and promised is not None and head:
        raise UserError(f"{name}: not {promised}, as its name says", ExitCode.DATA, hint="rename it to what it is")
    if codec is None:
        return whole
    packed = gzip.GzipFile(fileobj=whole) if codec == "gzip" else open_zstandard(whole)
    return io.BufferedReader(Unpacked(packed, name, codec), buffer_size=1 << 16)


def open_zstandard(stream: IO[bytes]) -> Any:
    """The content of a Zstandard stream, through pyarrow, which is there for Parquet anyway."""
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")
