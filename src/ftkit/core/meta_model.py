"""A model without weights: the modules that loading would give, on the meta device, from its config alone.

Quantised layers are bitsandbytes' own modules with packed weights and quantisation state on meta, so that the
same adapters, loss and hooks run on them as in training. Which layers stay 16-bit is asked of transformers'
own loader.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from ftkit.io.class_head import CLASSES, ClassHead

BLOCK = 64  # values per scale of a 4-bit weight
SCALES_BLOCK = 256  # scales per second-level scale (double quantisation, arXiv:2305.14314, section 3)


def build_meta_model(
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    quantization: BitsAndBytesConfig | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The model of a config on meta, with a head for words or for classes, frozen, as from_pretrained would give it.

    dtype: of the weights that are not quantised. quantization: what from_pretrained would be given.
    attention: an implementation of transformers; None for the one it picks itself. The config is copied.
    """
    own = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        has_classes = getattr(own, "problem_type", None) == CLASSES
        kind = AutoModelForSequenceClassification if has_classes else AutoModelForCausalLM
        model = kind.from_config(own, dtype=dtype, attn_implementation=attention)
        if quantization is not None:
            if has_classes:
                quantization.llm_int8_skip_modules = ClassHead(model).names
            quantise(model, quantization, dtype)
    model.requires_grad_(False)
    return model


def quantise(model: PreTrainedModel, settings: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Replace the linear layers that transformers' loader would quantise, in place."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear  # loads bitsandbytes
    from transformers.quantizers.base import HfQuantizer

    kept = HfQuantizer.get_modules_to_not_convert(model, settings.llm_int8_skip_modules, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=settings)
    second_codes = _empty(SCALES_BLOCK, torch.float32)  # one table for all layers
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            pack_8bit(module, dtype)
        elif type(module).__name__ == "Linear4bit":
            pack_4bit(module, dtype, second_codes if settings.bnb_4bit_use_double_quant else None)
    model.is_loaded_in_4bit = settings.load_in_4bit
    model.is_loaded_in_8bit = settings.load_in_8bit
    model.config.quantization_config = settings


def pack_4bit(module: Any, dtype: torch.dtype, second_codes: Tensor | None) -> None:
    """Give a Linear4bit its packed weight, (N/2, 1) bytes, and its scales, one for 64 values.

    Scales are float32, or with double quantisation one byte each and a float32 for 256 of them.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    values = module.in_features * module.out_features
    blocks = -(-values // BLOCK)
    quant_type = module.weight.quant_type
    state = QuantState(
        absmax=_empty(blocks, torch.float32 if second_codes is None else torch.uint8),
        shape=torch.Size([module.out_features, module.in_features]),
        code=_empty(16, torch.float32),
        blocksize=BLOCK,
        quant_type=quant_type,
        dtype=dtype,
    )
    if second_codes is not None:
        scales = _empty(-(-blocks // SCALES_BLOCK), torch.float32)
        state.state2 = QuantState(absmax=scales, code=second_codes, blocksize=SCALES_BLOCK, dtype=torch.float32)
        state.offset = _empty((), torch.float32)
        state.nested = True
    module.weight = Params4bit(
        _empty(((values + 1) // 2, 1), torch.uint8),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=second_codes is not None,
        quant_type=quant_type,
        bnb_quantized=True,
        module=module,
    )
    module.quant_state = state
    cast_bias(module, dtype)


def pack_8bit(module: Any, dtype: torch.dtype) -> None:
    """Give a Linear8bitLt its int8 weight (out, in) and one float32 scale for each row."""
    from bitsandbytes.nn import Int8Params

    weight = _empty((module.out_features, module.in_features), torch.int8)
    scales = _empty(module.out_features, torch.float32)
    module.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scales)
    cast_bias(module, dtype)


def cast_bias(module: nn.Linear, dtype: torch.dtype) -> None:
    """The bias is not quantised; it keeps the model's dtype."""
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)


def _empty(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
