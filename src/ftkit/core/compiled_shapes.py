"""Shapes that come again: oneDNN, which multiplies bfloat16 on CPUs, compiles a kernel for every new one.

That takes 0.3 to 50 ms, as long as many products of that shape, and packs, their segments and their counted tokens have another
length at every step. So they are filled up to multiples: with tokens that nobody looks at, and rows that count nothing.
"""

import torch
from torch import Tensor

SEGMENT_MULTIPLE = 32
"""Queries of a block in attention, and its keys: few, and many of them."""
PACK_MULTIPLE = 64
"""Tokens of a pack, and rows of logits."""


def is_compiled(tensor: Tensor) -> bool:
    """True for what oneDNN multiplies: bfloat16 on a CPU."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16


def fill_of(length: int, multiple: int, factor: Tensor) -> int:
    """How many to add to `length`, where `factor` goes into the product."""
    return -length % multiple if is_compiled(factor) else 0
