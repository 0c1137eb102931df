"""Attach a LoRA adapter to a base model, or free all its weights: the same for train and estimate-memory.

LoRA: W x + (alpha / r) B A x, arXiv:2106.09685, section 4.1.
"""

from typing import Any

from torch import nn

from ftkit.core.lora_forward import speed_up_lora
from ftkit.core.settings import ModelSettings
from ftkit.core.targets import class_head, linear_layers, resolve_targets
from ftkit.errors import ExitCode, UserError
from ftkit.libraries import import_bitsandbytes


def make_trainable(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """The model with what the method trains set free: every weight (full), or a new adapter on the targets.

    Adapter weights are float32 whatever the base is; B is zero, so the model is unchanged at first. A new head for
    classes is trained in full beside the adapter.
    """
    if settings.method == "full":
        model.requires_grad_(True)
    else:
        model = attach_adapter(model, settings)
    if settings.gradient_checkpointing == "on":
        checkpoint_activations(model)
    return model


def attach_adapter(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """PEFT's LoRA on the layers that `--targets` means, with our forward pass."""
    import_bitsandbytes()
    from peft import LoraConfig, get_peft_model

    targets = resolve_targets(model, settings.targets)
    check_rank(model, targets, settings.r)
    head = class_head(model)
    if head is not None:
        head.widen()
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
        modules_to_save=None if head is None else head.names,
        bias="none",
    )
    tuned = get_peft_model(model, config)
    speed_up_lora(tuned)
    return tuned  # type: ignore[no-any-return]


def check_rank(model: nn.Module, targets: list[str], rank: int) -> None:
    """A rank above a layer's width is no low-rank update: exit 2 names the narrowest layer."""
    for name, layer in linear_layers(model).items():
        narrow = min(layer_shape(layer))
        if rank > narrow and any(name == t or name.endswith("." + t) for t in targets):
            raise UserError(
                f"--r {rank} is more than {name} is wide ({narrow})", ExitCode.USAGE, hint=f"--r {narrow} or less"
            )


def layer_shape(layer: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, of GPT-2's Conv1D too, whose weight lies the other way round."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return layer.weight.shape[0], layer.weight.shape[1]


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass instead of keeping them (arXiv:1604.06174)."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if any(not p.requires_grad for p in model.parameters()):
        model.enable_input_require_grads()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters with gradients, in a fixed order."""
    return [p for p in model.parameters() if p.requires_grad]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) as PEFT counts them: packed 4-bit weights count as the weights they hold."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count = count * 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
