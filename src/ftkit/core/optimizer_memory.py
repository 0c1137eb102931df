"""Bytes that an optimizer keeps for each trained tensor on a CUDA device, and what its step needs on top.

The optimizers themselves choose other kernels on the meta device than on CUDA, so their memory is written
down here instead; tests compare it with the state that the real optimizers keep.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

QUANTISATION_BLOCK = 256  # values per scale of bitsandbytes' 8-bit optimizers
SMALLEST_8BIT = 4096  # elements; smaller tensors keep 32-bit states
SMALLEST_PAGED = 100_000  # elements; larger states live in managed memory, outside the allocator's pool
CODE_BOOK_BYTES = 256 * 4  # one float32 table each for the signed and the unsigned code, for all tensors

BITSANDBYTES = {
    "adamw-8bit": (2, True, False),
    "paged-adamw-8bit": (2, True, True),
    "paged-adamw": (2, False, True),
    "lion": (1, False, False),
    "lion-8bit": (1, True, False),
    "paged-lion-8bit": (1, True, True),
}
"""Optimizer -> its means, whether they have 8 bits, whether they are paged."""


@dataclass(frozen=True)
class OptimizerMemory:
    """Resident bytes: `shared` once, `per_tensor` for each trained tensor; `scratch`: alive during the step."""

    shared: list[int]
    per_tensor: list[list[int]]
    scratch: list[int]

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps between steps, before the allocator rounds it."""
        return sum(self.shared) + sum(size for sizes in self.per_tensor for size in sizes)


def optimizer_memory(kind: str, parameters: Sequence[Tensor]) -> OptimizerMemory:
    """Sizes in bytes, in the order in which a CUDA run allocates them.

    kind: adamw (fused: AdamW, arXiv:1711.05101, algorithm 2, keeps two running means of the parameter's
    dtype and a step counter), adamw-foreach (the square roots of all second means at once on top),
    adamw-8bit and paged-adamw-8bit (block-wise states, arXiv:2110.02861), paged-adamw, sgd (with momentum: one mean),
    lion and its forms (one mean, of float32 or 8 bits), adafactor (arXiv:1804.04235: float32 means of rows and of columns,
    and three times the gradient in its step). Raises KeyError for another kind.
    """
    if kind == "sgd":
        return OptimizerMemory([], [[size] for size in map(_bytes, parameters)], [])
    if kind == "adamw":
        return OptimizerMemory([], [[4, size, size] for size in map(_bytes, parameters)], [])
    if kind == "adamw-foreach":
        sizes = [_bytes(each) for each in parameters]
        return OptimizerMemory([], [[size, size] for size in sizes], sizes)
    if kind == "adafactor":
        widest = max((each.numel() for each in parameters), default=0)
        return OptimizerMemory([], [factored_state(each) for each in parameters], [4 * widest] * 3)
    means, is_8bit, is_paged = BITSANDBYTES[kind]
    if not is_8bit:
        sizes = [4 * each.numel() for each in parameters]
        is_outside = [is_paged and size >= 4 * SMALLEST_PAGED for size in sizes]
        return OptimizerMemory(
            [], [[] if out else [size] * means for size, out in zip(sizes, is_outside, strict=True)], []
        )
    per_tensor = [eight_bit_state(each.numel(), means, is_paged=is_paged) for each in parameters]
    has_codes = any(each.numel() >= SMALLEST_8BIT for each in parameters)
    return OptimizerMemory([CODE_BOOK_BYTES] * means if has_codes else [], per_tensor, [])


def eight_bit_state(elements: int, means: int, *, is_paged: bool) -> list[int]:
    """Means of one byte per element and their float32 scales; 32-bit means for small tensors."""
    if elements < SMALLEST_8BIT:
        return [4 * elements] * means
    values = [] if is_paged and elements >= SMALLEST_PAGED else [elements] * means
    return values + [4 * -(-elements // QUANTISATION_BLOCK)] * means


def factored_state(tensor: Tensor) -> list[int]:
    """Adafactor's float32 means: one for each row and each column of a matrix, all values of a vector; and a norm."""
    if tensor.ndim < 2:
        return [4 * tensor.numel(), 4]
    return [4 * math.prod(tensor.shape[:-1]), 4 * math.prod((*tensor.shape[:-2], tensor.shape[-1])), 4]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
