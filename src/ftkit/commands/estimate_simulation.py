"""Simulations for estimate-memory, behind an import of their own: they load torch and transformers."""

from collections.abc import Callable
from typing import Any

from peft import LoraConfig

from ftkit.commands.estimate_model import Model
from ftkit.core.adapters import check_rank
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.gpus import Gpu
from ftkit.core.memory_estimate import MemoryEstimate
from ftkit.core.meta_model import build_meta_model
from ftkit.core.plain_script import PlainScript, script_memory
from ftkit.core.planned_run import PlannedRun
from ftkit.core.targets import resolve_targets
from ftkit.core.training_memory import cannot_simulate, simulated_device, training_memory
from ftkit.io.devices import DTYPES
from ftkit.io.quantization import quantization_config
from ftkit.io.stored_quantization import stored_quantization

OPTIMIZERS = {"adamw": "adamw-foreach"}
"""What torch takes by default where nothing else is said; other names are the same."""


def simulate_ftkit(
    settings: EstimateSettings,
    run: PlannedRun,
    model: Model,
    gpu: Gpu | None,
    capacity: int | None,
    heaviest: Callable[[PlannedRun], Any] | None,
) -> MemoryEstimate:
    """What `ftkit train` would take."""
    stored = stored_quantization(model.config)
    quantization = quantization_config(run.method, DTYPES[run.dtype], settings.kept_names, stored)
    device = simulated_device(gpu, capacity)
    new = model.new_tokens
    return training_memory(settings, run, model.config, quantization, device=device, heaviest=heaviest, new=new)


def simulate_hf(
    settings: EstimateSettings, run: PlannedRun, model: Model, gpu: Gpu | None, capacity: int | None
) -> MemoryEstimate:
    """What a plain script would take: prepared for 4 or 8 bits as PEFT's guide says, all logits at once.

    Several rows are taken to differ in length, so that transformers builds a mask.
    """
    adapter = None
    if run.method != "full":
        plain = build_meta_model(model.config, DTYPES[run.dtype])
        targets = resolve_targets(plain, settings.targets)
        check_rank(plain, targets, settings.r)
        adapter = LoraConfig(task_type="CAUSAL_LM", r=settings.r, lora_alpha=settings.alpha,
                             lora_dropout=settings.dropout, target_modules=targets)  # fmt: skip
    script = PlainScript(
        rows=run.rows,
        tokens=run.tokens,
        dtype=DTYPES[run.dtype],
        adapter=adapter,
        quantization=quantization_config(run.method, DTYPES[run.dtype], settings.kept_names),
        is_checkpointed=settings.gradient_checkpointing == "on",
        is_padded=run.rows > 1,
        optimizer=OPTIMIZERS.get(run.optimizer, run.optimizer),
        micro_steps=run.micro_steps,
    )
    with cannot_simulate(settings.model, model.config):
        return script_memory(script, model.config, simulated_device(gpu, capacity))
