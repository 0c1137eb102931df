"""`ftkit estimate-memory --measure`: two real steps with random weights on this machine, beside their prediction.

With --data the steps are those of the heaviest micro-batch of its rows, shared prefixes included.
"""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ftkit import console
from ftkit.commands.estimate_data import read_data
from ftkit.commands.estimate_model import Model
from ftkit.commands.estimate_report import in_gib, versions, write_json
from ftkit.commands.estimate_run import Estimates
from ftkit.core.caching_allocator import MIB
from ftkit.core.cuda_operators import CPU
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.gpus import Gpu
from ftkit.core.memory_simulation import SimulatedDevice
from ftkit.core.optimizers import check_optimizer
from ftkit.core.real_steps import measure_steps
from ftkit.core.training_memory import present_gpu, simulated_device, training_memory
from ftkit.errors import ExitCode, UserError
from ftkit.io.devices import DTYPES, dtype_name, pick_device, pick_dtype
from ftkit.io.quantization import check_quantization, quantization_config
from ftkit.io.stored_quantization import stored_quantization

TOLERANCE = {"cuda": 0.02, "cpu": 0.05}
"""A larger difference is warned of. CUDA: the design's aim, not measured yet; CPU: see docs/memory.md."""
SLACK = {"cuda": 0, "cpu": 96 * MIB}
"""Bytes on top: code of libraries that is first used in a step becomes resident too."""


def measure(settings: EstimateSettings, model: Model) -> None:
    """Predict, run, compare. Exit 5 where this machine is too small."""
    device = pick_device("auto")
    if device == "mps":
        raise UserError(
            "--measure knows CUDA and CPU, this machine would train on MPS",
            ExitCode.ENVIRONMENT,
            hint="leave out --measure for the estimate",
        )
    check_optimizer(settings.optimizer, device)
    check_quantization(settings.quantization)
    gpu = present_gpu() if device == "cuda" else None
    predicted, measured, facts = predict_and_measure(settings, model, device, gpu)
    rows = compared(predicted, measured)
    for name, ours, real in rows:
        if abs(ours - real) > TOLERANCE[device] * real + SLACK[device]:
            console.warn(
                f"{name}: predicted {in_gib(ours)}, measured {in_gib(real)}: more apart than was to be expected"
            )
    if settings.json:
        write_json(facts | {"predicted": predicted, "measured": measured, "tolerance": TOLERANCE[device]})
        return
    lines = [(name, in_gib(ours), in_gib(real), f"{ours / real - 1:+.1%}") for name, ours, real in rows]
    console.table(facts["title"], ["", "predicted", "measured", "error"], lines, to_stdout=True)
    if outside := measured["outside_bytes"]:
        console.info(f"outside of the pool: {in_gib(outside)}, the CUDA context, other programs on the card included")


def predict_and_measure(
    settings: EstimateSettings, model: Model, device: str, gpu: Gpu | None
) -> tuple[dict[str, int], dict[str, int | None], dict[str, Any]]:
    """(predicted bytes, measured bytes, what was run)."""
    import torch

    width = model.config.get_text_config().hidden_size
    dtype = pick_dtype(settings.dtype, device, trains_weights=settings.needs_fp32, width=width)
    settings = replace(settings, dtype=dtype_name(dtype))
    rows = read_data(settings, model) if settings.data else None
    run = Estimates(model, rows).plan(settings, gpu)
    heaviest = partial(rows.heaviest, settings) if rows else None
    stored = stored_quantization(model.config)
    quantization = quantization_config(run.method, DTYPES[run.dtype], settings.kept_names, stored)
    simulated = SimulatedDevice(CPU) if gpu is None else simulated_device(gpu)
    new = model.new_tokens
    estimate = training_memory(settings, run, model.config, quantization, device=simulated, heaviest=heaviest, new=new)
    try:
        real = measure_steps(settings, run, model.config, quantization, device, new, heaviest)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"out of memory, as was to be expected from {in_gib(estimate.reserved_bytes)}",
            ExitCode.MEMORY,
            hint="make --micro-batch or --max-length smaller",
        ) from error
    tokens = (
        f"{heaviest(run).input_ids.numel()} positions of {settings.data}"
        if heaviest
        else f"{run.rows} x {run.tokens} tokens"
    )
    title = f"{settings.model}: {run.method}, {run.dtype}, {tokens} on {gpu.name if gpu else 'CPU'}"
    facts = {"schema": "ftkit.measurement/1", "model": settings.model, "title": title, "run": asdict(run),
             "data": rows and rows.facts, "device": gpu.name if gpu else "CPU", "versions": versions()}  # fmt: skip
    predicted = {"allocated_bytes": estimate.allocated_bytes, "reserved_bytes": estimate.reserved_bytes}
    return predicted, asdict(real), facts


def compared(predicted: dict[str, int], measured: dict[str, int | None]) -> list[tuple[str, int, int]]:
    """(name, predicted, measured) of what this device measures."""
    pairs = [("allocated", "allocated_bytes", "allocated_bytes"), ("reserved", "reserved_bytes", "reserved_bytes"),
             ("growth of the process", "allocated_bytes", "resident_bytes")]  # fmt: skip
    return [(name, predicted[ours], real) for name, ours, theirs in pairs if (real := measured[theirs])]
