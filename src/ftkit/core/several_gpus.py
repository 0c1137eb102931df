"""What each of several cards holds, from the closed form of one: DDP, ZeRO (arXiv:1910.02054) and FSDP (arXiv:2304.11277).

Only the states are shared, activations are not. Of what the libraries add, DDP's gradient buckets and the weights that
are gathered for one block at a time are counted; communication buffers are not. Nothing of this was held against a
measurement.
"""

from dataclasses import dataclass
from typing import Literal

from ftkit.core.memory_estimate import Part

EXPECTED_ERROR = 0.1
"""Of the allocated bytes: what such formulas are known to miss (3 to 10 %), not a measurement of this one."""
RESERVED = 1.25
"""Reserved over allocated bytes: 1.1 to 1.25 are reported for weights that come and go."""
AHEAD = 2
"""Blocks whose weights are whole at the same time: the one that runs and the one that is fetched for it."""


@dataclass(frozen=True)
class Sharing:
    """How many cards share a run, and how: ddp nothing, zero1 optimizer states, zero2 gradients too, zero3 and fsdp all."""

    cards: int
    way: Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]

    def shared(self, parts: dict[Part, float], block: float, outer: float) -> dict[Part, float]:
        """The parts that one card holds. block: weights of a block, outer: of embedding and output head; in bytes."""
        if self.cards == 1:
            return parts
        held = dict(parts)
        if self.way == "ddp":
            held[Part.GRADIENTS] *= 2  # DistributedDataParallel copies them into buckets
            return held
        divided = {
            "zero1": [Part.OPTIMIZER],
            "zero2": [Part.OPTIMIZER, Part.GRADIENTS],
        }.get(self.way, [Part.OPTIMIZER, Part.GRADIENTS, Part.FROZEN, Part.QUANTISATION, Part.TRAINED])
        for part in divided:
            held[part] /= self.cards
        if self.way in ("zero3", "fsdp"):
            held[Part.TEMPORARIES] += AHEAD * block + outer
        return held
