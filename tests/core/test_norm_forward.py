"""The faster RMSNorm gives the model's own bits, and its gradients."""

import pytest
import torch
from architectures import build_model
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ftkit.core import norm_forward
from ftkit.core.norm_forward import speed_up_norms

WIDTH = 96


def frozen(kind: type[torch.nn.Module] = LlamaRMSNorm, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    norm = kind(WIDTH, eps=1e-5)
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3, generator=torch.Generator().manual_seed(1))
    return norm.to(dtype).requires_grad_(False)


def pass_through(norm: torch.nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, gradient of the input) for numbers that `dtype` can hold."""
    generator = torch.Generator().manual_seed(0)
    x, back = (torch.randn((2, 300, WIDTH), generator=generator).to(dtype).to(norm.weight.dtype) for _ in range(2))
    out = norm(x.requires_grad_())
    out.backward(back)
    return out.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_its_outputs_are_the_models_to_the_bit_and_its_gradients_nearer_to_the_truth(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_forward, "PIECE", 70 * WIDTH)
    norm = frozen(dtype=dtype)
    outs, grads = pass_through(norm, dtype)
    _, truth = pass_through(frozen(dtype=dtype).double(), dtype)
    assert speed_up_norms(norm) == 1
    fast_outs, fast_grads = pass_through(norm, dtype)
    assert torch.equal(fast_outs, outs)
    assert fast_grads.dtype == dtype
    ours, theirs = ((g.float() - truth.float()).norm() for g in (fast_grads, grads))
    assert ours <= 1.02 * theirs


def test_norms_that_are_written_otherwise_trained_or_of_32_bits_keep_their_own() -> None:
    assert speed_up_norms(frozen(GemmaRMSNorm)) == 0
    assert speed_up_norms(frozen(dtype=torch.float32)) == 0
    assert speed_up_norms(frozen().requires_grad_(True)) == 0
    assert speed_up_norms(frozen().to("meta")) == 0


def test_rows_of_another_format_and_a_norm_that_is_trained_later_go_the_models_way() -> None:
    norm = frozen()
    assert speed_up_norms(norm) == 1
    assert norm(torch.ones(1, WIDTH)).dtype == torch.float32
    norm.requires_grad_(True)
    norm(torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_a_whole_model_gives_the_same_logits(name: str) -> None:
    model = build_model(name).bfloat16().requires_grad_(False).eval()
    ids = torch.arange(20)[None] % 50
    before = model(input_ids=ids).logits
    assert speed_up_norms(model) >= 5
    assert torch.equal(model(input_ids=ids).logits, before)
