"""Scratch memory of operators, by hand from their sources, and the choices of a CUDA run."""

import pytest
import torch
from torch.nn import functional

from ftkit.core import tree_attention
from ftkit.core.cuda_operators import (
    CPU,
    CudaKernels,
    cuda_choices,
    efficient_backward_scratch,
    flash_backward_scratch,
    gemm_4bit,
    softmax_backward_scratch,
    varlen_backward_scratch,
)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("shape", "key_heads", "sizes"),
    [
        ((2, 4, 256, 64), 4, [2 * 4 * 256 * 4, 2 * 4 * 256 * 64 * 4]),  # softmax_d, dq in float32
        ((1, 4, 100, 80), 4, [4 * 128 * 4, 4 * 128 * 96 * 4]),  # rows to 128, width to 32
        ((1, 8, 128, 192), 8, [8 * 128 * 4, 8 * 128 * 192 * 4]),  # width to 64 beyond 128
        (
            (1, 8, 128, 64),
            2,
            [8 * 128 * 4, 8 * 128 * 64 * 4, 128 * 8 * 64 * 2, 128 * 8 * 64 * 2],
        ),  # dk, dv per query head
    ],
)
def test_flash_attentions_backward_pass(shape, key_heads, sizes):
    q, k = meta(*shape), meta(shape[0], key_heads, *shape[2:])
    assert flash_backward_scratch([q, q, k]) == sizes


@pytest.mark.parametrize(
    ("key_heads", "more"), [(4, []), (2, [70 * 4 * 64 * 2, 70 * 4 * 64 * 2])], ids=["each its own", "grouped"]
)
def test_flash_attentions_backward_pass_over_sequences_one_after_another(key_heads, more):
    q, k, starts = meta(50, 4, 64), meta(70, key_heads, 64), meta(4, dtype=torch.int32)  # three sequences
    rows = 50 + 3 * 128
    assert varlen_backward_scratch([q, q, k, k, q, q, starts]) == [4 * rows * 4, rows * 4 * 64 * 4, *more]


def test_memory_efficient_attentions_backward_pass():
    q = meta(2, 4, 100, 80)
    assert efficient_backward_scratch([q, q]) == [2 * 4 * 100 * 4, 2 * 4 * 128 * 128 * 4]
    q = meta(2, 4, 100, 80, dtype=torch.float32)
    assert efficient_backward_scratch([q, q]) == [2 * 4 * 100 * 4], "dq is float32 itself"


def test_the_softmaxs_backward_pass_makes_one_more_matrix():
    assert softmax_backward_scratch([None, meta(2, 4, 8, 8, dtype=torch.float32)]) == [2 * 4 * 8 * 8 * 4]


def test_a_four_bit_product_unpacks_the_whole_weight():
    out = gemm_4bit(meta(3, 5, 64), meta(32 * 64 // 2, 1, dtype=torch.uint8), (32, 64), meta(32), 64, "nf4")
    assert (tuple(out.shape), out.dtype) == ((3, 5, 32), torch.bfloat16)


@pytest.mark.parametrize(
    ("kernels", "dtype", "mask", "operator"),
    [
        (CudaKernels(), torch.bfloat16, None, "_scaled_dot_product_flash_attention"),
        (CudaKernels(), torch.float32, None, "_scaled_dot_product_efficient_attention"),
        (CudaKernels(), torch.bfloat16, meta(16, 16, dtype=torch.bool), "_scaled_dot_product_efficient_attention"),
        (CudaKernels(has_flash=False), torch.float16, None, "_scaled_dot_product_efficient_attention"),
        (CPU, torch.bfloat16, None, "_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_attention_takes_the_kernel_of_the_device(kernels, dtype, mask, operator):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q = torch.empty(1, 4, 16, 32, dtype=dtype, device="meta")
    k = torch.empty(1, 2, 16, 32, dtype=dtype, device="meta")
    with cuda_choices(kernels), Watch():
        out = functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    assert out.shape == q.shape and f"aten.{operator}.default" in seen


@pytest.mark.parametrize(
    ("dtype", "length", "keeps_weights"),
    [(torch.float32, 64, False), (torch.bfloat16, 64, True), (torch.bfloat16, 256, True)],
)
def test_our_attention_takes_the_way_of_the_processor(dtype, length, keeps_weights):
    """In bfloat16 block by block, weights of few keys kept, in float32 the fused kernel. Keys are not copied for query heads."""
    q, k = (torch.empty(1, n, length, 32, dtype=dtype, device="meta", requires_grad=True) for n in (4, 2))
    saved = []
    with cuda_choices(CPU), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out, _ = tree_attention.tree_attention(None, q, k, k, None)
    assert any(each.numel() == 4 * length * length for each in saved) == keeps_weights
    kept = sum(each.numel() for each in saved if each.shape[-1] == 32)
    assert kept <= 2 * q.numel() + 2 * k.numel(), "queries, outputs, and keys and values of the fewer heads"
    out.sum().backward()
    assert (out.shape, k.grad.shape) == ((1, length, 4, 32), k.shape)


def test_weights_of_many_keys_are_made_again():
    q, k = (torch.empty(1, n, 1024, 32, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (4, 2))
    saved = []
    with cuda_choices(CPU), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tree_attention.tree_attention(None, q, k, k, None)
    kept = [each.shape for each in saved if each.ndim == 3 and each.shape[0] == 2]
    assert kept == [(2, 512, 256), (2, 512, 512)], "of the first blocks of 256 queries of two heads"
