"""Weights that bitsandbytes packed and transformers saved: as many numbers again, one tensor in memory at a time.

On disk a 4-bit weight is bytes with `.absmax`, `.quant_map` and a JSON of its state beside it, an 8-bit one is int8
with `.SCB`, a scale for each row.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ftkit.errors import ExitCode, UserError
from ftkit.io.quantization import dequantize_stored
from ftkit.io.shards import AGAIN, NewTensor, TensorPlace, read_chunks, read_layout, write_shards
from ftkit.io.tensors import BYTES, FLOATS, bytes_of, read_tensor

STATE = ".quant_state.bitsandbytes__"
SCALES = ".SCB"
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".weight_format", SCALES)
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Packed:
    """A packed weight: where its bytes and what belongs to them lie; shape (out, in), dtype of its numbers."""

    place: TensorPlace
    beside: dict[str, TensorPlace]
    shape: tuple[int, ...]
    dtype: str


def dequantise_folder(base: Path, folder: Path, upside_down: Collection[str]) -> None:
    """Write the weights of a model folder as plain numbers: 4 bits in the format that they were packed from, 8 bits as
    float32. upside_down: weights that the model has as (in, out), and bitsandbytes as (out, in): of GPT-2's layers."""
    layout = read_layout(base)
    packed = packed_weights(layout)

    def content(tensor: NewTensor) -> Iterator[Any]:
        if tensor.name not in packed:
            yield from read_chunks(layout[tensor.name])
            return
        values = unpacked(packed[tensor.name])
        yield bytes_of(values.T if tensor.name in upside_down else values)

    new = plain_tensors(base)
    turned = [replace(tensor, shape=tensor.shape[::-1]) if tensor.name in upside_down else tensor for tensor in new]
    write_shards(folder, turned, content)


def packed_weights(layout: Mapping[str, TensorPlace]) -> dict[str, Packed]:
    """The packed weights of a layout by name."""
    found = {}
    for name, place in layout.items():
        if place.dtype not in BYTES:
            continue
        rows = layout.get(name.removesuffix(".weight") + SCALES)
        state = next((part for part in layout if part.startswith(name + STATE)), None)
        if state is not None:
            beside = {part.removeprefix(f"{name}."): layout[part] for part in layout if part.startswith(f"{name}.")}
            found[name] = Packed(place, beside, *stored_state(layout[state], name))
        elif rows is not None and place.dtype == "I8":
            found[name] = Packed(place, {"SCB": rows}, place.shape, "F32")
    return found


def stored_state(place: TensorPlace, name: str) -> tuple[tuple[int, ...], str]:
    """(shape, format) of a 4-bit weight, from the JSON that bitsandbytes stores."""
    try:
        about = json.loads(bytes(read_tensor(place).numpy()))
        return tuple(map(int, about["shape"])), NAMES[about["dtype"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place.file}: how '{name}' was packed cannot be read", ExitCode.MODEL, hint=AGAIN) from None


def plain_tensors(base: Path) -> list[NewTensor]:
    """What `dequantise_folder` writes, Conv1D's weights not turned yet."""
    layout = read_layout(base)
    packed = packed_weights(layout)
    plain = [(name, place) for name, place in layout.items() if name not in packed and not is_beside(name, packed)]
    return [
        *(NewTensor(name, place.dtype, place.shape) for name, place in plain),
        *(NewTensor(name, weight.dtype, weight.shape) for name, weight in packed.items()),
    ]


def is_beside(name: str, packed: Mapping[str, Packed]) -> bool:
    """True for a tensor that only explains a packed weight."""
    if STATE in name:
        return True
    owner = next((name.removesuffix(end) for end in BESIDE if name.endswith(end)), None)
    return owner is not None and (owner in packed or f"{owner}.weight" in packed)


def unpacked(weight: Packed) -> Tensor:
    """The values (out, in), in their format."""
    beside = {name: read_tensor(place) for name, place in weight.beside.items()}
    values = dequantize_stored(read_tensor(weight.place), beside).to(FLOATS[weight.dtype])
    return values.reshape(weight.shape)
