"""The memory of a plain training script of transformers and PEFT, as their documentation writes it, without ftkit.

It is what published measurements were made with: all logits at once, PEFT's own forward pass, padded rows.
`ftkit.core.training_memory` is the same for what `ftkit train` does.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from ftkit.core.memory_estimate import MemoryEstimate
from ftkit.core.memory_simulation import SimulatedDevice, simulate
from ftkit.core.meta_model import build_meta_model


@dataclass(frozen=True)
class PlainScript:
    """What a script does in a step of `rows` x `tokens`.

    adapter: PEFT's configuration; None trains every weight. attention: an implementation of transformers.
    is_padded: rows differ in length, so that transformers builds a mask. optimizer: as in `optimizer_memory`.
    keeps_outputs: the variable that holds the model's outputs, with all logits, is let go after the optimizer's
    step, or only when the next forward pass has given new ones.
    """

    rows: int
    tokens: int
    dtype: torch.dtype
    adapter: Any | None
    quantization: BitsAndBytesConfig | None = None
    attention: str | None = None
    is_checkpointed: bool = False
    is_padded: bool = False
    optimizer: str = "adamw-foreach"
    micro_steps: int = 1
    keeps_outputs: Literal["step", "next forward"] = "step"


def script_memory(
    script: PlainScript, config: PretrainedConfig, device: SimulatedDevice = SimulatedDevice()
) -> MemoryEstimate:
    """The simulated peak of a script's second step, with the loading of its model. Raises what `simulate` raises."""

    def step(model: nn.Module) -> tuple[Tensor, Any]:
        ids = torch.zeros(script.rows, script.tokens, dtype=torch.int64, device="meta")
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.clone(), use_cache=False)
        return outputs.loss, outputs

    return simulate(
        lambda: build(script, config),
        step,
        script.optimizer,
        device=device,
        micro_steps=script.micro_steps,
        is_padded=script.is_padded,
        load_dtype=script.dtype,
        keeps_into_next=script.keeps_outputs == "next forward",
    )


def build(script: PlainScript, config: PretrainedConfig) -> nn.Module:
    """The model on meta: prepared for 4 or 8 bits as PEFT's guide does it, then with its adapter."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    model: Any = build_meta_model(config, script.dtype, quantization=script.quantization, attention=script.attention)
    checkpointing = {"use_reentrant": False}
    if script.quantization is not None:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=script.is_checkpointed, gradient_checkpointing_kwargs=checkpointing
        )
    elif script.is_checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        if script.adapter is not None:
            model.enable_input_require_grads()
    if script.adapter is None:
        model.requires_grad_(True)
        return model  # type: ignore[no-any-return]
    with torch.device("meta"):
        return get_peft_model(model, script.adapter)  # type: ignore[no-any-return]
