"""The weights of a merge: the base's tensors through their steps into new files, one tensor in memory at a time.

Memory: torch itself and some pieces of a tensor where LoRA is added or bytes are copied; for other steps about three
times the largest tensor of a 16-bit base (its bytes, and its sum in float32).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

from ftkit import console
from ftkit.core.heap import give_back_freed_memory
from ftkit.core.merge_plan import Step
from ftkit.core.merging import LowRank, apply_delta, is_zero, merge_rows
from ftkit.errors import ExitCode, UserError
from ftkit.io.adapter_weights import Adapter
from ftkit.io.card import Card
from ftkit.io.devices import DTYPES
from ftkit.io.quantization import seen_in_training
from ftkit.io.shards import NewTensor, read_chunks, read_layout, write_shards
from ftkit.io.tensors import (
    FLOATS,
    bytes_of,
    flat,
    is_finite,
    not_finite,
    read_finite,
    read_rows,
    same_bytes,
    same_values,
    xxh128,
)

SHORT_DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass
class Ledger:
    """What the writing found.

    updated: tensors whose update is not zero. differing: those that were seen to get other bytes than the base's.
    foreign: quantised layers that are not those of training.
    xxh128: of each tensor's bytes, as they were given away. sha256: of each file of weights.
    """

    updated: set[str] = field(default_factory=set)
    differing: set[str] = field(default_factory=set)
    foreign: list[str] = field(default_factory=list)
    xxh128: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)


def write_weights(steps: list[Step], adapter: Adapter, card: Card | None, folder: Path, shard_bytes: int) -> Ledger:
    """Stream the base's tensors through their steps into new files, one in memory at a time."""
    refuse_idle_adapter(adapter)
    give_back_freed_memory(above=8 << 20)
    by_name = {step.name: step for step in steps}
    ledger = Ledger()
    with console.Progress("merging, tensors", len(steps)) as progress, threads_set_back() as threads:

        def content(tensor: NewTensor) -> Iterator[Any]:
            step = by_name[tensor.name]
            torch.set_num_threads(threads if step.changes and not step.is_sum else 1)
            digest = xxh3_128()
            for piece in merged_bytes(step, card, ledger):
                digest.update(piece)
                yield piece
            ledger.xxh128[tensor.name] = digest.hexdigest()
            progress.advance(note=tensor.name)

        ledger.sha256 = write_shards(folder, [step.result for step in steps], content, shard_bytes=shard_bytes)
    if ledger.foreign:
        raise foreign_quantisation(ledger.foreign)
    if not ledger.updated and adapter.is_plain:
        raise idle_adapter(adapter.folder)
    return ledger


@contextmanager
def threads_set_back() -> Iterator[int]:
    """The number of threads that torch computes with, restored at the end.

    Sums and copies keep one core busy and the writing thread another. More threads, meeting after each of many short
    steps, wait for one another, on two cores for most of the time.
    """
    threads = torch.get_num_threads()
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def refuse_idle_adapter(adapter: Adapter) -> None:
    """An adapter with NaN in it is exit 4; one that would change nothing is exit 8."""
    for key, place in adapter.others.items():
        read_finite(place, key)
    for layer, pair in adapter.pairs.items():
        read_finite(pair.a, f"{layer}.lora_A")
    idle = [layer for layer, pair in adapter.pairs.items() if is_zero(read_finite(pair.b, f"{layer}.lora_B"))]
    if len(idle) == len(adapter.pairs) and adapter.is_plain and not adapter.others:
        raise idle_adapter(adapter.folder)
    if idle:
        share = f"{len(idle)} of its {len(adapter.pairs)} layers"
        console.warn(f"the adapter does nothing to {share} (B is zero), the first: {idle[0]}")


def idle_adapter(folder: Path) -> UserError:
    """The error for an adapter whose every update is zero."""
    return UserError(f"{folder}: the adapter does nothing: every update is zero", ExitCode.GATE, hint="was it trained?")


def foreign_quantisation(layers: list[str]) -> UserError:
    """The error for a base that, quantised again, is not what training saw."""
    shown = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
    what = f"quantised again, {len(layers)} layers of the base are not those that training saw: {shown}"
    hint = (
        "give the base its old files back, or merge where it was trained, or onto the unquantised base: --onto original"
    )
    return UserError(what, ExitCode.MODEL, hint=hint)


def merged_bytes(step: Step, card: Card | None, ledger: Ledger) -> Iterator[Any]:
    """The bytes of one tensor of the result, in pieces."""
    if step.is_sum:
        yield from sums(step, ledger)
        return
    if step.changes:
        merged = merged_tensor(step, card, ledger)
        if not is_finite(merged):
            raise overflow(step)
        yield bytes_of(merged)
        return
    for chunk in read_chunks(step.place):
        if step.place.dtype in FLOATS:
            chunk = converted(chunk, step)
        yield chunk


def sums(step: Step, ledger: Ledger) -> Iterator[Any]:
    """The bytes of base + LoRA, some rows at a time: what stays in a processor's cache is neither copied nor waited for."""
    assert step.pair is not None
    a, b = read_finite(step.pair.a, step.name).float(), read_finite(step.pair.b, step.name).float()
    if not (is_zero(a) or is_zero(b)):
        ledger.updated.add(step.name)
    for start, rows in read_rows(step.place):
        if not is_finite(rows):
            raise not_finite(step.place, step.name)
        merged = torch.empty_like(rows, dtype=FLOATS[step.dtype])
        merge_rows(rows, a, b[start : start + len(rows)], step.scale, merged)
        if not is_finite(merged):
            raise overflow(step)
        if step.name not in ledger.differing and not same_bytes(rows.to(merged.dtype), merged):
            ledger.differing.add(step.name)
        yield bytes_of(merged)


def converted(chunk: bytearray, step: Step) -> Any:
    """A piece of an unchanged tensor, checked for NaN, in the format of the result."""
    values = flat(chunk, step.place.dtype)
    if not is_finite(values):
        raise not_finite(step.place, step.name)
    if step.dtype == step.place.dtype:
        return chunk
    values = values.to(FLOATS[step.dtype])
    if not is_finite(values):
        raise overflow(step)
    return bytes_of(values)


def overflow(step: Step) -> UserError:
    """The error for values that are too large for the format of the result."""
    return UserError(
        f"'{step.name}': its values do not fit into {SHORT_DTYPES[step.dtype]}",
        ExitCode.GATE,
        hint="--dtype fp32, or bf16",
    )


def merged_tensor(step: Step, card: Card | None, ledger: Ledger) -> Tensor:
    """One changed tensor, rounded once: the base's as training saw it, or the adapter's whole one, plus the update."""
    weight = read_finite(step.replaced_by or step.place, step.name)
    if step.quantised is not None:
        weight = as_trained(weight, step, card, ledger)
    if step.pair is not None:
        a, b = read_finite(step.pair.a, step.name), read_finite(step.pair.b, step.name)
        magnitude = read_finite(step.pair.magnitude, step.name) if step.pair.magnitude is not None else None
        if not (is_zero(a) or is_zero(b)):
            ledger.updated.add(step.name)
        weight = apply_delta(weight, LowRank(a, b, step.scale, step.transposed, magnitude))
    if step.bias is not None:
        weight = weight.float() + read_finite(step.bias, step.name).float() * step.scale
    if step.update is not None:
        weight = updated_by_peft(weight, step, ledger)
    weight = weight.to(FLOATS[step.dtype])
    if step.rows is not None:
        new = step.result.shape[0] - weight.shape[0]
        weight = torch.cat([weight, weight.new_empty(new, weight.shape[1])]) if new else weight
        weight[list(step.rows.numbers)] = read_finite(step.rows.place, step.name).to(weight.dtype)
    return weight


def updated_by_peft(weight: Tensor, step: Step, ledger: Ledger) -> Tensor:
    """What PEFT's merge makes of the values, float32; exit 4 where PEFT has none (convolutions in groups)."""
    assert step.update is not None
    try:
        merged = step.update(weight.to(torch.float32, copy=True))
    except NotImplementedError as error:
        raise UserError(f"PEFT cannot merge into '{step.name}': {error}", ExitCode.MODEL) from None
    if not torch.equal(merged, weight.float()):
        ledger.updated.add(step.name)
    return merged


def as_trained(weight: Tensor, step: Step, card: Card | None, ledger: Ledger) -> Tensor:
    """The values that training saw in a weight that it held quantised; one that comes out otherwise is noted."""
    assert card is not None and step.quantised is not None
    recorded = card.quantized_sha256[step.quantised] or None  # none: of an adapter that was not made by ftkit
    values, is_same = seen_in_training(weight, card.method, DTYPES[card.dtype], recorded, transposed=step.transposed)
    if not is_same:
        ledger.foreign.append(step.quantised)
    return values


def require_only_planned_changes(steps: list[Step], folder: Path, ledger: Ledger) -> list[str]:
    """Read the new files back: every updated tensor differs from the base, nothing else does. Returns what differs.

    What was seen to differ when it was made, and lies on the disk as it was made, is not compared again.
    """
    written = read_layout(folder)
    if written.keys() != {step.name for step in steps}:
        raise UserError("the merged files do not hold the base's tensors", ExitCode.GATE)
    for name, place in written.items():
        if xxh128(place) != ledger.xxh128[name]:
            raise UserError(f"'{name}' is not on the disk as it was written", ExitCode.IO, hint="check the disk")
    changed = [
        step.name for step in steps if step.name in ledger.differing or not same_values(step.place, written[step.name])
    ]
    strays = sorted(set(changed) - {step.name for step in steps if step.changes})
    swallowed = sorted(ledger.updated - set(changed))
    if strays:
        raise UserError(
            f"'{strays[0]}' changed, though the adapter does not change it ({len(strays)} tensors)", ExitCode.GATE
        )
    if swallowed:
        raise UserError(
            f"'{swallowed[0]}' did not change: its update is smaller than its rounding ({len(swallowed)} tensors)",
            ExitCode.GATE,
            hint="--dtype fp32 keeps it",
        )
    return changed
