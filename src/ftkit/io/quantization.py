"""4- and 8-bit base weights through bitsandbytes: how they are asked for, made safe on CPU, and fingerprinted.

NF4 and double quantisation: QLoRA, arXiv:2305.14314, section 3. LLM.int8(): arXiv:2208.07339.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ftkit.errors import ExitCode, UserError
from ftkit.io.stored_quantization import FOUR_BITS

BLOCK = 64
"""Weights per 4-bit block with a scale of its own."""
HEADS = ("lm_head", "embed_out")
"""Output heads, which transformers keeps by itself only where no other layer is named."""


def quantization_of(method: str) -> str | None:
    """How a training method holds its base, by the word that cards use for both: qlora -> nf4-dq, ia3/fp4 -> fp4."""
    known = {"qlora": "nf4-dq", "int8": "int8"}.get(method) or method.rpartition("/")[2]
    return known if known in FOUR_BITS or known == "int8" else None


def quantization_config(
    method: str, compute: torch.dtype, kept: Sequence[str] = (), stored: dict[str, Any] | None = None
) -> Any:
    """The bitsandbytes settings of a training method; None where the base stays as it is.

    kept: names of layers that stay in 16 bits, beside the output head, which always does. stored: `stored_quantization` of
    a base whose files are packed already, which then decides.
    """
    from transformers import BitsAndBytesConfig

    if stored is not None:
        return BitsAndBytesConfig.from_dict({**stored, "bnb_4bit_compute_dtype": compute})
    quantization, skipped = quantization_of(method), [*kept, *HEADS] if kept else None
    if quantization in FOUR_BITS:
        kind, double = FOUR_BITS[quantization]
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=skipped,
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return None


def check_quantization(quantization: str | None) -> None:
    """Exit 6 for a quantised base where bitsandbytes is not installed."""
    if quantization and find_spec("bitsandbytes") is None:
        hint = "pip install bitsandbytes; or train without it: --lora"
        bits = 8 if quantization == "int8" else 4
        raise UserError(
            f"a base in {bits} bits needs bitsandbytes, which is not installed", ExitCode.ENVIRONMENT, hint=hint
        )


def keep_plain_layout(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights on CPU.

    bitsandbytes 0.50 repacks every Linear4bit in place at the first pass without gradients, on CPUs with AVX512-BF16:
    lossy, so later gradients are wrong without a word, and sizes not divisible by 32 crash.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # no attribute that mypy knows


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every 4- or 8-bit linear layer; names as in the base model, without PEFT's prefixes.

    PEFT's wrapper around such a layer has the same class name and is passed over.
    """
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and not hasattr(module, "base_layer"):
            yield plain_name(name), module


def plain_name(name: str) -> str:
    """`base_model.model.x.base_layer` -> `x`."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def quantized_fingerprints(model: nn.Module) -> dict[str, str]:
    """sha256 of each quantised weight with its scales, by layer name: what merge compares its own quantisation with."""
    return {name: fingerprint(module.weight, moved_scales(module)) for name, module in quantized_layers(model)}


def moved_scales(layer: Any) -> Tensor | None:
    """The scales of an int8 layer that has run: its first pass takes them from the weight into the layer's state."""
    return getattr(getattr(layer, "state", None), "SCB", None)


def fingerprint(weight: Any, scales: Tensor | None = None) -> str:
    """sha256 of a quantised weight: packed values, then scales; double quantisation's second scales and offset too.

    scales: those of an int8 weight, where its layer keeps them.
    """
    return hash_tensors(quantized_parts(weight, scales))


def quantized_parts(weight: Any, scales: Tensor | None = None) -> list[Tensor]:
    """The tensors that together are a quantised weight, in a fixed order."""
    state = getattr(weight, "quant_state", None)
    if state is None:  # LLM.int8(): int8 values and one scale for each row
        return [weight.data, weight.SCB if scales is None else scales]
    parts = [weight.data, state.absmax]
    if state.nested:
        parts += [state.offset.reshape(1), state.state2.absmax]
    return parts


def rounding_errors(model: nn.Module, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(layer, its weight in the base's files minus what the layer holds), float32 (out, in), of each quantised layer.

    read: the tensor of a name from the files.
    """
    for name, layer in quantized_layers(model):
        weight = read(f"{name}.weight").float()
        source: type = getattr(layer, "source_cls", nn.Linear)
        upright = weight.T if source.__name__ == "Conv1D" else weight
        yield name, upright - dequantize_weight(layer.weight, moved_scales(layer)).float()


def hash_tensors(tensors: list[Tensor]) -> str:
    """sha256 over the bytes of tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def quantize_weight(weight: Tensor, method: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    """One weight as loading quantises it for a training method: cast to `dtype` first, then packed by bitsandbytes.

    weight: (out, in), any floating-point format. Returns bitsandbytes' parameter; `fingerprint` takes it.
    """
    from bitsandbytes.nn import Int8Params, Params4bit

    if quantization_of(method) == "int8":
        return Int8Params(weight.to(dtype), requires_grad=False, has_fp16_weights=False).to(device)
    asked = quantization_config(method, dtype)
    return Params4bit(
        weight.to(dtype),
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=asked.bnb_4bit_use_double_quant,
        quant_type=asked.bnb_4bit_quant_type,
        quant_storage=asked.bnb_4bit_quant_storage,
    ).to(device)


def dequantize_weight(weight: Any, scales: Tensor | None = None) -> Tensor:
    """The values (out, in) that a quantised weight stands for, on the CPU.

    4 bits: in the format that it was quantised from, as the layer computes with them. int8: float32,
    value * scale / 127; scales: where the layer keeps them, once it has run.
    """
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    state = getattr(weight, "quant_state", None)
    if state is not None:
        return dequantize_4bit(weight.data, state).cpu()  # type: ignore[no-any-return]
    return int8_vectorwise_dequant(weight.data, weight.SCB if scales is None else scales).cpu()  # type: ignore[no-any-return]


def dequantize_stored(packed: Tensor, beside: dict[str, Tensor]) -> Tensor:
    """The values (out, in) of a packed weight as a file holds it, with what lies beside it (by the end of its name)."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

    if "SCB" in beside:
        return int8_vectorwise_dequant(packed, beside["SCB"])  # type: ignore[no-any-return]
    return dequantize_4bit(packed, QuantState.from_dict(beside, device=torch.device("cpu")))  # type: ignore[no-any-return]


def seen_in_training(
    weight: Tensor, method: str, dtype: torch.dtype, sha256: str | None, *, transposed: bool
) -> tuple[Tensor, bool]:
    """(the values that training saw in a weight that it held quantised, whether they have the recorded fingerprint).

    weight: as in the file, (in, out) where `transposed`; the values lie the same way. sha256: None accepts any.
    """
    upright = weight.T if transposed else weight
    is_same = False
    for device in quantizing_devices():
        packed = quantize_weight(upright, method, dtype, device)
        is_same = sha256 in (None, fingerprint(packed))
        if is_same:
            break
    values = dequantize_weight(packed)
    return (values.T.contiguous() if transposed else values), is_same


def quantised_forward(weight: Tensor, bias: Tensor | None, x: Tensor, method: str, dtype: torch.dtype) -> Tensor:
    """x (..., in) -> (..., out) as a layer with this weight (out, in), quantised for a training method, computes it."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    outputs, inputs = weight.shape
    if quantization_of(method) == "int8":
        threshold = quantization_config(method, dtype).llm_int8_threshold
        layer = Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=threshold)
    else:
        layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype)
        layer.support_avx512bf16_for_cpu = False
    layer.weight = quantize_weight(weight, method, dtype)
    layer.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer.eval()(x)  # type: ignore[no-any-return]


def quantizing_devices() -> list[str]:
    """Where to quantise a weight again: on the CPU, and on the GPU if there is one, whose rounding may differ."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
