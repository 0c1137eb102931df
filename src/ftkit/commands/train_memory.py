"""The memory that a run will need, foretold before anything is loaded, and held against what it took."""

from dataclasses import replace
from typing import Any

from ftkit import console
from ftkit.commands.train_plan import Prepared
from ftkit.core.caching_allocator import GIB, MIB, OutOfMemoryError
from ftkit.core.cuda_operators import CPU
from ftkit.core.gpus import Gpu
from ftkit.core.memory_estimate import MemoryEstimate
from ftkit.core.memory_simulation import SimulatedDevice
from ftkit.core.training_memory import predict_training, present_gpu, simulated_device
from ftkit.errors import ExitCode, UserError
from ftkit.io.quantization import quantization_config
from ftkit.io.stored_quantization import stored_quantization

SURPRISE = 0.03
"""A measured peak that is further from the foretold one is said: then the estimate is wrong, and others should know."""


def foretell(prepared: Prepared) -> tuple[Prepared, MemoryEstimate | None]:
    """The run, its gradient checkpointing settled, and its peak. Exit 5 where the GPU cannot hold it, unless --force; where it
    is tight, a warning.

    Asked for on a GPU, and for a dry run: it takes seconds, and on a CPU nothing depends on it. No peak otherwise, and
    where it cannot be foretold, which is said and stops nothing.
    """
    if prepared.device != "cuda" and not prepared.settings.dry_run:
        return prepared, None
    gpu = present_gpu() if prepared.device == "cuda" else None
    device = simulated_device(gpu) if gpu else SimulatedDevice(CPU)
    estimate = simulate(prepared, device)
    if estimate is None:
        return prepared, None
    if gpu and not gpu.holds(estimate.reserved_bytes) and prepared.settings.gradient_checkpointing == "auto":
        without = estimate.reserved_bytes / GIB
        prepared = replace(prepared, settings=replace(prepared.settings, gradient_checkpointing="on"))
        estimate = simulate(prepared, device) or estimate
        console.info(
            f"gradient checkpointing is on: without it the run needs {without:.2f} GiB of {gpu.name},"
            f" which has {gpu.usable_bytes / GIB:.2f} GiB free"
        )
    peak = f"{estimate.allocated_bytes / GIB:.2f} GiB of tensors, {estimate.reserved_bytes / GIB:.2f} GiB reserved"
    console.info(f"memory: {peak}, foretold for {gpu.name if gpu else 'this processor, without the libraries'}")
    if gpu and not gpu.holds(estimate.reserved_bytes):
        judge_tight(prepared, device, gpu, estimate)
    return prepared, estimate


def judge_tight(prepared: Prepared, device: SimulatedDevice, gpu: Gpu, estimate: MemoryEstimate) -> None:
    """A warning where a run fits only without the margin, or with a cache that is given back (what estimate-memory calls
    tight); else exit 5, unless --force.
    """
    needs = f"{estimate.reserved_bytes / GIB:.2f} GiB of {gpu.name}, which has {gpu.usable_bytes / GIB:.2f} GiB free"
    left = gpu.usable_bytes - gpu.context_bytes - estimate.reserved_bytes
    if left >= 0:
        margin = f"{left // MIB} MiB are left, {gpu.margin_bytes // MIB} should be"
        console.warn(f"the memory is tight: the run needs {needs}: {margin}")
    elif fits_with_less_cache(prepared, device, gpu, estimate):
        console.warn(
            f"the memory is tight: the run would take {needs}: it fits only as the allocator gives back its cache"
        )
    elif not prepared.settings.force:
        raise UserError(
            f"the run needs {needs}",
            ExitCode.MEMORY,
            hint="ftkit estimate-memory with the same options says what would fit; --force tries it all the same",
        )


def fits_with_less_cache(prepared: Prepared, device: SimulatedDevice, gpu: Gpu, estimate: MemoryEstimate) -> bool:
    """The tensors fit, though not with all that the allocator would keep."""
    capacity = gpu.usable_bytes - gpu.context_bytes
    if estimate.allocated_bytes > capacity:
        return False
    try:
        return simulate(prepared, replace(device, capacity_bytes=capacity)) is not None
    except OutOfMemoryError:
        return False


def simulate(prepared: Prepared, device: SimulatedDevice) -> MemoryEstimate | None:
    """The simulated peak; None, said, for an architecture that cannot be simulated."""
    settings = replace(prepared.settings, full=True) if prepared.settings.init else prepared.settings
    stored = stored_quantization(prepared.config)
    quantization = quantization_config(settings.recipe, prepared.dtype, settings.kept_names, stored)
    try:
        with console.quiet_libraries():
            return predict_training(
                settings,
                prepared.config,
                prepared.dtype,
                prepared.plan,
                prepared.examples,
                quantization,
                device,
                prepared.new_tokens,
            )
    except UserError as error:
        console.warn(f"its memory is not foretold: {error.message}")
        return None


def compare(prepared: Prepared, estimate: MemoryEstimate | None, info: dict[str, Any]) -> None:
    """Say where a GPU's measured peak is not the foretold one."""
    if estimate is None or prepared.device != "cuda":
        return
    measured = info["measured_peak_bytes"]
    if abs(measured - estimate.allocated_bytes) > SURPRISE * measured:
        without = ", without Liger kernels" if prepared.liger else ""
        console.warn(
            f"the peak was {measured / GIB:.2f} GiB of tensors, {estimate.allocated_bytes / GIB:.2f} GiB were foretold{without}"
        )
