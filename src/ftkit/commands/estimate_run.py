"""How much one run takes, and whether a card holds it: simulated, or by the closed form where that is enough."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from ftkit.commands.estimate_model import Model
from ftkit.core import several_gpus
from ftkit.core.caching_allocator import OutOfMemoryError
from ftkit.core.closed_form import EXPECTED_ERROR, RESERVED, closed_form
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.gpus import Gpu
from ftkit.core.memory_estimate import MemoryEstimate
from ftkit.core.model_sizes import FAMILIES, ModelSizes
from ftkit.core.planned_run import PlannedRun, plan_run
from ftkit.core.several_gpus import Sharing
from ftkit.errors import ExitCode, UserError
from ftkit.libraries import import_bitsandbytes, import_transformers

CLEAR = 0.15
"""By so much of a card's memory must the closed form miss its limit for its verdict to stand without a simulation: what the
allocator's holes add is 1 to 20 %, and it counts 5.
"""
Word = Literal["fits", "tight", "no"]


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits a card. word: fits, tight (only without the margin or with a cache that is given back), no.

    is_rough: found by the closed form, which misses the limit by far.
    """

    word: Word
    process_bytes: int
    left_bytes: int
    checkpointing: bool
    is_rough: bool = False


@dataclass
class Estimates:
    """The estimates of one model, each made once. rows: those of --data, if there are any (`estimate_data.RealRows`)."""

    model: Model
    rows: Any = None
    known: dict[Any, MemoryEstimate] = field(default_factory=dict)

    def plan(self, settings: EstimateSettings, gpu: Gpu | None) -> PlannedRun:
        """The run that train would make of these settings on a card: of several, with its share of the rows."""
        if self.rows is not None:
            settings = replace(settings, max_length=min(settings.max_length, self.rows.facts["longest"]))
        settings = replace(settings, batch=-(-settings.batch // settings.gpus))
        run = plan_run(settings, self.model.context, gpu, self.model.features)
        if self.rows is not None:
            run = replace(run, micro_steps=2 if self.rows.is_cut(settings, run) else 1)
        if settings.framework == "hf" and run.pack:  # a plain script pads
            run = plan_run(replace(settings, pack="off"), self.model.context, gpu, self.model.features)
        return run

    def exact(self, settings: EstimateSettings, gpu: Gpu | None, capacity: int | None = None) -> MemoryEstimate:
        """The simulated peak; with --fast the closed form. OutOfMemoryError where a capacity is given and too small."""
        if settings.fast or settings.gpus > 1:
            return self.rough(settings, gpu)
        key = (settings, kind_of(gpu), capacity)
        if key not in self.known:
            self.known[key] = self.simulate(settings, gpu, capacity)
        return self.known[key]

    def rough(self, settings: EstimateSettings, gpu: Gpu | None) -> MemoryEstimate:
        """The closed form; for what it does not describe, the simulation."""
        if not self.is_described(settings, gpu):
            return self.exact(settings, gpu)
        assert self.model.sizes is not None
        sharing = Sharing(settings.gpus, settings.parallel)
        return closed_form(settings, self.plan(settings, gpu), self.model.sizes, gpu, sharing)

    def is_described(self, settings: EstimateSettings, gpu: Gpu | None) -> bool:
        """The closed form describes this run."""
        sizes = self.model.sizes
        if settings.gpus > 1:
            require_described(sizes, settings)
        if not settings.is_described and (settings.fast or settings.gpus > 1):
            what = "the closed form describes LoRA of one rank and full training, with AdamW or SGD"
            flag = "--fast" if settings.fast else "--gpus"
            raise UserError(what, ExitCode.ENVIRONMENT, hint=f"leave out {flag}: the model's own code is simulated")
        if sizes is None or not settings.is_described or settings.framework == "hf" or self.rows is not None:
            return False
        return (
            settings.fast
            or settings.gpus > 1
            or sizes.window is None
            or self.plan(settings, gpu).tokens <= sizes.window
        )

    def holes(self, gpu: Gpu | None) -> float:
        """Reserved over allocated bytes of the simulation on such a card; the closed form's share before there is one."""
        alike = [
            found for (_, kind, capacity), found in self.known.items() if kind == kind_of(gpu) and capacity is None
        ]
        return alike[-1].reserved_bytes / alike[-1].allocated_bytes if alike else RESERVED

    def simulate(self, settings: EstimateSettings, gpu: Gpu | None, capacity: int | None) -> MemoryEstimate:
        """Load the libraries and run the step on the meta device."""
        from ftkit import console

        import_transformers()
        import_bitsandbytes()
        from ftkit.commands.estimate_simulation import simulate_ftkit, simulate_hf

        run = self.plan(settings, gpu)
        with console.quiet_libraries():
            if settings.framework == "hf":
                return simulate_hf(settings, run, self.model, gpu, capacity)
            heaviest = partial(self.rows.heaviest, settings) if self.rows is not None else None
            return simulate_ftkit(settings, run, self.model, gpu, capacity, heaviest)

    # ------------------------------------------------------------ verdicts
    def judge(self, settings: EstimateSettings, gpu: Gpu) -> Verdict:
        """Does it fit, with checkpointing only where it must be (auto)? The closed form decides where it is clear."""
        if settings.gradient_checkpointing != "auto":
            return self.judge_as_asked(settings, gpu)
        without = self.judge_as_asked(replace(settings, gradient_checkpointing="off"), gpu)
        if without.word == "fits":
            return without
        return self.judge_as_asked(replace(settings, gradient_checkpointing="on"), gpu)

    def judge_as_asked(self, settings: EstimateSettings, gpu: Gpu) -> Verdict:
        """The verdict on a run whose checkpointing is settled."""
        if self.is_described(settings, gpu):
            process = process_bytes(self.rough(settings, gpu), gpu)
            if is_clear(process, gpu) or settings.fast or settings.gpus > 1:
                return verdict(process, gpu, settings, is_rough=True)
        found = verdict(process_bytes(self.exact(settings, gpu), gpu), gpu, settings)
        return self.with_less_cache(settings, gpu, found) if found.word == "no" else found

    def with_less_cache(self, settings: EstimateSettings, gpu: Gpu, found: Verdict) -> Verdict:
        """Where only the allocator's cache is too large, try whether giving it back is enough."""
        capacity = gpu.usable_bytes - gpu.context_bytes
        if self.exact(settings, gpu).allocated_bytes > capacity:
            return found
        try:
            within = process_bytes(self.exact(settings, gpu, capacity), gpu)
        except OutOfMemoryError:
            return found
        return replace(found, word="tight", process_bytes=within, left_bytes=gpu.usable_bytes - within)

    def with_settled_checkpointing(self, settings: EstimateSettings, gpu: Gpu | None) -> EstimateSettings:
        """`auto` becomes off where the card holds that, or where no card is named; else on."""
        if settings.gradient_checkpointing != "auto":
            return settings
        needs = gpu is not None and self.judge(settings, gpu).checkpointing
        return replace(settings, gradient_checkpointing="on" if needs else "off")


def verdict(process: int, gpu: Gpu, settings: EstimateSettings, *, is_rough: bool = False) -> Verdict:
    """fits with the card's margin, tight without, else no."""
    left = gpu.usable_bytes - process
    word: Word = "fits" if left >= gpu.margin_bytes else "tight" if left >= 0 else "no"
    return Verdict(word, process, left, settings.gradient_checkpointing == "on", is_rough)


def is_clear(process: int, gpu: Gpu) -> bool:
    """The card's limit is so far that the closed form's word is enough."""
    return abs(process + gpu.margin_bytes - gpu.usable_bytes) > CLEAR * gpu.usable_bytes


def process_bytes(estimate: MemoryEstimate, gpu: Gpu) -> int:
    """What the driver shows for the process: the allocator's pool and the CUDA context."""
    return estimate.reserved_bytes + gpu.context_bytes


def kind_of(gpu: Gpu | None) -> tuple[bool, bool, bool]:
    """What of a card decides a simulation, so that cards alike share one."""
    if gpu is None:
        return True, True, False
    return gpu.has_bf16, gpu.has_flash_attention, gpu.has_large_workspace


def require_described(sizes: ModelSizes | None, settings: EstimateSettings) -> None:
    """Several cards are the closed form's alone."""
    if sizes is None:
        raise UserError(
            f"{settings.model}: several cards are estimated by the closed form, which knows {', '.join(FAMILIES)}",
            ExitCode.ENVIRONMENT,
            hint="leave out --gpus for the simulation of one card",
        )


def rough_error(settings: EstimateSettings) -> str:
    """How sure the closed form is, in words."""
    if settings.gpus > 1:
        return (
            f"closed form for several cards, expected error {several_gpus.EXPECTED_ERROR:.0%}: shares as in the ZeRO paper, held"
            " against no measurement"
        )
    return f"closed form, expected error {EXPECTED_ERROR:.0%} of the allocated bytes"
