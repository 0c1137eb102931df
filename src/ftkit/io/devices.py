"""Where to compute and in which number format."""

import resource
import sys
from collections.abc import Mapping
from typing import Any, Literal

import torch

from ftkit.errors import ExitCode, UserError

DtypeName = Literal["bf16", "fp16", "fp32"]
NAMES: dict[torch.dtype, DtypeName] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}


def pick_device(asked: str) -> str:
    """cuda, mps or cpu; asking for one that is not here is exit 6, never a silent other."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if present[name])
    if not present[asked]:
        here = ", ".join(name for name, is_here in present.items() if is_here)
        raise UserError(f"--device {asked}: none is here", ExitCode.ENVIRONMENT, hint=f"this machine has: {here}")
    return asked


NARROW = 128
"""Hidden size up to which a CPU trains faster in float32 than in bfloat16, though it has products for that: 1.1 to 1.4 times
at 64 and 128, 0.85 to 0.95 times at 256 and 384 (measured on a Xeon with AMX)."""


def pick_dtype(asked: str, device: str, *, trains_weights: bool, width: int) -> torch.dtype:
    """The format of frozen weights and activations of a model with hidden states of this width.

    auto: 32 bits where the weights themselves are trained (a bfloat16 weight loses small updates); otherwise
    bfloat16 where the device computes in it, and on a CPU the model is not NARROW, else float16 on a GPU and float32 on a CPU.
    float16 weights are never trained: their gradients cannot be scaled against underflow.
    """
    if asked == "fp16" and trains_weights:
        raise UserError(
            "--dtype fp16 is too narrow to train the weights themselves",
            ExitCode.USAGE,
            hint="--dtype auto, or an adapter: --lora",
        )
    if asked == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            "--dtype bf16: this GPU cannot compute in bfloat16", ExitCode.ENVIRONMENT, hint="--dtype auto or fp16"
        )
    if asked != "auto":
        return DTYPES[asked]
    if trains_weights:
        return torch.float32
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device == "mps":
        return torch.bfloat16
    return torch.bfloat16 if cpu_computes_bf16() and width > NARROW else torch.float32


def cpu_computes_bf16() -> bool:
    """True if the CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx_tile"))


def dtype_name(dtype: torch.dtype) -> DtypeName:
    """bf16, fp16 or fp32."""
    return NAMES[dtype]


def peak_memory(device: str) -> int:
    """The largest use so far in bytes: of the GPU's allocator, or of this process."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
