"""What PyTorch and bitsandbytes do on a CUDA device that the meta device does not show.

Three differences matter for memory, each with one table or function here:

- Python-level choices: on meta, attention, dropout and softmax take paths that no GPU takes. `cuda_choices`
  patches `torch.nn.functional` so that the operators of a CUDA run are recorded. (A TorchFunctionMode would be
  neater, but it is not active while checkpointing recomputes inside backward.)
- Scratch memory inside an operator, which is freed before the operator returns: `SCRATCH`.
- Operators of bitsandbytes whose meta kernel is missing or hides what they allocate: `STAND_INS`.

Letters: B sequences, H heads, S query positions, K key positions, D width of a head.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations import moe

from ftkit.core import compiled_shapes, tree_attention
from ftkit.core.caching_allocator import KIB, MIB, round_up

aten = torch.ops.aten


@dataclass(frozen=True)
class CudaKernels:
    """The choices that depend on the card.

    has_flash: FlashAttention-2 kernels (compute capability 8.0 and above); without them, or with a mask,
    attention is memory-efficient. workspace_bytes: of one cuBLAS handle.

    is_cpu: no card, but PyTorch's own kernels for the processor, which keep hardly any scratch memory.
    """

    has_flash: bool = True
    workspace_bytes: int = 8320 * KIB  # ":4096:2:16:8", the default below compute capability 9.0
    is_cpu: bool = False


CPU = CudaKernels(has_flash=False, workspace_bytes=0, is_cpu=True)


HOPPER_WORKSPACE = 32 * MIB  # from compute capability 9.0 on


# ---------------------------------------------------------------- scratch inside an operator
def softmax_backward_scratch(args: Sequence[Any]) -> list[int]:
    """grad * output is materialised: one matrix of scores."""
    return [_bytes(args[1])]


def flash_backward_scratch(args: Sequence[Any]) -> list[int]:
    """softmax_d and the float32 accumulator of dq; with grouped heads also dk and dv for every query head.

    args: gradient, q (B, H, S, D), k (B, Hkv, K, D), ... Source: flash_api.cpp, mha_bwd.
    """
    q, k = args[1], args[2]
    b, h, s, d = q.shape
    rows, width = round_up(s, 128), round_up(d, 32 if d <= 128 else 64)
    scratch = [b * h * rows * 4, b * h * rows * width * 4]
    if k.shape[1] != h:
        scratch += [b * k.shape[2] * h * d * q.element_size()] * 2
    return scratch


def efficient_backward_scratch(args: Sequence[Any]) -> list[int]:
    """delta and, for 16-bit inputs, the float32 accumulator of dq. Source: attention_backward.cu."""
    q = args[1]
    b, h, s, d = q.shape
    scratch = [b * h * s * 4]
    if q.element_size() < 4:
        scratch.append(b * h * round_up(s, 64) * round_up(d, 64) * 4)
    return scratch


def varlen_backward_scratch(args: Sequence[Any]) -> list[int]:
    """As `flash_backward_scratch`, for sequences one after another: 128 rows more for each of the N sequences.

    args: gradient, q (T, H, D), k (S, Hkv, D), v, out, logsumexp, starts (N + 1), ... Source: flash_api.cpp, mha_varlen_bwd.
    """
    q, k, starts = args[1], args[2], args[6]
    tokens, h, d = q.shape
    rows, width = tokens + 128 * (starts.shape[0] - 1), round_up(d, 32 if d <= 128 else 64)
    scratch = [h * rows * 4, rows * h * width * 4]
    if k.shape[1] != h:
        scratch += [k.shape[0] * h * d * q.element_size()] * 2
    return scratch


SCRATCH: dict[str, Callable[[Sequence[Any]], list[int]]] = {
    "aten._softmax_backward_data.default": softmax_backward_scratch,
    "aten._scaled_dot_product_flash_attention_backward.default": flash_backward_scratch,
    "aten._scaled_dot_product_efficient_attention_backward.default": efficient_backward_scratch,
    "torch_attn._varlen_attn_backward.default": varlen_backward_scratch,
}


# ---------------------------------------------------------------- stand-ins for operators
def gemm_4bit(
    a: Tensor,
    b: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """bitsandbytes: dequantise the whole weight (shape: out, in), then one matrix product.

    For small inputs a fused kernel may be used instead; which, depends on the card. The fallback is the rule
    beyond 512 rows, and needs more: one 16-bit copy of the layer.
    """
    if absmax_8bit is not None:
        assert absmax_offset is not None
        _scales = torch.empty_like(absmax_8bit, dtype=torch.float32) + absmax_offset  # alive during the product
    weight = torch.empty(tuple(shape), dtype=a.dtype, device=a.device)
    return functional.linear(a, weight, bias)


def int8_vectorwise_quant(a: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """bitsandbytes: rows of fp16 to int8 with one scale each; no column is taken for an outlier."""
    scales = torch.empty(a.numel() // a.shape[-1], dtype=torch.float32, device=a.device)
    rows = torch.empty(a.shape, dtype=torch.int8, device=a.device)
    if threshold == 0.0:
        return rows, scales, None
    _ = a.abs() >= threshold
    return rows, scales, torch.empty(0, dtype=torch.int64, device=a.device)


def int8_scaled_mm(
    a: Tensor,
    b: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """bitsandbytes: int8 product in int32, dequantised to fp16, then cast."""
    product = torch.empty((*a.shape[:-1], b.shape[0]), dtype=torch.int32, device=a.device)
    return torch.empty_like(product, dtype=torch.float16).to(dtype or torch.float16)


def int8_mixed_scaled_mm(
    a: Tensor,
    ca: Tensor,
    cb: Tensor,
    sca: Tensor,
    scb: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """bitsandbytes: the int8 product and the (here empty) outlier columns."""
    return int8_scaled_mm(ca, cb, sca, scb, bias, a.dtype), torch.empty(0, dtype=a.dtype, device=a.device)


STAND_INS: dict[str, Callable[..., Any]] = {
    "bitsandbytes.gemm_4bit.default": gemm_4bit,
    "bitsandbytes.int8_vectorwise_quant.default": int8_vectorwise_quant,
    "bitsandbytes.int8_scaled_mm.default": int8_scaled_mm,
    "bitsandbytes.int8_mixed_scaled_mm.default": int8_mixed_scaled_mm,
}


# ---------------------------------------------------------------- choices made in Python
@contextmanager
def cuda_choices(kernels: CudaKernels) -> Iterator[None]:
    """Within the block, attention, dropout and softmax on meta call the operators of a CUDA run; for the processor, our
    attention takes the way that it takes there.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                  is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        if kernels.is_cpu:
            return cpu_attention(q, k, v, attn_mask, dropout_p, is_causal, scale)
        if uses_flash(kernels, q, attn_mask):
            return flash_attention(q, k, v, dropout_p, is_causal, scale)
        return efficient_attention(q, k, v, attn_mask, dropout_p, is_causal, scale)

    patches = {"scaled_dot_product_attention": attention, "dropout": dropout, "softmax": softmax,
               "log_softmax": log_softmax}  # fmt: skip
    if kernels.is_cpu:
        patches = {"scaled_dot_product_attention": attention}
    places: list[tuple[Any, str, Any]] = [(functional, name, patch) for name, patch in patches.items()]
    places.append((moe, "_can_use_grouped_mm", partial(has_grouped_product, kernels)))
    if kernels.is_cpu:
        places += [(place, "is_compiled", is_compiled_on_cpu) for place in (compiled_shapes, tree_attention)]
    originals = [getattr(place, name) for place, name, _ in places]
    for place, name, patch in places:
        setattr(place, name, patch)
    try:
        yield
    finally:
        for (place, name, _), original in zip(places, originals, strict=True):
            setattr(place, name, original)


def has_grouped_product(kernels: CudaKernels, x: Tensor, weight: Tensor, offs: Tensor) -> bool:
    """One kernel for the products of all experts: for bfloat16, on compute capability 8.0 and above.

    Otherwise transformers multiplies expert by expert. Either way what is allocated depends on how many pairs of token and
    expert there are, not on which expert a token goes to.
    """
    return x.dtype == torch.bfloat16 and (kernels.has_flash or kernels.is_cpu)


def is_compiled_on_cpu(tensor: Tensor) -> bool:
    """`is_compiled` of a tensor that would be on the processor."""
    return tensor.dtype == torch.bfloat16


def uses_flash(kernels: CudaKernels, q: Tensor, mask: Tensor | None) -> bool:
    """FlashAttention-2 takes 16-bit inputs without a mask, with heads up to 256 wide."""
    return kernels.has_flash and mask is None and q.element_size() == 2 and q.shape[-1] <= 256


def flash_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> Tensor:
    """(B, H, S, D) out; heads are padded to a multiple of 8; fewer key heads are not copied."""
    width = q.shape[-1]
    if width % 8:
        q, k, v = (functional.pad(each, (0, 8 - width % 8)) for each in (q, k, v))
    out: Tensor = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    return out[..., :width]


def efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None
) -> Tensor:
    """(B, H, S, D) out; fewer key heads are copied for every query head; a mask becomes a 16- or 32-bit bias."""
    if k.shape[1] != q.shape[1]:
        copies = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    if mask is not None:
        if mask.dtype == torch.bool:
            hidden = torch.full((), -math.inf, dtype=q.dtype, device=q.device)
            mask = torch.where(mask, torch.zeros((), dtype=q.dtype, device=q.device), hidden)
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out: Tensor = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout_p, is_causal, scale=scale)[
        0
    ]
    return out


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None
) -> Tensor:
    """(B, H, S, D) out of the processor's fused kernel, which takes fewer key heads as they are."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale
    )[0]
    return out


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Fused on CUDA: the result and a mask of one byte per element."""
    if not training or p == 0:
        return x
    out: Tensor = aten.native_dropout(x, p, True)[0]
    return out


def softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """From fp16 to fp32 in one kernel, without a float32 copy of the input; bf16 has no such kernel."""
    if x.dtype == torch.float16 and dtype == torch.float32:
        out: Tensor = aten._softmax(x, dim, True)
        return out
    return torch.softmax(x, -1 if dim is None else dim, dtype=dtype)


def log_softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """As softmax: fp16 to fp32 in one kernel."""
    if x.dtype == torch.float16 and dtype == torch.float32:
        out: Tensor = aten._log_softmax(x, dim, True)
        return out
    return torch.log_softmax(x, -1 if dim is None else dim, dtype=dtype)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
