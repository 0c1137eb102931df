"""Two real training steps with random weights, to hold against the simulation: no download, no rows.

The model is the simulated one with its empty tensors filled: quantised weights get random bytes, so that a model is never
in memory in 16 bits first. Values do not matter to memory; they are small so that nothing overflows.
"""

import gc
import resource
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from ftkit.core.adapters import make_trainable
from ftkit.core.batching import Batch
from ftkit.core.heap import give_back_free_memory, give_back_freed_memory
from ftkit.core.loss import mean_loss, summed_loss
from ftkit.core.meta_model import build_meta_model
from ftkit.core.model_settings import ModelSettings
from ftkit.core.optimizers import make_optimizer
from ftkit.core.packed_attention import packed_attention
from ftkit.core.planned_run import PlannedRun
from ftkit.core.training import train_step
from ftkit.core.training_memory import longest_batch
from ftkit.io.devices import DTYPES
from ftkit.io.new_tokens import NewTokens

STEPS = 2


@dataclass(frozen=True)
class Measured:
    """Bytes of two steps with the model's making. CUDA: the allocator's counters, and what is in use on the card outside of
    its pool: the context of this process, what libraries take themselves (paged optimizer states), other programs; CPU: by
    how much the resident memory of the process grew.
    """

    allocated_bytes: int | None
    reserved_bytes: int | None
    outside_bytes: int | None
    resident_bytes: int | None


def measure_steps(
    settings: ModelSettings,
    run: PlannedRun,
    config: PretrainedConfig,
    quantization: BitsAndBytesConfig | None,
    device: str,
    new: NewTokens | None = None,
    heaviest: Callable[[PlannedRun], Batch] | None = None,
) -> Measured:
    """Make the model on `device` (cuda, cpu) with random weights and take STEPS optimizer steps of the run's longest batch.

    heaviest: the heaviest micro-batch of real rows, with their ids; without it, the one that is simulated, with random ids.
    Raises torch.OutOfMemoryError where the device is too small.
    """

    def work() -> None:
        model = random_model(settings, run, config, quantization, device, new)
        with packed_attention(model) if run.pack else nullcontext():
            batch = heaviest(run).to(device) if heaviest else random_batch(run, model, device)
            take_steps(model, settings, run, batch, device)

    return measured_on_cuda(work) if device == "cuda" else measured_on_cpu(work)


def measured_on_cuda(work: Callable[[], None]) -> Measured:
    """The allocator's peaks, and what the driver counts beyond its pool: it is compared with nothing before the work, as the
    context is there already.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Measured(allocated, reserved, total - free - torch.cuda.memory_reserved(), None)


def measured_on_cpu(work: Callable[[], None]) -> Measured:
    """The growth of the process's resident memory, at its highest.

    The C library is told to give every freed block back at once: by default it keeps blocks below 32 MiB, and the
    memory of a process is 7 to 22 % more than its tensors ever took (seven runs of 0.5 to 2 GiB).
    """
    gc.collect()
    give_back_freed_memory(above=64 * 1024)
    give_back_free_memory()
    before = start_of_growth()
    work()
    return Measured(None, None, None, highest_resident() - before)


def start_of_growth() -> int:
    """The resident bytes now; Linux is told to look for the highest anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS") or highest_resident()


def highest_resident() -> int:
    """The most that was resident at once, since the start of the process or of `start_of_growth`."""
    unit = 1 if sys.platform == "darwin" else 1024
    return status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def status_bytes(key: str) -> int | None:
    """A size of /proc/self/status; None where there is none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


# ---------------------------------------------------------------- the work
def take_steps(model: nn.Module, settings: ModelSettings, run: PlannedRun, batch: Batch, device: str) -> None:
    """Optimizer steps as training takes them, then a pass over held-out rows."""
    optimizer = make_optimizer(model, settings.optimizer, 1e-5, 0.0)
    scaler = torch.amp.GradScaler(device, enabled=run.dtype == "fp16")
    model.train()
    batches = [batch] * min(run.micro_steps, 2)
    for _ in range(STEPS):
        train_step(model, optimizer, batches, summed_loss, scaler, 1.0)
    mean_loss(model, batches[:1], device)


def random_batch(run: PlannedRun, model: Any, device: str) -> Batch:
    """The batch that is simulated, with ids."""
    batch = longest_batch(run)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, batch.input_ids.shape, device=device)
    counted = torch.arange(run.positions, device=device)
    labels = torch.randint(vocabulary, (run.positions,), device=device)
    places = None
    if batch.layout is not None:
        places = torch.arange(run.tokens - 1, device=device).repeat(run.rows)[None, :]
    return replace(batch, input_ids=ids, counted=counted, labels=labels, position_ids=places).to(device)


def random_model(
    settings: ModelSettings,
    run: PlannedRun,
    config: PretrainedConfig,
    quantization: BitsAndBytesConfig | None,
    device: str,
    new: NewTokens | None,
) -> nn.Module:
    """The model that training would have, with random weights, quantised ones made as such."""
    base = build_meta_model(config, DTYPES[run.dtype], quantization=quantization)
    filled: dict[int, nn.Parameter] = {}
    for module in base.modules():
        fill(module, filled, device)
    base.tie_weights()
    with torch.device(device):
        settled = replace(settings, gradient_checkpointing="on" if run.checkpointing else "off")
        return make_trainable(base, settled, new)


def fill(module: nn.Module, filled: dict[int, nn.Parameter], device: str) -> None:
    """Replace a module's own empty tensors by small random ones on the device; a shared one is made once."""
    kind = type(module).__name__
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        if id(parameter) not in filled:
            is_packed = name == "weight" and kind in ("Linear4bit", "Linear8bitLt")
            filled[id(parameter)] = random_packed(module, device) if is_packed else random_parameter(parameter, device)
        module._parameters[name] = filled[id(parameter)]
    for name, buffer in list(module._buffers.items()):
        if buffer is not None:
            module._buffers[name] = torch.full_like(buffer, 0.5, device=device)  # rotary frequencies and the like


def random_parameter(parameter: nn.Parameter, device: str) -> nn.Parameter:
    """A frozen parameter of the same form."""
    made = torch.empty_like(parameter, device=device).normal_(0, 0.02)
    return nn.Parameter(made, requires_grad=False)


def random_packed(module: Any, device: str) -> nn.Parameter:
    """A packed weight of bitsandbytes with random bytes and scales near 0.02."""
    from bitsandbytes.nn import Int8Params, Params4bit

    weight = module.weight
    if type(module).__name__ == "Linear8bitLt":
        values = torch.randint(-127, 128, weight.shape, dtype=torch.int8, device=device)
        scales = torch.full_like(weight.SCB, 0.02, device=device)
        return Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)  # type: ignore[no-any-return]
    state = weight.quant_state
    for holder in filter(None, (state, state.state2)):
        holder.absmax, holder.code = random_like(holder.absmax, device), random_like(holder.code, device)
    if state.offset is not None:
        state.offset = torch.full_like(state.offset, 0.02, device=device)
    packed = torch.randint(256, weight.shape, dtype=torch.uint8, device=device)
    made = Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        bnb_quantized=True,
        module=module,
    )
    module.quant_state = state
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # as in training: bitsandbytes would repack the weight in place
    return made  # type: ignore[no-any-return]


def random_like(tensor: Tensor, device: str) -> Tensor:
    """Small values, or bytes."""
    if tensor.dtype == torch.uint8:
        return torch.randint_like(tensor, 256, device=device)
    return torch.full_like(tensor, 0.02, device=device)
