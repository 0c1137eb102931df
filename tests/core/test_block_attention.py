"""Attention by blocks is attention: outputs and gradients against the formula as it is written."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ftkit.core import block_attention as module
from ftkit.core import compiled_shapes
from ftkit.core.block_attention import MOST_QUERIES, block_attention, blocks_of, last_keys
from ftkit.core.tree_attention import Layout, causal_mask, segment_attention

WINDOWS = [(2, 2, None), (6, 2, None), (7, 1, None), (32, 1, None), (2, 1, 7), (7, 1, 90), (2, 2, 290)]
TREE = Layout((40, 300, 9, 17, 3, 70), ((), (0,), (0,), (0, 2), (0, 2), ()))
"""A root with a long and a short child, which has two of its own; and a root alone."""


def random_inputs(
    heads: int, groups: int, length: int, before: int, dtype: torch.dtype, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a layer hands them over: views of (B, T, heads, d)."""
    shapes = ((batch, length, heads, 8), (batch, before + length, groups, 8), (batch, before + length, groups, 8))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, dtype=dtype, generator=generator).transpose(1, 2).requires_grad_() for s in shapes)
    return q, k, v


def gradients(out: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of a sum that weighs every output differently."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def written_out(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """(B, L, H, d)."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    refused = ~causal_mask(q.shape[2], k.shape[2], window, q.device)
    scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(refused, float("-inf"))
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


def assert_equal(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], inputs: Sequence[Tensor]) -> None:
    for got, wanted in zip(gradients(ours(), inputs), gradients(theirs(), inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.fixture(params=["lengths as they are", "filled up"])
def filling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bfloat16 on a CPU has it, in float64."""
    if request.param == "filled up":
        monkeypatch.setattr(compiled_shapes, "is_compiled", lambda _: True)


@pytest.fixture(params=["kept", "made again"])
def keeping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of pairs until the backward pass."""
    if request.param == "made again":
        monkeypatch.setattr(module, "KEPT_KEYS", 0)
        monkeypatch.setattr(module, "KEPT_WIDTHS", 0)


@pytest.mark.usefixtures("keeping", "filling")
@pytest.mark.parametrize("before", [0, 5, 300])
@pytest.mark.parametrize(("heads", "groups", "window"), WINDOWS)
def test_blocks_give_the_formulas_outputs_and_gradients(
    heads: int, groups: int, window: int | None, before: int
) -> None:
    inputs = random_inputs(heads, groups, MOST_QUERIES + 30, before, torch.float64)
    assert_equal(lambda: block_attention(*inputs, None, window), lambda: written_out(*inputs, window=window), inputs)


@pytest.mark.usefixtures("keeping", "filling")
@pytest.mark.parametrize(("heads", "groups", "window"), [*WINDOWS, (2, 2, 1), (2, 2, 20)])
def test_a_packs_segments_look_at_themselves_and_the_ones_above(heads: int, groups: int, window: int | None) -> None:
    inputs = random_inputs(heads, groups, sum(TREE.lengths), 0, torch.float64, batch=1)
    assert_equal(
        lambda: block_attention(*inputs, None, window, TREE.lengths, TREE.ancestors),
        lambda: segment_attention(*inputs, TREE, None, 0.0, window, None),
        inputs,
    )


def test_every_query_is_in_one_block_and_blocks_come_after_what_they_look_at() -> None:
    blocks = list(blocks_of(TREE.lengths, TREE.ancestors, 0, None, 64))
    assert [at for block in blocks for at in range(block.queries.start, block.queries.stop)] == list(range(439))
    for number, block in enumerate(blocks):
        in_front = [at for span in block.above for at in range(span.start, span.stop)]
        assert len(in_front) == len(set(in_front)) == block.before
        for at in in_front:
            [shown] = [other for other in blocks[:number] if other.own.start <= at < other.own.stop]
            assert shown.is_seen


def test_a_window_keeps_the_last_keys_of_several_spans() -> None:
    assert last_keys([slice(0, 5), slice(10, 13)], 4) == [slice(4, 5), slice(10, 13)]
    assert last_keys([slice(0, 5), slice(10, 13)], 2) == [slice(5, 5), slice(11, 13)]


def test_without_gradients_no_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(module, "is_kept", lambda keys: asked.append(keys))
    q, k, v = random_inputs(2, 2, 40, 0, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block_attention(q, k, v, None, None), written_out(q, k, v, window=None))
    block_attention(q.detach(), k.detach(), v.detach(), None, None)
    assert not asked
    block_attention(q.detach(), k.detach(), v, None, None)
    assert len(asked) == 1


def test_in_bfloat16_blocks_are_as_near_to_the_truth_as_the_formula_written_out() -> None:
    inputs = random_inputs(4, 2, 600, 100, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = gradients(written_out(*exact, window=None), exact)
    formula = gradients(written_out(*inputs, window=None), inputs)
    ours = gradients(block_attention(*inputs, None, None), inputs)
    for got, other, wanted in zip(ours, formula, truth, strict=True):
        assert distance(got, wanted) < 1.25 * distance(other, wanted)


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.double() - b).norm() / b.norm())
