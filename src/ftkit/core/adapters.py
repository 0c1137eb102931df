"""Attach an adapter to a base model, or free some of its weights: the same for train and estimate-memory.

LoRA: W x + (alpha / r) B A x, arXiv:2106.09685, section 4.1.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ftkit.core.lora_forward import speed_up_lora
from ftkit.core.model_settings import ModelSettings
from ftkit.core.selective import free_weights
from ftkit.core.targets import (
    class_head,
    ends_with,
    linear_layers,
    resolve_factors,
    resolve_norms,
    resolve_ranks,
    resolve_targets,
)
from ftkit.errors import ExitCode, UserError
from ftkit.io.new_tokens import NewTokens
from ftkit.libraries import import_bitsandbytes


def make_trainable(model: nn.Module, settings: ModelSettings, new: NewTokens | None = None) -> nn.Module:
    """The model with what the method trains set free: some or all of its weights, or a new adapter.

    Adapter weights are float32 whatever the base is; a new adapter changes nothing at first, but for virtual tokens. A new
    head for classes is trained in full beside all of them. new: tokens that get rows in the embeddings, which are trained too.
    """
    if new is not None:
        new.give_rows(model)
    if settings.technique in ADAPTERS:
        model = attach_adapter(model, settings, new)
    else:
        free_weights(model, settings)
    if settings.gradient_checkpointing == "on":
        checkpoint_activations(model, settings.checkpoint_every)
        if settings.offload_activations:
            offload_kept(model)
    return model


def attach_adapter(model: nn.Module, settings: ModelSettings, new: NewTokens | None = None) -> nn.Module:
    """PEFT's adapter on the layers that `--targets` means; plain LoRA with our forward pass."""
    import_bitsandbytes()
    from peft import get_peft_model

    with warnings.catch_warnings():  # of layers that PEFT has no sizes of, and of what it decides by itself
        warnings.simplefilter("ignore")
        config = ADAPTERS[settings.technique](model, settings)
        if (head := class_head(model)) is not None:
            head.widen()
            config.task_type, config.modules_to_save = "SEQ_CLS", head.names
        if new is not None:
            config.trainable_token_indices = new.trained_rows(model, config.target_modules)
        tuned: Any = get_peft_model(model, config)
    if settings.lora_init == "pissa" and not next(model.parameters()).is_meta:
        remember_start(tuned)
    speed_up_lora(tuned)
    return tuned  # type: ignore[no-any-return]


def lora_config(model: nn.Module, settings: ModelSettings) -> Any:
    """LoRA; DoRA (arXiv:2402.09353), rsLoRA (arXiv:2312.03732), PiSSA (arXiv:2404.02948)."""
    from peft import LoraConfig

    targets = resolve_targets(model, settings.targets)
    ranks = resolve_ranks(model, targets, settings.rank_pattern)
    check_rank(model, targets, settings.r, ranks)
    starts_in_weights = settings.lora_init == "pissa" and not next(model.parameters()).is_meta
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        rank_pattern=ranks,
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        init_lora_weights="pissa" if starts_in_weights else True,
        task_type="CAUSAL_LM",
        bias="none",
    )


def ia3_config(model: nn.Module, settings: ModelSettings) -> Any:
    """One factor for each output of the targets; of layers outside attention, for each input (arXiv:2205.05638)."""
    from peft import IA3Config

    targets, inputs = resolve_factors(model, settings.targets)
    return IA3Config(target_modules=targets, feedforward_modules=inputs, task_type="CAUSAL_LM")


def norm_config(model: nn.Module, settings: ModelSettings) -> Any:
    """Copies of the norms are trained (arXiv:2312.11420)."""
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=resolve_norms(model, settings.targets), task_type="CAUSAL_LM")


def prompt_config(model: nn.Module, settings: ModelSettings) -> Any:
    """Trained embeddings in front of every row (arXiv:2104.08691); they begin as those of random tokens."""
    from peft import PromptTuningConfig

    start = "RANDOM" if next(model.parameters()).is_meta else "SAMPLE_VOCAB"
    return PromptTuningConfig(
        num_virtual_tokens=settings.virtual_tokens,
        prompt_tuning_init=start,
        task_type="CAUSAL_LM",
    )


def prefix_config(model: nn.Module, settings: ModelSettings) -> Any:
    """Trained keys and values in front of every row, in every block (arXiv:2101.00190, without its MLP)."""
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(num_virtual_tokens=settings.virtual_tokens, task_type="CAUSAL_LM")


ADAPTERS: dict[str, Callable[[nn.Module, ModelSettings], Any]] = {
    "lora": lora_config,
    "ia3": ia3_config,
    "ln": norm_config,
    "prompt": prompt_config,
    "prefix": prefix_config,
}


def remember_start(tuned: Any) -> None:
    """Keep PiSSA's first factors, which were taken out of the base's weights: the saved update is what came on top.

    In the memory of the computer, not of its GPU.
    """
    tuned.pissa_start = {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in tuned.named_parameters()
        if ".lora_" in name
    }


@torch.no_grad()
def start_from_rounding(tuned: Any, errors: Iterable[tuple[str, Tensor]]) -> None:
    """LoftQ (arXiv:2310.08659, algorithm 1 with one step): s B A begins as the best low-rank form of what rounding lost.

    errors: layer -> its weight minus its quantised weight, (out, in). The quantised base stays as it is. PEFT's own form of
    this needs CUDA and leaves out the scale s.
    """
    for name, error in errors:
        layer = tuned.get_submodule(f"base_model.model.{name}")
        if not hasattr(layer, "lora_A"):
            continue
        (adapter,) = layer.lora_A
        rank, scale = layer.r[adapter], layer.scaling[adapter]
        u, s, v = torch.linalg.svd(error.to(layer.lora_A[adapter].weight), full_matrices=False)
        root = s[:rank].sqrt()
        layer.lora_A[adapter].weight.copy_(root[:, None] * v[:rank])
        layer.lora_B[adapter].weight.copy_(u[:, :rank] * root / scale)


def target_names(model: Any) -> list[str]:
    """Endings of the names of the adapted layers; none where no adapter has layers."""
    configs = getattr(model, "peft_config", {}).values()
    return sorted({name for config in configs for name in getattr(config, "target_modules", None) or ()})


def virtual_tokens(model: Any) -> int:
    """How many virtual tokens stand in front of every row now."""
    if getattr(model, "_adapters_disabled", False):
        return 0
    configs = getattr(model, "peft_config", {}).values()
    return sum(config.num_virtual_tokens for config in configs if config.is_prompt_learning)


def check_rank(model: nn.Module, targets: list[str], rank: int, others: dict[str, int] | None = None) -> None:
    """A rank above a layer's width is no low-rank update: exit 2 names the narrowest layer. others: of some layers."""
    for name, layer in linear_layers(model).items():
        narrow = min(layer_shape(layer))
        own = next((r for end, r in (others or {}).items() if ends_with(name, end)), rank)
        if own > narrow and any(ends_with(name, target) for target in targets):
            raise UserError(
                f"--r {own} is more than {name} is wide ({narrow})", ExitCode.USAGE, hint=f"--r {narrow} or less"
            )


def layer_shape(layer: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, of GPT-2's Conv1D too, whose weight lies the other way round."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return layer.weight.shape[0], layer.weight.shape[1]


def checkpoint_activations(model: Any, every: int = 1) -> None:
    """Recompute activations in the backward pass instead of keeping them (arXiv:1604.06174): of one block in `every`."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if any(not p.requires_grad for p in model.parameters()):
        model.enable_input_require_grads()
    if every == 1:
        return
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UserError(
            "--checkpoint-every: this model recomputes all of its blocks or none",
            ExitCode.MODEL,
            hint="leave out --checkpoint-every",
        )
    for number, block in enumerate(blocks):
        block.gradient_checkpointing = number % every == 0


def offload_kept(model: nn.Module) -> None:
    """What recomputed blocks keep for the backward pass, their inputs, waits for it in the computer's memory.

    Blocks must be recomputed already (`checkpoint_activations`): then nothing else of them is kept.
    """
    for block in (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)):
        block._gradient_checkpointing_func = partial(checkpoint_elsewhere, block._gradient_checkpointing_func)


def checkpoint_elsewhere(checkpoint: Callable[..., Any], *inputs: Any) -> Any:
    """A checkpointed pass of one block, whose kept tensors are moved out of the device's memory."""
    with torch.autograd.graph.saved_tensors_hooks(to_computer, bring_back):
        return checkpoint(*inputs)


def to_computer(kept: Tensor) -> Callable[[], Tensor]:
    """Copy a tensor into the computer's memory, pinned for a GPU; returns what brings it back.

    Of a tensor without data only its form is kept.
    """
    if kept.is_meta:
        return partial(torch.empty, kept.shape, dtype=kept.dtype, device=kept.device)
    place = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=kept.is_cuda).copy_(kept)
    return partial(place.to, kept.device, non_blocking=True)


def bring_back(bring: Callable[[], Tensor]) -> Tensor:
    """The tensor where it was."""
    return bring()


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
