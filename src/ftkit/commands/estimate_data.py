"""The rows of --data as training would cut them: how long they are, how many steps they make, the heaviest batch."""

from dataclasses import dataclass, field

from ftkit.commands.estimate_model import Model
from ftkit.core.batch_sizes import auto_micro_batch, auto_micro_tokens, steps_per_epoch
from ftkit.core.batching import Batch
from ftkit.core.encoding import Encoder, Example
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.examples import encode_rows
from ftkit.core.holdout import held_of
from ftkit.core.plan import Plan
from ftkit.core.planned_run import PlannedRun
from ftkit.core.train_settings import TrainSettings
from ftkit.core.training_memory import heaviest_batch, steps_are_cut
from ftkit.errors import ExitCode, UserError
from ftkit.io.base_model import load_tokenizer
from ftkit.io.row_file import read_row_file
from ftkit.io.template_files import load_template, template_of_rows


@dataclass
class RealRows:
    """The rows of a file that are trained, as examples; features: of the model's hidden states; facts: numbers about them."""

    examples: list[Example]
    features: int
    facts: dict[str, int] = field(default_factory=dict)
    known: dict[tuple[Plan, int], Batch] = field(default_factory=dict)

    def heaviest(self, settings: EstimateSettings, run: PlannedRun) -> Batch:
        """The micro-batch that needs the most memory with these settings; rows that are too long for them are dropped."""
        plan, rows = self.plan(settings, run), self.within(run.tokens)
        key = (plan, run.tokens)
        if key not in self.known:
            self.known[key] = heaviest_batch(plan, rows)
        return self.known[key]

    def is_cut(self, settings: EstimateSettings, run: PlannedRun) -> bool:
        """An optimizer step takes several passes."""
        return steps_are_cut(self.plan(settings, run), self.within(run.tokens))

    def plan(self, settings: EstimateSettings, run: PlannedRun) -> Plan:
        """The plan of an epoch."""
        return plan_of(settings, self.within(run.tokens), self.features, pack=run.pack)

    def within(self, tokens: int) -> list[Example]:
        """The examples that are not longer; the shortest one, if all are."""
        return [each for each in self.examples if len(each.ids) <= tokens] or [
            min(self.examples, key=lambda e: len(e.ids))
        ]


def read_data(settings: EstimateSettings, model: Model) -> RealRows:
    """The rows encoded as training encodes them; what is too long is dropped, and a share is held out, as there."""
    assert settings.data is not None
    file = read_row_file(settings.data, "estimate-memory")
    if file.kind == "classification":
        raise UserError(
            f"{file.source}: a head for classes is not estimated here",
            ExitCode.ENVIRONMENT,
            hint=f"ftkit train {settings.data} --dry-run foretells its memory",
        )
    given = load_template(settings.template) if settings.template else None
    template = template_of_rows(file.template, given) if file.template else given
    encoder = Encoder(load_tokenizer(model.base, model.config.get_text_config().vocab_size), template)
    length = min(settings.max_length, model.context or settings.max_length)
    rows = zip(file.places, file.rows, strict=True)
    found, origin, ledger = encode_rows(rows, encoder, max_length=length, overlength="drop")
    if not found:
        raise UserError(
            f"{file.source}: no row fits into {length} tokens with something to learn",
            ExitCode.DATA,
            hint="a longer --max-length, or shorter prompts",
        )
    held = held_of(file.rows, origin, float(TrainSettings.valid))
    examples = [example for example, row in zip(found, origin, strict=True) if row not in held]
    longest = max(len(example.ids) for example in examples)
    plan = plan_of(settings, examples, model.features, pack=settings.pack == "on")
    heaviest = heaviest_batch(plan, examples)
    facts = {"rows": len(set(origin)) - len(held), "held_out": len(held), "dropped": ledger.dropped,
             "tokens": sum(len(example.ids) for example in examples),
             "counted": sum(sum(example.counted) for example in examples),
             "longest": longest, "steps": plan.steps, "heaviest": heaviest.input_ids.numel()}  # fmt: skip
    return RealRows(examples, model.features, facts, {(plan, longest): heaviest})


def plan_of(settings: EstimateSettings, examples: list[Example], features: int, *, pack: bool) -> Plan:
    """One epoch as train would plan it, with its default seed; what has no part in memory is left at nought."""
    longest = max(len(example.ids) for example in examples)
    is_auto = settings.micro_batch == "auto"
    rows = auto_micro_batch(longest, settings.batch) if is_auto else min(int(settings.micro_batch), settings.batch)
    tokens = auto_micro_tokens(longest, None if is_auto else rows, features)
    return Plan(
        batch=settings.batch,
        micro_batch=rows,
        steps=steps_per_epoch(len(examples), settings.batch),
        lr=0,
        schedule="constant",
        warmup=0,
        max_grad_norm=0,
        seed=TrainSettings.seed,
        pack=pack,
        share_prefix=settings.share_prefix == "on",
        micro_tokens=tokens if settings.micro_tokens == "auto" else int(settings.micro_tokens),
    )
