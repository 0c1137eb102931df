"""The cards people fine-tune on: how much of their memory a process can use, and what they can compute.

usable_bytes is the "total capacity" that PyTorch's out-of-memory messages state (what the driver gives: less than the name
says, because of error correction and the driver's own share). Read from public logs and issues on 2026-11-20, the
smallest figure found for a card, as hosts and drivers differ by up to 1 %: T4 14.56 (to 14.74), 24 GB data centre cards 21.95
(to 21.99), RTX 3090 and 4090 23.52 (to 23.69), A100 40 GB 39.25 (to 39.56), L40S 44.31 (to 44.67), A100 and H100 80 GB 79.10
(to 79.33), H200 139.72 (to 139.81), B200 178.35. Nothing of this was measured by us; a size such as 24GB is taken as it is.

A process then spends some of it on its CUDA context: 141 MiB were measured on a T4 (FitCheck's runs); 500 MiB for every
other card is an assumption, from the 300 to 600 MiB that are reported.
"""

import re
from dataclasses import dataclass

from ftkit.core.byte_sizes import byte_size
from ftkit.core.caching_allocator import GIB, MIB
from ftkit.errors import ExitCode, UserError, did_you_mean

MEASURED_CONTEXT = 141 * MIB  # T4, torch 2.10 to 2.14
ASSUMED_CONTEXT = 500 * MIB


@dataclass(frozen=True)
class Gpu:
    """One card. compute_capability decides what it can do; None for a card of which only the size is known."""

    name: str
    usable_bytes: int
    compute_capability: tuple[int, int] | None
    context_bytes: int = ASSUMED_CONTEXT

    @property
    def has_bf16(self) -> bool:
        """Computes bfloat16 natively (Ampere and newer)."""
        return self.compute_capability is None or self.compute_capability >= (8, 0)

    @property
    def has_flash_attention(self) -> bool:
        """Runs FlashAttention-2 kernels (Ampere and newer)."""
        return self.compute_capability is None or self.compute_capability >= (8, 0)

    @property
    def has_large_workspace(self) -> bool:
        """cuBLAS gets 32 MiB instead of 8.125 MiB per handle (Hopper and newer data centre cards)."""
        return self.compute_capability in ((9, 0), (10, 0))

    @property
    def margin_bytes(self) -> int:
        """What should stay free: 2 % of the memory, at least 300 MiB."""
        return max(int(0.02 * self.usable_bytes), 300 * MIB)

    def holds(self, reserved_bytes: int) -> bool:
        """A process whose allocator reserves so much fits, with the margin and its context."""
        return reserved_bytes + self.context_bytes + self.margin_bytes <= self.usable_bytes


GPUS: dict[str, Gpu] = {
    key: Gpu(name, int(gib * GIB), capability, context)
    for key, name, gib, capability, context in [
        ("t4", "NVIDIA T4", 14.56, (7, 5), MEASURED_CONTEXT),
        ("l4", "NVIDIA L4", 21.95, (8, 9), ASSUMED_CONTEXT),
        ("a10", "NVIDIA A10", 21.98, (8, 6), ASSUMED_CONTEXT),
        ("3090", "GeForce RTX 3090", 23.67, (8, 6), ASSUMED_CONTEXT),
        ("4090", "GeForce RTX 4090", 23.52, (8, 9), ASSUMED_CONTEXT),
        ("a100-40", "NVIDIA A100 40GB", 39.25, (8, 0), ASSUMED_CONTEXT),
        ("a100-80", "NVIDIA A100 80GB", 79.14, (8, 0), ASSUMED_CONTEXT),
        ("l40s", "NVIDIA L40S", 44.31, (8, 9), ASSUMED_CONTEXT),
        ("h100", "NVIDIA H100 80GB", 79.10, (9, 0), ASSUMED_CONTEXT),
        ("h200", "NVIDIA H200", 139.72, (9, 0), ASSUMED_CONTEXT),
        ("b200", "NVIDIA B200", 178.35, (10, 0), ASSUMED_CONTEXT),
    ]
}
ALIASES = {"rtx3090": "3090", "rtx4090": "4090", "a10g": "a10", "a10040": "a100-40", "a10040gb": "a100-40",
           "a10080": "a100-80", "a10080gb": "a100-80", "h10080": "h100", "h10080gb": "h100"}  # fmt: skip


def find_gpu(text: str, flag: str = "--gpu") -> Gpu:
    """A card by its name (`t4`, `RTX 4090`, `A100-80GB`) or by a size (`24GB` = 24 x 10^9 bytes, `24GiB`).

    Raises UserError (usage) for anything else, with the nearest name.
    """
    usable = byte_size(text)
    if usable is not None:
        if usable <= 0:
            raise UserError(f"{flag} {text}: a card without memory", ExitCode.USAGE, hint=f"for example {flag} 24GB")
        return Gpu(f"a card of {text.strip()}", usable, None)
    plain = re.sub(r"nvidia|geforce|tesla|[\s_-]", "", text.lower())
    by_name = {key.replace("-", ""): key for key in GPUS} | ALIASES
    if plain in by_name:
        return GPUS[by_name[plain]]
    if plain == "a100":
        raise UserError(f"{flag} a100: which one?", ExitCode.USAGE, hint="a100-40 or a100-80")
    raise UserError(
        f"{flag} {text}: no such card in the table",
        ExitCode.USAGE,
        hint=f"{did_you_mean(text.lower(), list(GPUS))}give one of {', '.join(GPUS)}, or a size such as 24GB",
    )
