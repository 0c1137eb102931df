"""Our forward pass of a LoRA layer is PEFT's: the same numbers and gradients, on the same parameters."""

import pytest
import torch
from architectures import build_model
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from ftkit.core.lora_forward import lora_forward, speed_up_lora

WIDE, NARROW, TOKENS, RANK = 64, 32, 50, 4


class OneLayer(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def linear(dtype):
    return torch.nn.Linear(WIDE, NARROW, dtype=dtype)


def conv1d(dtype):
    return Conv1D(NARROW, WIDE).to(dtype)


def linear_4bit(dtype):
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(WIDE, NARROW, compute_dtype=dtype, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return layer


def linear_8bit(dtype):
    from bitsandbytes.nn import Linear8bitLt

    return Linear8bitLt(WIDE, NARROW, has_fp16_weights=False).to("cpu")


LAYERS = {"linear": linear, "conv1d": conv1d, "4bit": linear_4bit, "8bit": linear_8bit}


def adapted(kind, dtype, *, dropout=0.0, **options):
    """One adapted layer, its adapter float32 and large enough to matter."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=8, lora_dropout=dropout, target_modules=["layer"], **options)
    model = get_peft_model(OneLayer(LAYERS[kind](dtype)), config).train()
    layer = model.base_model.model.layer
    for name in layer.lora_B:
        torch.nn.init.normal_(layer.lora_B[name].weight, std=0.05)
    return model, layer


def pass_through(layer, dtype, seed=3):
    """(output, gradient of the input, of A, of B) under an uneven loss."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS // 2, WIDE, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(2, TOKENS // 2, NARROW, generator=generator)
    layer.zero_grad()
    torch.manual_seed(seed)
    out = layer(x)
    (out.float() * weight).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for n, p in layer.named_parameters() if "lora_" in n)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_in_float32_it_is_pefts(kind, dropout):
    model, layer = adapted(kind, torch.float32, dropout=dropout)
    theirs = pass_through(layer, torch.float32)
    assert speed_up_lora(model) == 1 and layer.forward.__func__ is lora_forward
    ours = pass_through(layer, torch.float32)
    assert len(ours) == 4 and all(value.abs().sum() > 0 for value in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))
    if dropout:  # another seed drops others
        assert not torch.allclose(pass_through(layer, torch.float32, seed=4)[0], ours[0])


def plain_weight(base):
    """The frozen weight (out, in) as it is multiplied."""
    if hasattr(base.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(base.weight.data, base.weight.quant_state)
    return base.weight.detach().t() if isinstance(base, Conv1D) else base.weight.detach()


def error(values, exact):
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(values, exact, strict=True)]


@pytest.mark.parametrize("kind", ["linear", "conv1d", "4bit"])
def test_in_bfloat16_it_is_within_rounding_of_the_exact_result(kind):
    """The adapter here changes as much as the base gives, far more than in training; all to bfloat16's 2**-8.

    Output and the gradient that travels on: at most a quarter further off than PEFT's own, which adds in float32.
    """
    model, layer = adapted(kind, torch.bfloat16)
    theirs = pass_through(layer, torch.bfloat16)
    speed_up_lora(model)
    ours = pass_through(layer, torch.bfloat16)
    base, weight = layer.base_layer, plain_weight(layer.base_layer).double()
    a, b = (p.detach().double().requires_grad_() for n, p in layer.named_parameters() if "lora_" in n)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS // 2, WIDE, generator=generator).to(torch.bfloat16).double().requires_grad_()
    loss_weight = torch.randn(2, TOKENS // 2, NARROW, generator=generator).double()
    out = x @ weight.t() + base.bias.double() + 2.0 * (x @ a.t() @ b.t())
    (out * loss_weight).sum().backward()
    exact = [out.detach(), x.grad, a.grad, b.grad]
    ours_off, theirs_off = error(ours, exact), error(theirs, exact)
    assert [value.dtype for value in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert ours_off[0] <= 1.25 * theirs_off[0] and ours_off[1] <= 1.25 * theirs_off[1]
    assert max(ours_off) < 2**-8


def test_only_plain_layers_get_it():
    assert speed_up_lora(adapted("linear", torch.float32, use_dora=True)[0]) == 0
    assert speed_up_lora(adapted("linear", torch.float32, lora_bias=True)[0]) == 0
    assert speed_up_lora(adapted("linear", torch.float32, use_rslora=True)[0]) == 1


def test_adapters_that_are_off_merged_or_two_are_pefts_business():
    model, layer = adapted("linear", torch.float32)
    speed_up_lora(model)
    x = torch.randn(3, WIDE)
    with torch.no_grad():
        tuned, base = layer(x), layer.base_layer(x)
        with model.disable_adapter():
            assert torch.equal(layer(x), base)
        layer.merge()
        torch.testing.assert_close(layer(x), tuned)
        layer.unmerge()
        model.add_adapter("second", LoraConfig(r=2, target_modules=["layer"]))
        model.set_adapter("second")  # B of a new adapter is zero
        torch.testing.assert_close(layer(x), base, atol=1e-6, rtol=1e-6)
        model.set_adapter("default")
        torch.testing.assert_close(layer(x), tuned)


def test_files_and_state_are_pefts():
    model = get_peft_model(build_model("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = list(model.state_dict())
    assert speed_up_lora(model) == 14 and list(model.state_dict()) == names
