"""Safetensors files: headers read and checked before anything else touches them, shards found through their index."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from ftkit.errors import ExitCode, UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BYTES_PER_VALUE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
LONGEST_HEADER_BYTES = 100_000_000


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
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{index}: damaged index", ExitCode.MODEL) from None
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{index}: path {name!r} leaves the folder", ExitCode.MODEL)
            if not (folder / name).is_file():
                raise UserError(f"{folder / name}: missing, though {INDEX} lists it", ExitCode.MODEL, hint="download the model again")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise missing_weights(folder)


def missing_weights(folder: Path) -> UserError:
    """The error for a folder without safetensors; pickles are named and refused."""
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        convert = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors, on a machine you may lose"
        return UserError(f"{folder}: has only pickled weights ({pickles[0]}), which can run code", ExitCode.MODEL, hint=convert)
    return UserError(f"{folder}: has no {SINGLE}", ExitCode.MODEL, hint="download the whole model")


def read_layout(folder: Path) -> dict[str, TensorPlace]:
    """Every tensor of a model folder by name; a tensor in two shards is an error."""
    layout: dict[str, TensorPlace] = {}
    for file in weight_files(folder):
        for name, place in read_header(file).items():
            if name in layout:
                raise UserError(f"{file}: tensor '{name}' is also in {layout[name].file.name}", ExitCode.MODEL)
            layout[name] = place
    return layout


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors of one safetensors file. Damaged, cut off or foreign content is exit 4 and says which."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        foreign = foreign_content(head + file.read(64), size)
        if foreign:
            raise UserError(f"{path}: {foreign}", ExitCode.MODEL, hint="download the file again")
        length = struct.unpack("<Q", head)[0]
        if length > min(size - 8, LONGEST_HEADER_BYTES):
            raise UserError(f"{path}: its header should be {length:,} bytes, the file has {size:,} (cut off?)", ExitCode.MODEL)
        file.seek(8)
        header = parse_header(file.read(length), path)
    layout = {name: tensor_place(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    check_coverage(path, layout, 8 + length, size)
    return layout


def foreign_content(start: bytes, size: int) -> str | None:
    """What a file is that is no safetensors file, in words."""
    if size < 8:
        return f"{size} bytes, too short for safetensors"
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
            raise UserError(f"{path}: tensor '{twice}' stands twice in the header", ExitCode.MODEL)
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its header is not JSON (damaged?)", ExitCode.MODEL) from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is not an object", ExitCode.MODEL)
    return header


def tensor_place(path: Path, name: str, entry: object, data_start: int) -> TensorPlace:
    """One header entry, checked: dtype known, bytes = product of the shape times the value's size."""
    try:
        dtype, shape, (start, end) = str(entry["dtype"]), tuple(map(int, entry["shape"])), entry["data_offsets"]  # type: ignore[index]
        right = dtype in BYTES_PER_VALUE and 0 <= start <= end and math.prod(shape) * BYTES_PER_VALUE[dtype] == end - start
    except (TypeError, KeyError, ValueError):
        right = False
    if not right:
        raise UserError(f"{path}: tensor '{name}' has a wrong entry in the header", ExitCode.MODEL, hint="download the file again")
    return TensorPlace(path, dtype, shape, data_start + start, data_start + end)


def check_coverage(path: Path, layout: dict[str, TensorPlace], data_start: int, size: int) -> None:
    """The tensors follow each other without hole or overlap up to the end of the file."""
    at = data_start
    for name, place in sorted(layout.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != at:
            fault = "overlaps the one before it" if place.start < at else "leaves a hole before it"
            raise UserError(f"{path}: tensor '{name}' {fault}", ExitCode.MODEL)
        at = place.end
    if at != size:
        raise UserError(f"{path}: {size:,} bytes, its tensors end at {at:,} (cut off?)", ExitCode.MODEL, hint="download the file again")
