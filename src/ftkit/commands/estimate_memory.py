"""estimate-memory: how much memory training would take, by running its step without weights and without a GPU."""

import json
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftkit import console
from ftkit.core.adapters import make_trainable
from ftkit.core.batching import Batch, auto_micro_batch, auto_micro_tokens
from ftkit.core.caching_allocator import GIB, MIB, OutOfMemoryError
from ftkit.core.cuda_operators import HOPPER_WORKSPACE, CudaKernels
from ftkit.core.gpus import MEASURED_CONTEXT, Gpu, find_gpu
from ftkit.core.loss import summed_loss
from ftkit.core.memory_simulation import MemoryEstimate, SimulatedDevice, simulate
from ftkit.core.meta_model import build_meta_model
from ftkit.core.packed_attention import packed_attention
from ftkit.core.packing import Segment
from ftkit.core.settings import EstimateSettings
from ftkit.core.tree_attention import make_layout, tree_attention
from ftkit.errors import ExitCode, UserError
from ftkit.io.base_model import context_length, find_base, read_config, require_causal, say_default, transformers_config
from ftkit.io.devices import DTYPES, dtype_name
from ftkit.io.quantization import quantization_config

ASSUMED = (
    "the rows of a micro-batch are all as long as --max-length and all their tokens are counted: the most it can need"
)
BAR_CELLS = 24


@dataclass(frozen=True)
class Run:
    """One training run as it would be resolved: what has a part in its memory."""

    method: str
    dtype: torch.dtype
    tokens: int
    rows: int
    micro_steps: int
    optimizer: str
    pack: bool


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits a card. word: fits, tight (only without the margin or with a cache that is given back), no."""

    word: str
    process_bytes: int
    left_bytes: int


@dataclass(frozen=True)
class Suggestion:
    """A change of options, its process memory, and whether the card holds that."""

    change: str
    process_bytes: int
    saved_bytes: int
    fits: bool


def run(settings: EstimateSettings) -> None:
    """Simulate training with these settings and say what it takes; exit 5 if the card that was named is too small."""
    gpu = find_gpu(settings.gpu) if settings.gpu else None
    say_default(settings.model)
    config = model_config(settings)
    plan = resolve(settings, config, gpu)
    notes, warnings = notes_on(settings, config, gpu), warnings_on(settings, gpu)
    for note in notes:
        console.info(note)
    for warning in warnings:
        console.warn(warning)
    estimate = estimate_run(settings, plan, config, gpu)
    verdict = judge(settings, plan, config, gpu, estimate) if gpu else None
    is_too_small = verdict is not None and verdict.word == "no"
    suggestions = suggest(settings, config, gpu, estimate) if gpu and is_too_small else []
    if settings.json:
        report = as_json(settings, plan, estimate, gpu, verdict, suggestions)
        report |= {"notes": notes, "warnings": warnings}
        sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
    else:
        show(settings, plan, estimate, gpu, verdict, suggestions)
    if gpu and verdict and is_too_small:
        raise UserError(
            f"does not fit: training needs {in_gib(verdict.process_bytes)}, {gpu.name} has {in_gib(gpu.usable_bytes)}",
            ExitCode.MEMORY,
            hint=hint_of(suggestions),
        )


# ---------------------------------------------------------------- what would be run
def model_config(settings: EstimateSettings) -> Any:
    """The transformers config of a folder, a config.json or a model id; nothing else of the model is needed."""
    named = Path(settings.model)
    base = find_base(
        str(named.parent) if named.name == "config.json" and named.is_file() else settings.model, settings.revision
    )
    raw = read_config(base)
    config = transformers_config(base)
    require_causal(raw, config, settings.model)
    require_sizes(raw, config, settings.model)
    require_dense(raw, settings.model)
    if raw.get("quantization_config"):
        raise UserError(
            f"{settings.model}: is quantised already; that cannot be estimated yet",
            ExitCode.ENVIRONMENT,
            hint="give the 16-bit model that it was made from, with --qlora or --load-in-8bit",
        )
    return config


def require_sizes(raw: dict[str, Any], config: Any, name: str) -> None:
    """A config without its sizes would silently get those of the architecture's first model."""
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if key not in raw and config.attribute_map.get(key) not in raw:
            raise UserError(
                f"{name}: config.json has no {key}", ExitCode.MODEL, hint="give the model's own config.json"
            )


def require_dense(raw: dict[str, Any], name: str) -> None:
    """How many tokens each expert gets depends on the data, and so does the memory: no number yet."""
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if isinstance(raw.get(key), int) and raw[key] > 1:
            raise UserError(
                f"{name}: a mixture of {raw[key]} experts cannot be estimated yet",
                ExitCode.ENVIRONMENT,
                hint="which expert gets which tokens depends on the data; a dense model can be estimated",
            )


def resolve(settings: EstimateSettings, config: Any, gpu: Gpu | None) -> Run:
    """The run that train would make of these options on the card."""
    tokens = min(settings.max_length, context_length(config) or settings.max_length)
    asked = None if settings.micro_batch == "auto" else min(int(settings.micro_batch), settings.batch)
    rows = asked or auto_micro_batch(tokens, settings.batch)
    if settings.pack == "on":
        is_auto = settings.micro_tokens == "auto"
        budget = auto_micro_tokens(tokens, asked) if is_auto else int(settings.micro_tokens)
        rows = max(1, min(settings.batch, budget // (tokens - 1)))  # the last token of a row is never fed
    micro_steps = -(-settings.batch // rows)
    dtype = training_dtype(settings, gpu)
    return Run(settings.method, dtype, tokens, rows, micro_steps, settings.optimizer, settings.pack == "on")


def notes_on(settings: EstimateSettings, config: Any, gpu: Gpu | None) -> list[str]:
    """What is estimated otherwise than one may expect."""
    notes, context = [], context_length(config)
    if context is not None and settings.max_length > context:
        notes.append(
            f"--max-length {settings.max_length} is beyond the model's context: {context} tokens, as in training"
        )
    if gpu and not gpu.has_flash_attention:
        notes.append(f"{gpu.name} has no FlashAttention-2: memory-efficient attention is estimated")
    return notes


def warnings_on(settings: EstimateSettings, gpu: Gpu | None) -> list[str]:
    """What training would refuse on the card."""
    if gpu and not gpu.has_bf16 and settings.dtype == "bf16":
        return [f"{gpu.name} cannot compute in bf16, training would refuse; --dtype auto takes fp16 there"]
    return []


def training_dtype(settings: EstimateSettings, gpu: Gpu | None) -> torch.dtype:
    """As `devices.pick_dtype` decides on the card itself: 32 bits where weights are trained, else bf16 where it can."""
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    if settings.method == "full":
        return torch.float32
    return torch.bfloat16 if gpu is None or gpu.has_bf16 else torch.float16


# ---------------------------------------------------------------- the simulation
def estimate_run(
    settings: EstimateSettings, plan: Run, config: Any, gpu: Gpu | None, capacity_bytes: int | None = None
) -> MemoryEstimate:
    """Run training's own functions on the meta device. Exit 6 for a model that this cannot be done with.

    A model that ignores packs is trained on padded rows, and so it is estimated.
    """
    with suppress(NotImplementedError, RuntimeError, TypeError, ValueError):  # those are told of the padded rows below
        if plan.pack and (packed := simulate_run(settings, plan, config, gpu, capacity_bytes)) is not None:
            return packed
    padded = resolve(replace(settings, pack="off"), config, gpu) if plan.pack else plan
    try:
        estimate = simulate_run(settings, padded, config, gpu, capacity_bytes)
        assert estimate is not None
        return estimate
    except ImportError as error:
        raise UserError(
            f"cannot estimate: {error}", ExitCode.ENVIRONMENT, hint="pip install ftkit installs what is missing"
        ) from error
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{settings.model}: {type(config).__name__.removesuffix('Config')} cannot be simulated: {reason}",
            ExitCode.ENVIRONMENT,
            hint="an operator of this architecture has no form without data; no number is better than a wrong one",
        ) from error


def simulate_run(
    settings: EstimateSettings, plan: Run, config: Any, gpu: Gpu | None, capacity_bytes: int | None
) -> MemoryEstimate | None:
    """The estimate of a plan; None if it packs rows and the model did not ask our attention for them."""
    quantization = quantization_config(plan.method, plan.dtype)
    is_asked = False

    def attention(*inputs: Any, **options: Any) -> tuple[Tensor, None]:
        nonlocal is_asked
        is_asked = True
        return tree_attention(*inputs, **options)

    def build() -> nn.Module:
        model = build_meta_model(config, plan.dtype, quantization=quantization)
        with torch.device("meta"):
            model = make_trainable(model, settings)
        if plan.pack:
            stack.enter_context(packed_attention(model, attention))
        return model

    def step(model: nn.Module) -> Tensor:
        batch = longest_batch(plan)
        return summed_loss(model, batch) / batch.counted.numel()

    device = SimulatedDevice(kernels_of(gpu), capacity_bytes)
    loaded = plan.dtype if quantization is not None else None
    with console.quiet_libraries(), ExitStack() as stack:
        found = simulate(build, step, plan.optimizer, device=device, micro_steps=plan.micro_steps, load_dtype=loaded)
    return found if is_asked or not plan.pack else None


def longest_batch(plan: Run) -> Batch:
    """The micro-batch that needs the most: every row full, no token shared, every token counted, on meta."""
    positions = plan.tokens - 1  # the last token of a row predicts nothing
    shape = (1, plan.rows * positions) if plan.pack else (plan.rows, positions)
    ids, places = (torch.zeros(shape, dtype=torch.int64, device="meta") for _ in range(2))
    counted, labels = (torch.zeros(plan.rows * positions, dtype=torch.int64, device="meta") for _ in range(2))
    if not plan.pack:
        return Batch(ids, counted, labels, plan.rows * plan.tokens)
    layout = make_layout([Segment(row * positions, positions, 0, -1) for row in range(plan.rows)])
    return Batch(ids, counted, labels, plan.rows * plan.tokens, places, layout)


def kernels_of(gpu: Gpu | None) -> CudaKernels:
    """What the card runs; without one, an Ampere or Ada card is assumed."""
    if gpu is None:
        return CudaKernels()
    workspace = HOPPER_WORKSPACE if gpu.has_large_workspace else CudaKernels.workspace_bytes
    return CudaKernels(gpu.has_flash_attention, workspace)


def judge(settings: EstimateSettings, plan: Run, config: Any, gpu: Gpu, estimate: MemoryEstimate) -> Verdict:
    """Does it fit? Where only the allocator's cache is too large, try whether giving it back is enough."""
    process = estimate.reserved_bytes + gpu.context_bytes
    if process + gpu.margin_bytes <= gpu.usable_bytes:
        return Verdict("fits", process, gpu.usable_bytes - process)
    if process > gpu.usable_bytes:
        capacity = gpu.usable_bytes - gpu.context_bytes
        try:
            if estimate.allocated_bytes > capacity:
                raise OutOfMemoryError
            within = estimate_run(settings, plan, config, gpu, capacity)
        except OutOfMemoryError:
            return Verdict("no", process, gpu.usable_bytes - process)
        process = within.reserved_bytes + gpu.context_bytes
    return Verdict("tight", process, gpu.usable_bytes - process)


def suggest(settings: EstimateSettings, config: Any, gpu: Gpu, estimate: MemoryEstimate) -> list[Suggestion]:
    """Changes that save memory, each simulated, up to the first that is enough; the largest saving first."""
    before = estimate.reserved_bytes + gpu.context_bytes
    found: list[Suggestion] = []
    for change, changed in changes(settings, config):
        plan = resolve(changed, config, gpu)
        process = estimate_run(changed, plan, config, gpu).reserved_bytes + gpu.context_bytes
        is_enough = process + gpu.margin_bytes <= gpu.usable_bytes
        if process < before:
            found.append(Suggestion(change, process, before - process, is_enough))
        if is_enough:
            break
    return sorted(found, key=lambda each: each.process_bytes)


def changes(settings: EstimateSettings, config: Any) -> list[tuple[str, EstimateSettings]]:
    """The options worth changing, the least loss first: one at a time, then together, then with shorter rows too."""
    plan = resolve(settings, config, None)
    single: list[tuple[str, dict[str, Any]]] = []
    if settings.gradient_checkpointing != "on":
        single.append(("--gradient-checkpointing on", {"gradient_checkpointing": "on"}))
    if plan.rows > 1:
        single.append(("--micro-batch 1", {"micro_batch": "1", "micro_tokens": "auto"}))
    if settings.optimizer == "adamw" and settings.method == "full":
        single.append(("--optimizer adamw-8bit", {"optimizer": "adamw-8bit"}))
    if settings.method != "qlora":
        instead = {"int8": " instead of --load-in-8bit", "full": " instead of --full", "lora": ""}[settings.method]
        single.append((f"--qlora{instead}", {"lora": False, "full": False, "load_in_8bit": False, "qlora": True}))
    name = " ".join(name for name, _ in single)
    together = {key: value for _, options in single for key, value in options.items()}
    half = max(2, plan.tokens // 2)
    shorter = together | {"max_length": half, "micro_batch": "1", "micro_tokens": "auto"}
    tried = [
        *single,
        *([(name, together)] if len(single) > 1 else []),
        (f"{name} --max-length {half}".strip(), shorter),
    ]
    return [(name, replace(settings, **options)) for name, options in tried]


# ---------------------------------------------------------------- what is said
def show(
    settings: EstimateSettings,
    plan: Run,
    estimate: MemoryEstimate,
    gpu: Gpu | None,
    verdict: Verdict | None,
    suggestions: list[Suggestion],
) -> None:
    """The tables, on stdout: they are this command's data."""
    context = gpu.context_bytes if gpu else MEASURED_CONTEXT
    sys.stdout.write(title_of(settings, plan) + "\n")
    console.table("", ["at the peak", "size", "share"], part_rows(estimate), to_stdout=True)
    facts = [
        (
            "trained parameters",
            f"{estimate.trained_parameters:,} of {estimate.total_parameters:,} ({share_of(estimate):.4%})",
        ),
        ("peak", peak_of(estimate)),
        ("allocated (tensors)", in_gib(estimate.allocated_bytes)),
        ("reserved (PyTorch's pool)", in_gib(estimate.reserved_bytes)),
        (
            f"process (with {context // MIB} MiB of CUDA context{'' if gpu else ', as on a T4'})",
            in_gib(estimate.reserved_bytes + context),
        ),
    ]
    if gpu and verdict:
        facts.append((f"{gpu.name}, {in_gib(gpu.usable_bytes)} usable", verdict_of(verdict)))
    console.table("", ["", ""], facts, to_stdout=True)
    if suggestions:
        rows = [
            (each.change, in_gib(each.process_bytes), in_gib(each.saved_bytes), "yes" if each.fits else "no")
            for each in suggestions
        ]
        console.table("what would help", ["change", "process", "saves", "fits"], rows, to_stdout=True)
    console.info(f"assumed: {ASSUMED}")


def title_of(settings: EstimateSettings, plan: Run) -> str:
    """What was estimated, in one line."""
    checkpointing = ", checkpointing" if settings.gradient_checkpointing == "on" else ""
    return (
        f"{settings.model}: {plan.method}, {dtype_name(plan.dtype)}, {plan.rows} x {plan.tokens} tokens, "
        f"{plan.micro_steps} per step, {plan.optimizer}{checkpointing}"
    )


def part_rows(estimate: MemoryEstimate) -> list[tuple[str, str, str]]:
    """The parts of the peak, largest first, each with a bar, and their sum."""
    parts = sorted(estimate.parts.items(), key=lambda item: -item[1])
    rows = [(str(part), in_gib(size), bar(size / estimate.allocated_bytes)) for part, size in parts]
    return [*rows, ("together", in_gib(estimate.allocated_bytes), bar(1.0))]


def bar(share: float) -> str:
    """`#####      21 %`: a bar of fixed width and its number."""
    full = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    return f"{full * round(share * BAR_CELLS):<{BAR_CELLS}} {share:4.0%}"


def peak_of(estimate: MemoryEstimate) -> str:
    """`backward, in model.layers.3.mlp`."""
    where = estimate.peak_module.removeprefix("base_model.model.").removeprefix("base_model.model")
    inside = f"in {where}" if where else "at logits and loss" if estimate.peak_phase in ("forward", "backward") else ""
    return ", ".join(filter(None, [estimate.peak_phase, inside]))


def verdict_of(verdict: Verdict) -> str:
    """The verdict with its margin."""
    left = in_gib(abs(verdict.left_bytes))
    return {
        "fits": f"fits, {left} to spare",
        "tight": f"tight: it fits with {left} to spare, which a longer row or another process takes",
        "no": f"does not fit, {left} missing",
    }[verdict.word]


def hint_of(suggestions: list[Suggestion]) -> str:
    """The first change that is enough; without one, what is left to do."""
    enough = [each for each in suggestions if each.fits]
    if enough:
        return f"{enough[0].change} brings it to {in_gib(enough[0].process_bytes)}"
    return "none of the changes is enough: take a smaller model or a larger card"


def in_gib(size: int) -> str:
    """`3.21 GiB`; small sizes in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def share_of(estimate: MemoryEstimate) -> float:
    """Trained parameters as a share of all."""
    return estimate.trained_parameters / estimate.total_parameters


def as_json(
    settings: EstimateSettings,
    plan: Run,
    estimate: MemoryEstimate,
    gpu: Gpu | None,
    verdict: Verdict | None,
    suggestions: list[Suggestion],
) -> dict[str, Any]:
    """The whole estimate as one object; every size in bytes."""
    context = gpu.context_bytes if gpu else MEASURED_CONTEXT
    return {
        "schema": "ftkit.estimate/1",
        "model": settings.model,
        "run": {key: value for key, value in asdict(plan).items() if key != "pack"}
        | {"dtype": dtype_name(plan.dtype), "gradient_checkpointing": settings.gradient_checkpointing == "on"},
        "trained_parameters": estimate.trained_parameters,
        "total_parameters": estimate.total_parameters,
        "trained_share": share_of(estimate),
        "parts_bytes": {str(part): size for part, size in estimate.parts.items()},
        "phases_bytes": {str(phase): size for phase, size in estimate.phases.items()},
        "peak": {"phase": str(estimate.peak_phase), "module": estimate.peak_module, "operator": estimate.peak_operator},
        "loaded_bytes": estimate.loaded_bytes,
        "allocated_bytes": estimate.allocated_bytes,
        "reserved_bytes": estimate.reserved_bytes,
        "context_bytes": context,
        "process_bytes": estimate.reserved_bytes + context,
        "gpu": {"name": gpu.name, "usable_bytes": gpu.usable_bytes, **asdict(verdict)} if gpu and verdict else None,
        "suggestions": [asdict(each) for each in suggestions],
        "assumed": ASSUMED,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The libraries whose allocations were replayed."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
