"""The memory of `ftkit train`: its own model, adapter, batches and loss, simulated on the meta device."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from ftkit.core.adapters import make_trainable
from ftkit.core.allocation_events import RECORDED
from ftkit.core.batching import Batch, global_batches
from ftkit.core.classes import class_loss
from ftkit.core.cuda_operators import HOPPER_WORKSPACE, CudaKernels
from ftkit.core.encoding import Example
from ftkit.core.gpus import Gpu
from ftkit.core.loss import summed_loss
from ftkit.core.memory_estimate import MemoryEstimate
from ftkit.core.memory_simulation import Recording, SimulatedDevice, quiet, record
from ftkit.core.meta_model import build_meta_model
from ftkit.core.model_settings import ModelSettings
from ftkit.core.model_sizes import FAMILIES
from ftkit.core.packed_attention import packed_attention
from ftkit.core.packing import Segment
from ftkit.core.plan import Plan
from ftkit.core.planned_run import PlannedRun, with_padded_rows
from ftkit.core.tree_attention import make_layout, tree_attention
from ftkit.core.varlen_attention import make_spans
from ftkit.errors import ExitCode, UserError
from ftkit.io.class_head import CLASSES
from ftkit.io.devices import DTYPES, NAMES
from ftkit.io.new_tokens import NewTokens

EVEN_METHODS = ("lora", "full", "ia3", "ln", "bitfit")
"""Methods that train every block in the same way, and nothing whose size depends on how many there are."""
MOST_STEPS = 500
"""Optimizer steps whose batches `heaviest_batch` makes: in more of them hardly a heavier one turns up."""


def training_memory(
    settings: ModelSettings,
    run: PlannedRun,
    config: PretrainedConfig,
    quantization: BitsAndBytesConfig | None,
    *,
    device: SimulatedDevice = SimulatedDevice(),
    heaviest: Callable[[PlannedRun], Batch] | None = None,
    new: NewTokens | None = None,
) -> MemoryEstimate:
    """The peak of training with these settings, evaluation of held-out rows included.

    quantization: what `quantization_config` gives for the method. heaviest: the heaviest micro-batch of a run, on any
    device; without it, `longest_batch`. A model that ignores packs is trained on padded rows, and so it is estimated.
    Exit 6 for an architecture that has no form without data; OutOfMemoryError
    where the device has a capacity and the run does not fit.
    """
    with suppress(NotImplementedError, RuntimeError, TypeError, ValueError):  # those are told of the padded rows below
        if (
            run.pack
            and (packed := simulate_run(settings, run, config, quantization, device, heaviest, new)) is not None
        ):
            return packed
    padded = with_padded_rows(run, settings) if run.pack else run
    with cannot_simulate(settings.model, config):
        estimate = simulate_run(settings, padded, config, quantization, device, heaviest, new)
    assert estimate is not None
    return replace(estimate, ignores_packs=run.pack)


@contextmanager
def cannot_simulate(name: str, config: PretrainedConfig) -> Iterator[None]:
    """Exit 6 for what the meta device refuses, with its reason."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"cannot estimate: {error}", ExitCode.ENVIRONMENT, hint="pip install ftkit installs what is missing"
        ) from error
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{name}: {type(config).__name__.removesuffix('Config')} cannot be simulated: {reason}",
            ExitCode.ENVIRONMENT,
            hint="an operator of this architecture has no form without data; no number is better than a wrong one",
        ) from error


def simulate_run(
    settings: ModelSettings,
    run: PlannedRun,
    config: PretrainedConfig,
    quantization: BitsAndBytesConfig | None,
    device: SimulatedDevice,
    heaviest: Callable[[PlannedRun], Batch] | None,
    new: NewTokens | None,
) -> MemoryEstimate | None:
    """The estimate of a run; None if it packs rows and the model did not ask our attention for them."""
    batch = (heaviest or longest_batch)(run)
    blocks = alike_blocks(config, settings)
    if blocks is not None:
        short = shortened(config)
        recording, is_asked = record_run(settings, run, short, quantization, device, batch, new, blocks)
    if blocks is None or recording is None:
        recording, is_asked = record_run(settings, run, config, quantization, device, batch, new, None)
    assert recording is not None
    return recording.on(device) if is_asked or not run.pack else None


def record_run(
    settings: ModelSettings,
    run: PlannedRun,
    config: PretrainedConfig,
    quantization: BitsAndBytesConfig | None,
    device: SimulatedDevice,
    batch: Batch,
    new: NewTokens | None,
    blocks: int | None,
) -> tuple[Recording | None, bool]:
    """The events of a run, as `record`, and whether the model asked our attention. blocks: that config is short of."""
    is_asked = False
    dtype = DTYPES[run.dtype]
    settings = replace(settings, gradient_checkpointing="on" if run.checkpointing else "off")
    if batch.layout is not None and device.kernels.has_flash:
        batch = replace(
            batch, layout=replace(batch.layout, spans=make_spans(batch.layout.lengths, batch.layout.ancestors))
        )

    def attention(*inputs: Any, **options: Any) -> tuple[Tensor, None]:
        nonlocal is_asked
        is_asked = True
        return tree_attention(*inputs, **options)

    def build() -> nn.Module:
        model = build_meta_model(config, dtype, quantization=quantization)
        with torch.device("meta"):
            model = make_trainable(model, settings, new)
        if run.pack:
            stack.enter_context(packed_attention(model, attention))
        return model

    def step(model: nn.Module) -> Tensor:
        loss = class_loss if getattr(config, "problem_type", None) == CLASSES else summed_loss
        return loss(model, on_meta(batch)) / batch.counted.numel()

    loaded = dtype if quantization is not None else None
    with quiet(), ExitStack() as stack:
        recording = record(
            build, step, run.optimizer, kernels=device.kernels, micro_steps=run.micro_steps, load_dtype=loaded,
            evaluates=True, blocks=blocks,
        )  # fmt: skip
    return recording, is_asked


def alike_blocks(config: PretrainedConfig, settings: ModelSettings) -> int | None:
    """How many blocks a model has, if all of them are the same and trained in the same way; None otherwise.

    Only for architectures whose code is known to treat no block in its own way, and where no option names single blocks.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.model_type not in FAMILIES or len(kinds) > 1 or config.num_hidden_layers <= RECORDED + 2:
        return None
    if settings.technique not in EVEN_METHODS or settings.checkpoint_every > 1 or settings.freeze:
        return None
    if settings.quantization == "int8":  # bitsandbytes leaves tensors to Python's collector of cycles
        return None
    named = f"{settings.targets} {settings.rank_pattern or ''} {settings.keep_16bit or ''}"
    if any(each.isdigit() for each in re.sub(r"=\d+", "", named)):
        return None
    return int(config.num_hidden_layers)


def shortened(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the same model with RECORDED blocks."""
    values = config.to_dict() | {"num_hidden_layers": RECORDED}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:RECORDED]
    return type(config).from_dict(values)


def longest_batch(run: PlannedRun) -> Batch:
    """The micro-batch that needs the most: every row full, no token shared, every token counted, on meta."""
    positions = run.tokens - 1  # the last token of a row predicts nothing
    shape = (1, run.positions) if run.pack else (run.rows, positions)
    ids, places = (torch.zeros(shape, dtype=torch.int64, device="meta") for _ in range(2))
    counted, labels = (torch.zeros(run.positions, dtype=torch.int64, device="meta") for _ in range(2))
    if not run.pack:
        return Batch(ids, counted, labels, run.rows * run.tokens)
    layout = make_layout([Segment(row * positions, positions, 0, -1) for row in range(run.rows)])
    return Batch(ids, counted, labels, run.rows * run.tokens, places, layout)


def on_meta(batch: Batch) -> Batch:
    """A batch without its data, made anew for every pass: it ends with the pass, as the real one may."""
    ids, counted, labels = (
        torch.empty_like(each, device="meta") for each in (batch.input_ids, batch.counted, batch.labels)
    )
    places, layout = batch.position_ids, batch.layout
    if places is not None:
        places = torch.empty_like(places, device="meta")
    if layout is not None and layout.spans is not None:
        layout = replace(layout, spans=layout.spans.to("meta"))
    return Batch(ids, counted, labels, batch.tokens, places, layout)


def predict_training(
    settings: ModelSettings,
    config: PretrainedConfig,
    dtype: torch.dtype,
    plan: Plan,
    examples: Sequence[Example],
    quantization: BitsAndBytesConfig | None,
    device: SimulatedDevice = SimulatedDevice(),
    new: NewTokens | None = None,
) -> MemoryEstimate:
    """The peak of a run whose rows and plan are known, from the heaviest micro-batch that it will meet.

    dtype: of the frozen weights. device: `simulated_device` of the card, or `SimulatedDevice(CPU)`. As `training_memory`.
    """
    run = PlannedRun(
        method=settings.recipe,
        dtype=NAMES[dtype],
        tokens=max(len(example.ids) for example in examples),
        rows=plan.micro_batch,
        micro_steps=2 if steps_are_cut(plan, examples) else 1,
        optimizer=settings.optimizer,
        pack=plan.pack,
        checkpointing=settings.gradient_checkpointing == "on",
    )
    return training_memory(settings, run, config, quantization, device=device, new=new,
                           heaviest=lambda run: heaviest_batch(replace(plan, pack=run.pack), examples))  # fmt: skip


def heaviest_batch(plan: Plan, examples: Sequence[Example]) -> Batch:
    """The micro-batch with the most positions, and among those the most counted tokens, of the first MOST_STEPS steps."""
    return max((batch for batches in batches_of_steps(plan, examples) for batch in batches), key=weight)


def steps_are_cut(plan: Plan, examples: Sequence[Example]) -> bool:
    """True if an optimizer step takes several passes: gradients then stay while the next one runs."""
    return any(len(batches) > 1 for batches in batches_of_steps(plan, examples))


def batches_of_steps(plan: Plan, examples: Sequence[Example]) -> Iterator[list[Batch]]:
    """The micro-batches of each optimizer step, as training draws them."""
    steps = min(plan.steps, MOST_STEPS)
    for _, rows in islice(global_batches(examples, plan.batch, plan.seed), steps):
        yield plan.cut(rows)


def weight(batch: Batch) -> tuple[int, int]:
    """What decides the memory of a batch."""
    return batch.input_ids.numel(), batch.counted.numel()


def present_gpu() -> Gpu:
    """The CUDA card of this process: what it has free now, the context of the process already taken."""
    properties = torch.cuda.get_device_properties(0)
    torch.zeros(1, device="cuda")  # makes the context, if nothing has
    free, _ = torch.cuda.mem_get_info()
    usable = free + torch.cuda.memory_reserved()
    return Gpu(properties.name, usable, (properties.major, properties.minor), context_bytes=0)


def simulated_device(gpu: Gpu | None, capacity_bytes: int | None = None) -> SimulatedDevice:
    """What a card runs; without one, an Ampere or Ada card is assumed."""
    if gpu is None:
        return SimulatedDevice(capacity_bytes=capacity_bytes)
    workspace = HOPPER_WORKSPACE if gpu.has_large_workspace else CudaKernels.workspace_bytes
    return SimulatedDevice(CudaKernels(gpu.has_flash_attention, workspace), capacity_bytes)
