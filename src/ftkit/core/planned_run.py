"""A training run as far as its memory is concerned, resolved from settings without loading torch."""

from dataclasses import dataclass, replace
from typing import Literal

from ftkit.core.batch_sizes import auto_micro_batch, auto_micro_tokens
from ftkit.core.gpus import Gpu
from ftkit.core.methods import METHODS
from ftkit.core.model_settings import ModelSettings

Dtype = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class PlannedRun:
    """What one optimizer step does, at most. method: with its quantisation, as `recipe_of` names both.

    tokens: of the longest row, its last one included, which is never fed. rows: of the longest micro-batch, all as long.
    micro_steps: forward and backward passes per optimizer step.
    """

    method: str
    dtype: Dtype
    tokens: int
    rows: int
    micro_steps: int
    optimizer: str
    pack: bool
    checkpointing: bool

    @property
    def positions(self) -> int:
        """Positions of a micro-batch that the model computes."""
        return self.rows * (self.tokens - 1)


def plan_run(settings: ModelSettings, context: int | None, gpu: Gpu | None, features: int) -> PlannedRun:
    """The run that train would make of these options on a card: every row as long as --max-length allows.

    context: the longest input that the model was made for. features: of its hidden states, in all layers together.
    `--gradient-checkpointing auto` counts as off here.
    """
    tokens = min(settings.max_length, context or settings.max_length)
    padded = PlannedRun(
        method=settings.recipe,
        dtype=training_dtype(settings, gpu),
        tokens=tokens,
        rows=1,
        micro_steps=1,
        optimizer=settings.optimizer,
        pack=False,
        checkpointing=settings.gradient_checkpointing == "on",
    )
    if settings.pack == "off" or METHODS[settings.technique].virtual:
        return with_padded_rows(padded, settings)
    asked = None if settings.micro_batch == "auto" else min(int(settings.micro_batch), settings.batch)
    is_auto = settings.micro_tokens == "auto"
    budget = auto_micro_tokens(tokens, asked, features) if is_auto else int(settings.micro_tokens)
    rows = max(1, min(settings.batch, budget // (tokens - 1)))  # the last token of a row is never fed
    return replace(padded, pack=True, rows=rows, micro_steps=-(-settings.batch // rows))


def with_padded_rows(run: PlannedRun, settings: ModelSettings) -> PlannedRun:
    """The same run where rows are padded, not packed: because that was asked for, or the model ignores packs."""
    is_auto = settings.micro_batch == "auto"
    rows = auto_micro_batch(run.tokens, settings.batch) if is_auto else min(int(settings.micro_batch), settings.batch)
    return replace(run, pack=False, rows=rows, micro_steps=-(-settings.batch // rows))


def training_dtype(settings: ModelSettings, gpu: Gpu | None) -> Dtype:
    """As `devices.pick_dtype` decides on the card itself: 32 bits where weights are trained, else bf16 where it can."""
    if settings.dtype != "auto":
        return settings.dtype
    if settings.needs_fp32:
        return "fp32"
    return "bf16" if gpu is None or gpu.has_bf16 else "fp16"
