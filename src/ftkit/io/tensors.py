"""Tensors of safetensors files as torch tensors, one at a time, and back to bytes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

from ftkit.errors import ExitCode, UserError
from ftkit.io.shards import TensorPlace, read_chunks, read_into

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The formats that can be added to, by their names in safetensors."""
BYTES = {"U8": torch.uint8, "I8": torch.int8}
"""The formats of packed weights."""
VALUES = 1 << 20  # of a tensor that are compared or merged at a time
FEW_VALUES = 1 << 19  # of a tensor that are computed with at a time, in float32: in a processor's cache


@dataclass(frozen=True)
class FileWeight:
    """A floating-point tensor of a file, read in parts, as float32. A row is what the first index numbers."""

    place: TensorPlace

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.place.shape

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, rows) until all rows were given; each is overwritten by the next."""
        if not self.shape:
            yield 0, read_tensor(self.place).float()
            return
        ranges = list(row_ranges(self.shape, FEW_VALUES))
        most = max((end - start for start, end in ranges), default=0)
        read = torch.empty(most, *self.shape[1:], dtype=FLOATS[self.place.dtype])
        values = torch.empty(most, *self.shape[1:])
        with self.place.file.open("rb", buffering=0) as file:
            file.seek(self.place.start)
            for start, end in ranges:
                read_into(bytes_of(read[: end - start]), file, self.place)
                yield start, values[: end - start].copy_(read[: end - start])

    def split(self, count: int) -> list[tuple[int, "FileWeight"]]:
        """(number of the first row, weight) of so many parts that can be read beside each other, or fewer."""
        rows = self.shape[0]
        ends = [rows * part // count for part in range(count + 1)]
        return [(a, FileWeight(rows_of(self.place, a, b))) for a, b in pairwise(ends) if b > a]

    def pick(self, rows: Tensor) -> Tensor:
        """The rows of these numbers (n,)."""
        return torch.cat([read_tensor(rows_of(self.place, int(row), int(row) + 1)) for row in rows]).float()


def row_ranges(shape: tuple[int, ...], values: int) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of parts, equal but for one row, of about so many values or of a single row."""
    parts = min(shape[0], -(-math.prod(shape) // values))
    for part in range(parts):
        yield shape[0] * part // parts, shape[0] * (part + 1) // parts


def rows_of(place: TensorPlace, start: int, end: int) -> TensorPlace:
    """The rows from `start` up to `end` of a tensor."""
    width = place.nbytes // place.shape[0]
    first = place.start + start * width
    return replace(place, shape=(end - start, *place.shape[1:]), start=first, end=first + (end - start) * width)


def read_rows(place: TensorPlace) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, rows in memory of their own) until all rows were given, in the format of the file."""
    for start, end in row_ranges(place.shape, VALUES):
        yield start, read_tensor(rows_of(place, start, end))


def xxh128(place: TensorPlace) -> str:
    """A checksum of a tensor's bytes, in hex: it finds mistakes, not malice, at the speed of memory."""
    digest = xxh3_128()
    for chunk in read_chunks(place):
        digest.update(chunk)
    return digest.hexdigest()


def read_tensor(place: TensorPlace) -> Tensor:
    """A tensor of floating-point numbers or bytes, in memory of its own, in the format of the file."""
    values = torch.empty(place.nbytes, dtype=torch.uint8)
    with place.file.open("rb", buffering=0) as file:
        file.seek(place.start)
        read_into(values.numpy().data, file, place)
    return values.view((FLOATS | BYTES)[place.dtype]).view(place.shape)


def read_finite(place: TensorPlace, name: str) -> Tensor:
    """The same, refused (exit 4) with NaN or infinite values in it."""
    if place.dtype not in FLOATS:
        raise UserError(
            f"{place.file}: tensor '{name}' holds {place.dtype} values, not floating-point numbers", ExitCode.MODEL
        )
    tensor = read_tensor(place)
    if not is_finite(tensor):
        raise not_finite(place, name)
    return tensor


def not_finite(place: TensorPlace, name: str) -> UserError:
    """The error for a tensor of an input with NaN in it."""
    return UserError(
        f"{place.file}: tensor '{name}' holds NaN or infinite values",
        ExitCode.MODEL,
        hint="the file is damaged, or training diverged",
    )


def is_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or infinite; needs no memory (isfinite would copy the tensor)."""
    if tensor.numel() == 0 or bool(torch.isfinite(tensor.sum())):  # a sum that overflows says nothing
        return True
    low, high = torch.aminmax(tensor)  # NaN comes through
    return bool(torch.isfinite(low) & torch.isfinite(high))


def bytes_of(tensor: Tensor) -> Any:
    """The values of a tensor as they lie in memory, without a copy."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """True if two tensors of one format have the same bits: -0 is not 0."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def same_values(old: TensorPlace, new: TensorPlace) -> bool:
    """True if `new` holds the values of `old` to the bit, cast where their formats differ; read in chunks."""
    if old.shape != new.shape:
        return False
    if old.dtype == new.dtype:
        return all(a == b for a, b in zip(read_chunks(old), read_chunks(new), strict=True))
    wide = FLOATS[old.dtype].itemsize, FLOATS[new.dtype].itemsize
    chunks = zip(read_chunks(old, VALUES * wide[0]), read_chunks(new, VALUES * wide[1]), strict=True)
    return all(bytes(bytes_of(flat(a, old.dtype).to(FLOATS[new.dtype]))) == b for a, b in chunks)


def flat(data: bytearray, dtype: str) -> Tensor:
    """Bytes as a tensor (n,), in the same memory."""
    return torch.frombuffer(data, dtype=FLOATS[dtype])
