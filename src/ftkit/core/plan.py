"""What a training run does, as numbers; how its global batches are cut so that they fit into memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ftkit.core.batching import Batch, micro_batches, packed_batches
from ftkit.core.encoding import Example
from ftkit.core.out_of_memory import give_memory_back
from ftkit.errors import ExitCode, UserError, is_out_of_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What a run does, resolved: rows per optimizer step and per forward pass, steps, learning rate and its course.

    With `pack` a forward pass takes up to `micro_tokens` tokens in one sequence, where the model must be inside
    `packed_attention`; without, `micro_batch` padded rows. Which rows are in a step is the same for both.
    """

    batch: int
    micro_batch: int
    steps: int
    lr: float
    schedule: str
    warmup: float
    max_grad_norm: float
    seed: int
    pack: bool = False
    share_prefix: bool = False
    micro_tokens: int = 0

    def cut(self, rows: Sequence[Example]) -> list[Batch]:
        """The micro-batches of some rows: packs, or padded."""
        if self.pack:
            return packed_batches(rows, self.micro_tokens, share=self.share_prefix)
        return micro_batches(rows, self.micro_batch)


def within_memory(
    plan: Plan, rows: Sequence[Example], work: Callable[[list[Batch]], T], batches: list[Batch] | None = None
) -> tuple[T, Plan]:
    """(what `work` makes of the rows' micro-batches, the plan that cut them). batches: as the plan cuts them, if they are made.

    Where memory runs out, the work begins again with micro-batches of half the size. Exit 5 if there are none smaller.
    """
    while True:
        batches = plan.cut(rows) if batches is None else batches
        try:
            return work(batches), plan
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[:1]
        batches = None
        give_memory_back()
        smaller = halved(plan, rows)
        if smaller is None:
            raise UserError(
                "out of memory with one row at once" + "".join(f": {line[:200]}" for line in reason),
                ExitCode.MEMORY,
                hint="a smaller --max-length, --gradient-checkpointing on, or --qlora; ftkit estimate-memory says more",
            )
        plan = smaller


def halved(plan: Plan, rows: Sequence[Example]) -> Plan | None:
    """The plan with micro-batches of half the size or less, so that these rows make more of them; None if none can."""
    before = len(plan.cut(rows))
    while before < len(rows):
        if plan.pack:
            plan = replace(plan, micro_tokens=plan.micro_tokens // 2)
        else:
            plan = replace(plan, micro_batch=plan.micro_batch // 2)
        if len(plan.cut(rows)) > before:
            return plan
    return None
