"""Liger's kernels take a layer's place only where they give its numbers. The kernels themselves run on a card only.

Here stand their formulas, as liger-kernel's own docstrings say them.
"""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, build_model, config_of
from test_packed_attention import MORE, loss_and_gradients, sharing_examples
from transformers import AutoModelForCausalLM

from ftkit.core.adapters import make_trainable
from ftkit.core.batching import micro_batches
from ftkit.core.liger_kernels import LigerUse, use_liger
from ftkit.core.train_settings import TrainSettings


def rms_norm(x, weight, epsilon, offset, casting, in_place):
    assert not in_place
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    found = x.to(wide) * (x.to(wide).pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    if casting == "gemma":
        return (found * (offset + weight.to(wide))).to(dtype)
    return (found.to(dtype) * (offset + weight)).to(dtype)


def function(formula):
    return type("Function", (), {"apply": staticmethod(formula)})


@pytest.fixture
def liger(monkeypatch):
    """liger_kernel.ops, to be changed by a test."""
    ops = ModuleType("liger_kernel.ops")
    ops.LigerRMSNormFunction = function(rms_norm)
    ops.LigerSiLUMulFunction = function(lambda a, b: F.silu(a) * b)
    ops.LigerGELUMulFunction = function(lambda a, b: F.gelu(a, approximate="tanh") * b)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    monkeypatch.setitem(ARCHITECTURES, "gemma3", MORE["gemma3"])
    return ops


def lora(architecture):
    """Norms that are not all ones, adapters that do something."""
    model = build_model(architecture)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0.0 if "gemma" in architecture else 1.0, std=0.3)
    model = make_trainable(model, TrainSettings(r=4)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    ("architecture", "norms", "mlps"),
    [("llama", 5, 2), ("mistral", 5, 2), ("qwen3", 9, 2), ("gemma2", 9, 2), ("gemma3", 13, 2), ("gpt-neox", 0, 0)],
)  # fmt: skip
def test_loss_and_gradients_are_as_before(architecture, norms, mlps, liger):
    model, batches = lora(architecture), micro_batches(sharing_examples()[:3], 4)
    before = loss_and_gradients(model, batches)
    assert use_liger(model, sharing_examples(), "cpu") == LigerUse(norms, mlps)
    after = loss_and_gradients(model, batches)
    assert after[0] == pytest.approx(before[0], rel=1e-5) and model.training
    assert float((after[1] - before[1]).norm() / before[1].norm()) < 1e-4
    changed = [module for module in model.modules() if "forward" in vars(module) and "RMSNorm" in type(module).__name__]
    assert len(changed) == norms and use_liger(model, sharing_examples(), "cpu") == LigerUse(0, 0), "once is enough"
    other = build_model(architecture)
    assert not any("forward" in vars(module) for module in other.modules())


def test_a_norm_that_is_another_keeps_its_own(liger):
    liger.LigerRMSNormFunction = function(
        lambda x, weight, epsilon, *_: rms_norm(x, weight, epsilon + 0.1, 0.0, "llama", False)
    )
    assert use_liger(lora("llama"), sharing_examples(), "cpu") == LigerUse(0, 2)


def test_a_kernel_without_its_gradient_is_found_out(liger):
    liger.LigerSiLUMulFunction = function(lambda a, b: F.silu(a).detach() * b)
    assert use_liger(lora("llama"), sharing_examples(), "cpu") == LigerUse(5, 0)


def test_erfs_gelu_is_not_tanhs(liger):
    config = config_of("llama")
    config.hidden_act = "gelu"
    torch.manual_seed(0)
    assert use_liger(AutoModelForCausalLM.from_config(config), sharing_examples(), "cpu") == LigerUse(5, 0)


def test_what_fails_or_differs_in_the_model_is_taken_back(liger):
    """A kernel may be right for one input and wrong for another."""
    seen = []

    def wrong_later(x, *rest):
        seen.append(1)
        return rms_norm(x, *rest) * (1.0 if len(seen) <= 3 else 1.5)

    def failing(x, *rest):
        raise RuntimeError("PTX was compiled with an unsupported toolchain\nand more")

    for wrong, why in ((wrong_later, "logits differ"), (failing, "PTX was compiled")):
        liger.LigerRMSNormFunction = function(wrong)
        model = lora("llama")
        before = [module for module in model.modules() if "forward" in vars(module)]
        found = use_liger(model, sharing_examples(), "cpu")
        assert why in found.fault and "\n" not in found.fault and (found.norms, found.mlps) == (0, 0)
        assert [module for module in model.modules() if "forward" in vars(module)] == before and model.training


def test_the_random_state_is_left_alone(liger):
    model = lora("llama")
    before = torch.get_rng_state()
    use_liger(model, sharing_examples(), "cpu")
    assert torch.equal(torch.get_rng_state(), before)
