"""What estimate-memory says: tables for a person, one JSON object for a program."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from ftkit import console
from ftkit.commands.estimate_model import Model
from ftkit.commands.estimate_run import Verdict, rough_error
from ftkit.commands.estimate_search import Largest, Suggestion
from ftkit.core.caching_allocator import GIB, MIB
from ftkit.core.computer_memory import ComputerMemory, computer_memory, optimizer_bytes, pinned
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.gpus import MEASURED_CONTEXT, Gpu
from ftkit.core.memory_estimate import MemoryEstimate, Part
from ftkit.core.methods import METHODS
from ftkit.core.model_settings import KEPT_CHECKPOINTS
from ftkit.core.planned_run import PlannedRun

ASSUMED = (
    "the rows of a micro-batch are all as long as --max-length and all their tokens are counted: the most it can need"
)
BAR_CELLS = 24
COMPUTER = (
    "CPU memory: 2.5 GiB for the process with CUDA's libraries are assumed; the rest follows from how weights are loaded and"
    " checkpoints are written. Files that are read beside it fill what is free, and give it back"
)


@dataclass(frozen=True)
class Answer:
    """Everything that was found out about one run."""

    settings: EstimateSettings
    model: Model
    plan: PlannedRun
    estimate: MemoryEstimate
    gpu: Gpu | None
    verdict: Verdict | None
    cards: list[tuple[Gpu, Verdict]]
    suggestions: list[Suggestion]
    largest: Largest | None
    rows: dict[str, int] | None
    notes: list[str]
    warnings: list[str]
    command: str | None

    @property
    def context_bytes(self) -> int:
        """What the process takes besides PyTorch's pool."""
        return self.gpu.context_bytes if self.gpu else MEASURED_CONTEXT

    @property
    def disk(self) -> dict[str, int]:
        """Bytes of files: the base in 16 bits, what is trained, and a checkpoint with the optimizer's state."""
        return {"base": 2 * self.base_parameters, "trained": self.trained_bytes,
                "checkpoint": self.trained_bytes + self.states_bytes}  # fmt: skip

    @property
    def base_parameters(self) -> int:
        """Elements of the base alone."""
        added = self.estimate.trained_parameters if METHODS[self.settings.technique].is_adapter else 0
        return self.estimate.total_parameters - added

    @property
    def trained_item(self) -> int:
        """Bytes of a trained element."""
        return 4 if METHODS[self.settings.technique].is_adapter else item(self.plan)

    @property
    def trained_bytes(self) -> int:
        """Of what is trained."""
        return self.estimate.trained_parameters * self.trained_item

    @property
    def states_bytes(self) -> int:
        """Of the optimizer's states."""
        return optimizer_bytes(self.plan.optimizer, self.estimate.trained_parameters, self.trained_item)

    @property
    def computer(self) -> ComputerMemory:
        """The computer's own memory."""
        model, width = self.model, item(self.plan)
        hidden, layers, vocabulary = model.widths
        inputs = self.plan.positions * hidden * width
        is_offloaded = self.settings.offload_activations and self.plan.checkpointing
        return computer_memory(
            weights=self.base_parameters * width,
            largest=vocabulary * hidden * width,
            is_cast=model.stored_dtype != self.plan.dtype,
            is_quantised=self.settings.quantization is not None,
            kept=layers * pinned(inputs) if is_offloaded else 0,
            states=self.states_bytes,
            trained=self.trained_bytes,
            is_paged=self.plan.optimizer.startswith("paged"),
        )


def item(plan: PlannedRun) -> int:
    """Bytes of a number of the run's format."""
    return 4 if plan.dtype == "fp32" else 2


# ---------------------------------------------------------------- for a person
def show(answer: Answer) -> None:
    """The tables, on stdout: they are this command's data."""
    sys.stdout.write(title_of(answer) + "\n")
    if answer.rows:
        sys.stdout.write(data_line(answer.rows) + "\n")
    estimate = answer.estimate
    console.table(
        "", ["at the peak", "size", "share"], part_rows(estimate.parts, estimate.allocated_bytes), to_stdout=True
    )
    console.table("", ["", ""], facts(answer), to_stdout=True, is_text=True)
    if answer.cards:
        console.table("does it fit?", ["card", "usable", "process", "verdict"], card_rows(answer), to_stdout=True)
    if answer.suggestions:
        rows = [
            (each.change, about(each.process_bytes, each.is_rough), in_gib(each.saved_bytes), "yes" if each.fits else "no",
             each.price)
            for each in answer.suggestions
        ]  # fmt: skip
        console.table("what would help", ["change", "process", "saves", "fits", "price"], rows, to_stdout=True)
    if answer.command:
        sys.stdout.write(f"to type: {answer.command}\n")
    for line in remarks(answer):
        console.info(line)


def title_of(answer: Answer) -> str:
    """What was estimated, in one line."""
    settings, plan = answer.settings, answer.plan
    checkpointing = ", checkpointing" if plan.checkpointing else ""
    framework = "a plain transformers and PEFT script, " if settings.framework == "hf" else ""
    cards = f", each of {settings.gpus} cards, {settings.parallel}" if settings.gpus > 1 else ""
    way = "packs" if plan.pack else "padded batches"
    batches = f"{way} of rows of up to {plan.tokens} tokens" if answer.rows else f"{plan.rows} x {plan.tokens} tokens"
    steps = "" if answer.rows else f"{plan.micro_steps} per step, "
    return (
        f"{settings.model}: {framework}{plan.method}, {plan.dtype}, {batches}, "
        f"{steps}{plan.optimizer}{checkpointing}{cards}"
    )


def data_line(rows: dict[str, int]) -> str:
    """What the rows of --data amount to."""
    return (
        f"{rows['rows']:,} rows to train and {rows['held_out']:,} held out; {rows['tokens']:,} tokens an epoch"
        f" ({rows['counted']:,} trained), the longest row has {rows['longest']:,}; {rows['steps']:,} steps an epoch;"
        f" heaviest batch: {rows['heaviest']:,} positions"
    )


def part_rows(parts: dict[Part, int], total: int) -> list[tuple[str, str, str]]:
    """The parts of a peak, largest first, each with a bar, and their sum."""
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    rows = [(str(part), in_gib(size), bar(size / total)) for part, size in ordered]
    return [*rows, ("together", in_gib(total), bar(1.0))]


def bar(share: float) -> str:
    """`#####      21 %`: a bar of fixed width and its number."""
    full = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    return f"{full * round(share * BAR_CELLS):<{BAR_CELLS}} {share:4.0%}"


def facts(answer: Answer) -> list[tuple[str, str]]:
    """Counts, peak, sizes and the verdict, one a line."""
    estimate, gpu, context = answer.estimate, answer.gpu, answer.context_bytes
    found = [
        (
            "trained parameters",
            f"{estimate.trained_parameters:,} of {estimate.total_parameters:,} ({share_of(estimate):.4%})",
        ),
        ("peak", peak_of(estimate)),
        ("allocated (tensors)", about(estimate.allocated_bytes, estimate.expected_error is not None)),
        ("reserved (PyTorch's pool)", about(estimate.reserved_bytes, estimate.expected_error is not None)),
        (
            f"process (with {context // MIB} MiB of CUDA context{'' if gpu else ', as on a T4'})",
            about(estimate.reserved_bytes + context, estimate.expected_error is not None),
        ),
    ]
    if gpu and answer.verdict:
        found.append((f"{gpu.name}, {in_gib(gpu.usable_bytes)} usable", verdict_of(answer.verdict)))
    if answer.largest and gpu:
        found += [
            (f"largest --micro-batch at {answer.plan.tokens} tokens", str(answer.largest.micro_batch or "none")),
            ("largest --max-length at --micro-batch 1", str(answer.largest.max_length or "none")),
        ]
    return [*found, ("CPU memory", computer_of(answer)), ("disk", disk_of(answer))]


def computer_of(answer: Answer) -> str:
    """`~3.0 GiB: 2.5 GiB for the process, 0.5 GiB to load the weights`."""
    memory = answer.computer
    if memory.loading >= memory.waiting + memory.saving:
        more = f"{in_gib(memory.loading)} to load the weights"
    else:
        waiting = f"{in_gib(memory.waiting)} of what waits outside the card, " if memory.waiting else ""
        more = f"{waiting}{in_gib(memory.saving)} to write a checkpoint"
    return f"~{in_gib(memory.needed)}: {in_gib(memory.process)} for the process, {more}"


def disk_of(answer: Answer) -> str:
    """What the files take: of the base as it is published, of the run with the checkpoints that stay."""
    disk, kept = answer.disk, KEPT_CHECKPOINTS
    what = "adapter" if METHODS[answer.settings.technique].is_adapter else "trained weights"
    return (
        f"{in_gib(disk['base'])} base (in 16 bits), {in_gib(disk['trained'])} {what},"
        f" {kept} checkpoints of {in_gib(disk['checkpoint'])}"
    )


def card_rows(answer: Answer) -> list[tuple[str, str, str, str]]:
    """One line a card of the table; `with checkpointing` where it fits only so."""
    auto = answer.settings.gradient_checkpointing == "auto" or not answer.plan.checkpointing
    rows = []
    for gpu, verdict in answer.cards:
        switch = ", with --gradient-checkpointing on" if verdict.checkpointing and auto and verdict.word != "no" else ""
        rows.append(
            (gpu.name, in_gib(gpu.usable_bytes), about(verdict.process_bytes, verdict.is_rough), verdict.word + switch)
        )
    return rows


def peak_of(estimate: MemoryEstimate) -> str:
    """`backward, in model.layers.3.mlp`."""
    if estimate.expected_error is not None:
        return str(estimate.peak_phase)
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


def remarks(answer: Answer) -> list[str]:
    """What the numbers rest on."""
    found = []
    if answer.estimate.expected_error is not None:
        found.append(f"~ {rough_error(answer.settings)}")
    elif any(v.is_rough for _, v in answer.cards) or any(each.is_rough for each in answer.suggestions):
        found.append(f"~ {rough_error(answer.settings)}; the rest is simulated")
    if not answer.rows:
        found.append(f"assumed: {ASSUMED}")
    return [*found, COMPUTER]


def compare_table(rows: list[tuple[Answer, str]]) -> None:
    """One row a method."""
    [gpu] = {answer.gpu for answer, _ in rows}
    columns = [
        "method",
        "trained",
        "share",
        "weights",
        "peak",
        "process",
        "smallest card",
        *([gpu.name] if gpu else []),
    ]
    lines = []
    for answer, card in rows:
        estimate = answer.estimate
        is_rough = estimate.expected_error is not None
        weights = sum(estimate.parts.get(part, 0) for part in (Part.FROZEN, Part.QUANTISATION, Part.TRAINED))
        lines.append((
            answer.plan.method, f"{estimate.trained_parameters:,}", f"{share_of(estimate):.2%}", in_gib(weights),
            about(estimate.allocated_bytes, is_rough),
            about(estimate.reserved_bytes + answer.context_bytes, is_rough), card,
            *([answer.verdict.word] if answer.verdict else []),
        ))  # fmt: skip
    console.table("", columns, lines, to_stdout=True)
    if any(answer.estimate.expected_error is not None for answer, _ in rows):
        console.info(f"~ {rough_error(rows[0][0].settings)}")


def in_gib(size: int) -> str:
    """`3.21 GiB`; small sizes in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def about(size: int, is_rough: bool) -> str:
    """`~3.21 GiB` for a number of the closed form."""
    return ("~" if is_rough else "") + in_gib(size)


def share_of(estimate: MemoryEstimate) -> float:
    """Trained parameters as a share of all."""
    return estimate.trained_parameters / estimate.total_parameters


# ---------------------------------------------------------------- for a program
def write_json(report: dict[str, Any]) -> None:
    """One line on stdout."""
    sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")


def as_json(answer: Answer) -> dict[str, Any]:
    """The whole estimate as one object; every size in bytes."""
    estimate, gpu, verdict = answer.estimate, answer.gpu, answer.verdict
    is_simulated = estimate.expected_error is None
    return {
        "schema": "ftkit.estimate/1",
        "model": answer.settings.model,
        "framework": answer.settings.framework,
        "way": "simulation" if is_simulated else "closed form",
        "expected_error": estimate.expected_error,
        "run": {key: value for key, value in asdict(answer.plan).items() if key not in ("pack", "checkpointing")}
        | {"gradient_checkpointing": answer.plan.checkpointing},
        "trained_parameters": estimate.trained_parameters,
        "total_parameters": estimate.total_parameters,
        "trained_share": share_of(estimate),
        "parts_bytes": {str(part): size for part, size in estimate.parts.items()},
        "phases_bytes": {str(phase): size for phase, size in estimate.phases.items()},
        "peak": {"phase": str(estimate.peak_phase), "module": estimate.peak_module, "operator": estimate.peak_operator},
        "loaded_bytes": estimate.loaded_bytes,
        "allocated_bytes": estimate.allocated_bytes,
        "reserved_bytes": estimate.reserved_bytes,
        "context_bytes": answer.context_bytes,
        "process_bytes": estimate.reserved_bytes + answer.context_bytes,
        "disk_bytes": answer.disk,
        "computer_bytes": asdict(answer.computer) | {"needed": answer.computer.needed},
        "data": answer.rows,
        "gpu": {"name": gpu.name, "usable_bytes": gpu.usable_bytes, **asdict(verdict)} if gpu and verdict else None,
        "cards": [
            {"name": card.name, "usable_bytes": card.usable_bytes, **asdict(each)} for card, each in answer.cards
        ],
        "largest": asdict(answer.largest) if answer.largest else None,
        "suggestions": [asdict(each) for each in answer.suggestions],
        "command": answer.command,
        "assumed": None if answer.rows else ASSUMED,
        "notes": answer.notes,
        "warnings": answer.warnings,
        "versions": versions() if is_simulated else {},
    }


def versions() -> dict[str, str]:
    """The libraries whose allocations were replayed."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
