"""Safetensors files: headers read and checked before anything else touches them, shards found through their index.

Written tensor by tensor too: a shard's header is known before its first byte of data, the index comes last.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ftkit.errors import ExitCode, UserError
from ftkit.io.hashed_file import HashedFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BYTES_PER_VALUE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
AGAIN = "download the file again"
LONGEST_HEADER_BYTES = 100_000_000
CHUNK_BYTES = 1 << 21
SHARD_BYTES = 5_000_000_000
"""Largest shard that is written (a larger tensor gets a shard of its own)."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: file, dtype as safetensors names it, shape, first and last byte within the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order; exit 4 where there are none or one is missing."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # where both are, transformers loads this one
        return [folder / SINGLE]
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            names = []
        if not names:
            raise UserError(f"{index}: damaged index", ExitCode.MODEL, hint="download the model again")
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{index}: path {name!r} leaves the folder", ExitCode.MODEL, hint=AGAIN)
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder / name}: missing, though {INDEX} lists it",
                    ExitCode.MODEL,
                    hint="download the model again",
                )
        return [folder / name for name in names]
    raise missing_weights(folder)


def missing_weights(folder: Path) -> UserError:
    """The error for a folder without safetensors; pickles are named and refused."""
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        convert = (
            "load and save_pretrained() it with transformers, on a machine that you may lose: that writes safetensors"
        )
        return UserError(
            f"{folder}: has only pickled weights ({pickles[0]}), which can run code", ExitCode.MODEL, hint=convert
        )
    return UserError(f"{folder}: has no {SINGLE}", ExitCode.MODEL, hint="download the whole model")


def read_layout(folder: Path) -> dict[str, TensorPlace]:
    """Every tensor of a model folder by name; a tensor in two shards is an error."""
    layout: dict[str, TensorPlace] = {}
    for file in weight_files(folder):
        for name, place in read_header(file).items():
            if name in layout:
                raise UserError(
                    f"{file}: tensor '{name}' is also in {layout[name].file.name}", ExitCode.MODEL, hint=AGAIN
                )
            layout[name] = place
    return layout


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors of one safetensors file. Damaged, cut off or foreign content is exit 4 and says which."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        foreign = foreign_content(head + file.read(64), size)
        if foreign:
            raise UserError(f"{path}: {foreign}", ExitCode.MODEL, hint=AGAIN)
        length = struct.unpack("<Q", head)[0]
        if length > min(size - 8, LONGEST_HEADER_BYTES):
            raise UserError(
                f"{path}: its header should be {length:,} bytes, the file has {size:,} (cut off?)",
                ExitCode.MODEL,
                hint=AGAIN,
            )
        file.seek(8)
        header = parse_header(file.read(length), path)
    layout = {
        name: tensor_place(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
    }
    check_coverage(path, layout, 8 + length, size)
    return layout


def foreign_content(start: bytes, size: int) -> str | None:
    """What a file is that is no safetensors file, in words."""
    if size < 8:
        return f"{size} bytes, too short for safetensors"
    if start[8:9] == b"{":  # a header: its length in front may begin with any byte, also with those of a pickle
        return None
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights (run git lfs pull)"
    if start.lstrip()[:1] == b"<":
        return "an HTML page, not weights"
    if not any(start):
        return "filled with zeros, not weights"
    if start.startswith(b"PK") or start.startswith(b"\x80"):
        return "a pickle, not safetensors"
    return None


def parse_header(text: bytes, path: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    """The header's JSON; a name that stands twice is an error (readers would silently take the last)."""

    def refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: tensor '{twice}' stands twice in the header", ExitCode.MODEL, hint=AGAIN)
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its header is not JSON (damaged?)", ExitCode.MODEL, hint=AGAIN) from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is not an object", ExitCode.MODEL, hint=AGAIN)
    return header


def tensor_place(path: Path, name: str, entry: object, data_start: int) -> TensorPlace:
    """One header entry, checked: dtype known, bytes = product of the shape times the value's size."""
    try:
        dtype, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]  # type: ignore[index]
        right = dtype in BYTES_PER_VALUE and all(type(n) is int and n >= 0 for n in (*shape, start, end))
        right = right and math.prod(shape) * BYTES_PER_VALUE[dtype] == end - start
    except (TypeError, KeyError, ValueError):
        right = False
    if not right:
        raise UserError(f"{path}: tensor '{name}' has a wrong entry in the header", ExitCode.MODEL, hint=AGAIN)
    return TensorPlace(path, dtype, shape, data_start + start, data_start + end)


def check_coverage(path: Path, layout: dict[str, TensorPlace], data_start: int, size: int) -> None:
    """The tensors follow each other without hole or overlap up to the end of the file."""
    at = data_start
    for name, place in sorted(layout.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != at:
            fault = "overlaps the one before it" if place.start < at else "leaves a hole before it"
            raise UserError(f"{path}: tensor '{name}' {fault}", ExitCode.MODEL, hint=AGAIN)
        at = place.end
    if at != size:
        raise UserError(
            f"{path}: {size:,} bytes, its tensors end at {at:,} (cut off?)",
            ExitCode.MODEL,
            hint=AGAIN,
        )


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is going to be written: its name, dtype as safetensors names it, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BYTES_PER_VALUE[self.dtype]


def read_chunks(place: TensorPlace, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytearray]:
    """The bytes of a tensor, `chunk_bytes` at a time (a multiple of 8, so that no value is cut)."""
    with place.file.open("rb", buffering=0) as file:
        file.seek(place.start)
        for start in range(0, place.nbytes, chunk_bytes):
            chunk = bytearray(min(chunk_bytes, place.nbytes - start))
            read_into(memoryview(chunk), file, place)
            yield chunk


def read_into(buffer: memoryview, file: IO[bytes], place: TensorPlace) -> None:
    """Fill the buffer with what comes next in the file of `place`."""
    while buffer:
        count = file.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{place.file}: ends inside a tensor", ExitCode.MODEL, hint=AGAIN)
        buffer = buffer[count:]


def plan_shards(tensors: Sequence[NewTensor], shard_bytes: int = SHARD_BYTES) -> list[list[NewTensor]]:
    """The tensors in groups of at most `shard_bytes`, one group a file.

    Sorted by width of their values (widest first, so that every tensor is aligned), then by name: the result is the
    same however the tensors came.
    """
    shards: list[list[NewTensor]] = []
    filled = 0
    for tensor in sorted(tensors, key=lambda t: (-BYTES_PER_VALUE[t.dtype], t.name)):
        if not shards or filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def write_shards(
    folder: Path,
    tensors: Sequence[NewTensor],
    content: Callable[[NewTensor], Iterable[Any]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write tensors as model.safetensors, or as numbered shards and, last, their index. Returns file name -> sha256.

    content: gives the bytes of a tensor in pieces (anything with the buffer protocol, not changed afterwards); it is
    called once for each tensor, in the order of the file, so only one needs to be in memory.
    """
    groups = plan_shards(tensors, shard_bytes)
    names = shard_names(len(groups))
    sums = {name: write_shard(folder / name, group, content) for name, group in zip(names, groups, strict=True)}
    if len(groups) > 1:
        weight_map = {tensor.name: name for name, group in zip(names, groups, strict=True) for tensor in group}
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sums


def write_shard(path: Path, tensors: list[NewTensor], content: Callable[[NewTensor], Iterable[Any]]) -> str:
    """One file of tensors; its sha256."""
    with HashedFile(path) as file:
        file.write(encode_header(tensors))
        for tensor in tensors:
            written = 0
            for piece in content(tensor):
                written += len(piece)
                file.write(piece)
            assert written == tensor.nbytes, (tensor, written)
    return file.sha256


def shard_names(count: int) -> list[str]:
    """File names as transformers writes them."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def encode_header(tensors: Sequence[NewTensor]) -> bytes:
    """Length and header of a file with these tensors in this order; padded, so that data begins at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
