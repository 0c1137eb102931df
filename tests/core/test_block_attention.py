"""Attention by blocks is attention: outputs and gradients against the formula as it is written."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ftkit.core.block_attention import MOST_QUERIES, block_attention
from ftkit.core.tree_attention import attend, plain_attention


def random_inputs(
    heads: int, groups: int, length: int, before: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a layer hands them over: views of (B, T, heads, d)."""
    shapes = ((2, length, heads, 8), (2, before + length, groups, 8), (2, before + length, groups, 8))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, dtype=dtype, generator=generator).transpose(1, 2).requires_grad_() for s in shapes)
    return q, k, v


def gradients(out: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of a sum that weighs every output differently."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("before", [0, 5, 300])
@pytest.mark.parametrize(("heads", "groups", "window"), [(2, 2, None), (6, 2, None), (2, 1, 7), (2, 2, 290)])
def test_blocks_give_the_formulas_outputs_and_gradients(
    heads: int, groups: int, window: int | None, before: int
) -> None:
    inputs = random_inputs(heads, groups, MOST_QUERIES + 30, before, torch.float64)
    expected = gradients(plain_attention(*inputs, None, 0.0, window, None), inputs)
    for got, wanted in zip(gradients(block_attention(*inputs, None, window), inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_in_bfloat16_blocks_are_as_near_to_the_truth_as_the_formula_written_out() -> None:
    inputs = random_inputs(4, 2, 600, 100, torch.bfloat16)
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    truth = gradients(plain_attention(q, k, v, None, 0.0, None, None), [q, k, v])
    written_out = gradients(plain_attention(*inputs, None, 0.0, None, None), inputs)
    ours = gradients(attend(*inputs, None, 0.0, None, None), inputs)
    for got, other, wanted in zip(ours, written_out, truth, strict=True):
        assert distance(got, wanted) < 1.25 * distance(other, wanted)


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.double() - b).norm() / b.norm())
