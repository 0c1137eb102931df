"""4- and 8-bit bases: safe on the CPU, and fingerprinted as merge will find them again."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from ftkit.core.adapters import make_trainable, trainable_parameters
from ftkit.core.batching import make_batch
from ftkit.core.encoding import Example
from ftkit.core.loss import mean_loss, summed_loss
from ftkit.core.train_settings import TrainSettings
from ftkit.io.base_model import find_base, load_weights
from ftkit.io.quantization import (
    dequantize_weight,
    fingerprint,
    keep_plain_layout,
    quantised_forward,
    quantization_config,
    quantize_weight,
    quantized_fingerprints,
    quantized_layers,
    seen_in_training,
)

FLAGS = {"qlora": {"qlora": True}, "int8": {"load_in_8bit": True}}
BATCH = make_batch(
    [Example(list(range(40, 60)), [False] * 5 + [True] * 15), Example(list(range(90, 101)), [False] * 2 + [True] * 9)]
)
ROW = torch.linspace(-1, 1, 64)


@pytest.fixture(scope="session")
def even_model(tmp_path_factory):
    """A Llama all of whose widths divide by 64."""
    folder = tmp_path_factory.mktemp("even")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["even", "tiny", "stories260k"])
def base(request):
    """Models that bitsandbytes' repacking spoils without a word (even), or cannot do: widths of 32 (tiny) and 172."""
    if request.param == "stories260k":
        return find_base(str(request.getfixturevalue("shared") / "models" / "stories260k"))
    return find_base(str(request.getfixturevalue(f"{request.param}_model")))


def quantized_model(base, method, dtype):
    """As train loads it, with an adapter that does something."""
    model = load_weights(base, dtype=dtype, device="cpu", quantization=quantization_config(method, dtype))
    torch.manual_seed(0)
    model = make_trainable(model, TrainSettings(r=4, **FLAGS[method]))
    keep_plain_layout(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def loss_and_gradients(model):
    model.zero_grad()
    loss = summed_loss(model, BATCH)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in trainable_parameters(model)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("method", ["qlora", "int8"])
def test_an_evaluation_in_between_changes_no_bit_of_loss_and_gradients(base, method, dtype):
    """Without keep_plain_layout, on a CPU with AVX512-BF16, qlora fails: other gradients, or a crash (see `base`)."""
    model = quantized_model(base, method, dtype)
    loss, gradients = loss_and_gradients(model)
    evaluated, _ = mean_loss(model, [BATCH], "cpu")
    loss_later, gradients_later = loss_and_gradients(model)
    assert torch.equal(loss, loss_later) and gradients
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_later, strict=True))
    assert all(gradient.any() for gradient in gradients)
    # to 1 %: on the CPU, LLM.int8() quantises activations in evaluation only
    assert evaluated == pytest.approx(float(loss) / BATCH.counted.numel(), rel=1e-2 if method == "int8" else 1e-5)


@pytest.mark.parametrize("method", ["qlora", "int8"])
def test_fingerprints_are_of_each_base_layer_and_outlive_training_passes(base, method):
    model = quantized_model(base, method, torch.bfloat16)
    before = quantized_fingerprints(model)
    loss_and_gradients(model)
    mean_loss(model, [BATCH], "cpu")
    assert quantized_fingerprints(model) == before
    names = [name for name, _ in quantized_layers(model)]
    assert len(names) == len(set(names)) == len(before)  # PEFT's wrappers are no layers of the base
    weights = load_file(base.folder / "model.safetensors")
    assert {f"{name}.weight" for name in before} == {name for name in weights if "_proj" in name}


@pytest.mark.parametrize("method", ["qlora", "int8"])
def test_a_weight_quantised_alone_has_the_fingerprint_that_training_saw(base, method):
    seen = quantized_fingerprints(quantized_model(base, method, torch.bfloat16))
    weights = load_file(base.folder / "model.safetensors")
    for name, expected in seen.items():
        assert fingerprint(quantize_weight(weights[f"{name}.weight"], method, torch.bfloat16)) == expected, name
    changed = weights[f"{name}.weight"].clone()
    changed[0, 0] += 1
    assert fingerprint(quantize_weight(changed, method, torch.bfloat16)) != expected


def test_training_computes_with_the_dequantised_weights(tiny_model):
    base = find_base(str(tiny_model))
    model = load_weights(
        base, dtype=torch.float32, device="cpu", quantization=quantization_config("qlora", torch.float32)
    )
    keep_plain_layout(model)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), x @ dequantize_weight(layer.weight).T, rtol=1e-5, atol=1e-5)


def test_nf4_holds_the_sixteen_normal_quantiles_times_the_largest_of_a_block():
    """QLoRA's table (arXiv:2305.14314, appendix E) comes back; scales are quantised too, to about 1 %."""
    table = [
        -1.0,
        -0.6962,
        -0.5251,
        -0.3949,
        -0.2844,
        -0.1848,
        -0.0911,
        0.0,
        0.0796,
        0.1609,
        0.2461,
        0.3379,
        0.4407,
        0.5626,
        0.7230,
        1.0,
    ]
    weight = torch.stack([torch.tensor(table * 4) * scale for scale in (1.0, 0.1)])
    back = dequantize_weight(quantize_weight(weight, "qlora", torch.float32))
    assert back.shape == (2, 64) and back.dtype == torch.float32
    torch.testing.assert_close(back[0] / back[0].abs().max(), torch.tensor(table * 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(back, weight, atol=0.02, rtol=0)


def test_int8_holds_each_row_in_127ths_of_its_largest():
    weight = torch.stack([ROW, ROW * 0.01])
    packed = quantize_weight(weight, "int8", torch.float32)
    assert packed.data.dtype == torch.int8 and packed.data[:, -1].tolist() == [127, 127]
    back = dequantize_weight(packed)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, weight, atol=0.5 / 127 + 1e-3, rtol=0)
    torch.testing.assert_close(back[1], weight[1], atol=0.01 * (0.5 / 127 + 1e-3), rtol=0)


def test_qlora_is_asked_for_as_the_paper_has_it():
    config = quantization_config("qlora", torch.bfloat16)
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization_config("int8", torch.bfloat16).load_in_8bit
    assert quantization_config("lora", torch.bfloat16) is None and quantization_config("full", torch.float32) is None


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 128), (40, 172), (3, 5)], ids=str)
def test_a_weight_is_quantised_alone_as_bitsandbytes_does_inside_its_layer(kind, dtype, shape):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    outputs, inputs = shape
    if kind == "int8":
        layer = Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
    else:
        options = {"quant_type": kind[:3], "compress_statistics": kind.endswith("dq")}
        layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, **options)
    layer.load_state_dict({"weight": weight})
    layer = layer.to(dtype).to("cpu")
    if kind == "int8":
        layer.weight = layer.weight.to("cpu")
    assert fingerprint(quantize_weight(weight, kind, dtype)) == fingerprint(layer.weight)
    values = dequantize_weight(layer.weight)
    assert torch.equal(seen_in_training(weight, kind, dtype, None, transposed=False)[0], values)
    assert torch.equal(seen_in_training(weight.T, kind, dtype, None, transposed=True)[0], values.T)
    assert (values.float() - weight.float()).abs().mean() < 0.15, "it stands for the weight"
    eye = torch.eye(inputs, dtype=dtype)
    if kind != "int8" and dtype is torch.float32:
        run = quantised_forward(weight, None, eye, kind, dtype)
        assert torch.allclose(run.T, values, atol=1e-6)
