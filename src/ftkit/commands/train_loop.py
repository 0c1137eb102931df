"""The steps of a run: logged, validated, saved in checkpoints, stopped when asked, gone on with to the same bytes."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from ftkit import console, faults
from ftkit.commands.train_plan import Prepared
from ftkit.core.batching import Batch
from ftkit.core.classes import measure_classes
from ftkit.core.durations import Rhythm, rhythm_of
from ftkit.core.generation import generate_batch
from ftkit.core.heap import keep_freed_memory
from ftkit.core.loss import mean_loss
from ftkit.core.objectives import training_objective
from ftkit.core.optimizers import make_optimizer
from ftkit.core.packed_attention import packed_attention
from ftkit.core.plan import within_memory
from ftkit.core.training import StepResult, Training, begin_training, train_steps
from ftkit.core.training_state import collect_state, restore_state
from ftkit.errors import ExitCode, UserError, is_out_of_memory
from ftkit.io.adapter_folder import write_adapter, write_model
from ftkit.io.base_model import context_length
from ftkit.io.card import Card
from ftkit.io.checkpoint import (
    Checkpoint,
    checkpoint_path,
    checkpoint_steps,
    prune_checkpoints,
    write_checkpoint,
)
from ftkit.io.devices import peak_memory
from ftkit.io.records import kind_of
from ftkit.io.run_folder import RunFolder
from ftkit.io.trackers import Trackers
from ftkit.stopping import TIME_LIMIT, Stopped, StopRequest

AUTO_SECONDS = 600.0
"""Between checkpoints, where nothing else is asked for: what a sudden death may cost."""
SAVING_SHARE = 0.02
"""With a rhythm of time, saving takes at most this share of it."""
SAMPLES, SAMPLE_TOKENS = 3, 64
"""Held-out prompts that are answered at each validation of --early-stop, and the longest answer."""
SPIKE, SPIKE_WINDOW, SPIKE_FLOOR = 2.0, 50, math.log(2)
"""A loss of more than SPIKE times the median of the last SPIKE_WINDOW steps is reported, if it is above SPIKE_FLOOR nats.

Below it the model still gives what it should say more than half of the probability: where losses are small (classes, a text
learned by heart), one hard row in a step doubles them, and nothing has gone wrong.
"""


@dataclass
class Course:
    """What a run has behind it; part of every checkpoint.

    validations: (step, nats per held-out token). scores: (step, accuracy and the like), of classes only.
    events: what was out of the ordinary. seconds: in steps. skipped: steps that float16's scaler left out.
    """

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    validations: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0

    def validated(self, step: int) -> float | None:
        """The held-out loss after a step, if it was measured."""
        return dict(self.validations).get(step)

    def scored(self, step: int) -> dict[str, float]:
        """The held-out scores after a step; none where there are no classes."""
        return dict(self.scores).get(step, {})

    @property
    def best_step(self) -> int | None:
        """The step of the lowest held-out loss; the untrained model of step 0 does not compete."""
        trained = [(loss, step) for step, loss in self.validations if step]
        return min(trained)[1] if trained else None

    def is_stale(self, patience: int) -> bool:
        """True after `patience` validations without a new lowest loss."""
        best = self.best_step
        return best is not None and sum(step > best for step, _ in self.validations) >= patience


@dataclass
class Session:
    """A run in progress: what it is, what it holds, and when it last saved."""

    prepared: Prepared
    model: nn.Module
    folder: RunFolder
    card: Card
    stop: StopRequest
    training: Training
    course: Course
    rhythm: Rhythm
    trackers: Trackers
    plain_attention: Callable[[], AbstractContextManager[None]] = nullcontext
    """Opens a block in which the model attends as without packs."""
    saved: list[int] = field(default_factory=list)
    """Steps with a checkpoint that is whole, oldest first."""
    saved_at: float = field(default_factory=time.monotonic)
    saving_seconds: float = 0.0

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.training.step

    @property
    def saved_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return self.saved[-1] if self.saved else None

    @property
    def is_last(self) -> bool:
        """True once every step is done."""
        return self.step >= self.prepared.plan.steps


def train(
    prepared: Prepared,
    model: nn.Module,
    folder: RunFolder,
    card: Card,
    stop: StopRequest,
    start: Checkpoint | None,
    trackers: Trackers,
) -> Course:
    """All steps from the checkpoint `start` (None: from the first), in packs where the plan says so."""
    plan, settings = prepared.plan, prepared.settings
    optimizer = make_optimizer(model, settings.optimizer, plan.lr, settings.weight_decay, settings.lora_plus)
    training = begin_training(model, optimizer, plan)
    session = Session(prepared, model, folder, card, stop, training, Course(), rhythm_of_run(prepared), trackers)
    if start is not None:
        go_on(session, start)
    else:
        folder.cut_log(0)  # what was logged before the first checkpoint is done again
    if prepared.device == "cpu":
        keep_freed_memory()
    with packed_attention(model) if plan.pack else nullcontext(nullcontext) as suspended:
        session.plain_attention = suspended
        try:
            run_steps(session)
        except Stopped:
            save(session)
            raise stopped(session, start) from None
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            told = told_of_checkpoint(session, error)
            if told is error:
                raise
            raise told from None
    return session.course


def rhythm_of_run(prepared: Prepared) -> Rhythm:
    """When checkpoints are due."""
    asked, settings = prepared.settings.save_every, prepared.settings
    if asked == "auto":
        asked = "10%" if settings.early_stop else f"{AUTO_SECONDS:.0f}s"
    rhythm = rhythm_of(asked, prepared.plan.steps)
    assert rhythm is not None  # the settings have been checked
    return rhythm


def go_on(session: Session, start: Checkpoint) -> None:
    """Put everything back to where the checkpoint was written, to the bit. The weights are in the model already."""
    known, training = start.values, session.training
    try:
        restore_state(training, start.tensors(), known)
        session.course = Course(**known["course"])
        if known["asked"] == asked_sizes(session.prepared):  # not where --allow-change asks for others now
            training.plan = replace(training.plan, **known["used"])
        session.saving_seconds = known["saving_seconds"]
        session.folder.cut_log(known["log_bytes"])
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{start.path}: its training state does not fit this run: {error}",
            ExitCode.MODEL,
            hint="give another --run, or without --run: --resume never",
        ) from None
    if start.step > training.plan.steps:
        made = f"{start.path.parent.parent}: {start.step:,} steps are made already"
        raise UserError(f"{made}, --steps asks for {training.plan.steps:,}", ExitCode.MODEL, hint="more --steps")
    training.step = start.step
    session.saved = [step for step in checkpoint_steps(session.folder.path) if step <= start.step]
    console.info(f"going on after step {start.step:,} of {training.plan.steps:,}: {start.path}")


def run_steps(session: Session) -> None:
    """Validate, step, save, until the plan's end or until the held-out loss falls no more."""
    validate(session, 0)
    patience = session.prepared.settings.early_stop
    objective = training_objective(session.prepared.settings)
    steps = train_steps(session.model, session.training, session.prepared.examples, objective, session.prepared.device)
    with console.Progress("train", session.training.plan.steps, done=session.step) as progress:
        settle(session)  # a checkpoint may have been written between a step and its validation
        while not session.is_last and not (patience and session.course.is_stale(patience)):
            halving = session.training.plan
            result = next(steps)
            record_step(session, result)
            if session.training.plan != halving:
                record_halving(session)
            progress.advance(note=f"loss {result.loss:.3f}  {result.tokens / result.seconds:,.0f} tokens/s")
            faults.point("step")
            settle(session)
            if session.stop.deadline is not None and not session.saving_seconds:
                save(session)  # how long that takes must be known before the time is over
            if not session.is_last and session.stop.is_due(result.seconds + session.saving_seconds):
                raise Stopped
    validate(session, session.step)


def settle(session: Session) -> None:
    """After a step: what is due, which is a checkpoint and, to compare it with others, its held-out loss."""
    if not session.step or not is_due(session):
        return
    if session.prepared.settings.early_stop:
        validate(session, session.step)
    save(session)


def is_due(session: Session) -> bool:
    """True where a checkpoint is to be written. The last step has one only where it may be the best of several."""
    if session.is_last:
        return session.prepared.settings.early_stop is not None
    if session.rhythm.steps is not None:
        return session.step % session.rhythm.steps == 0
    assert session.rhythm.seconds is not None
    pause = max(session.rhythm.seconds, session.saving_seconds / SAVING_SHARE)
    return time.monotonic() - session.saved_at >= pause


def save(session: Session) -> None:
    """A checkpoint of the last whole step, then room for the next one. Nothing before the first step."""
    if session.step in (0, session.saved_step):
        return
    began, prepared, course = time.monotonic(), session.prepared, session.course
    tensors, values = collect_state(session.training)
    plan = session.training.plan
    values |= {
        "course": asdict(course),
        "asked": asked_sizes(prepared),
        "used": {"micro_batch": plan.micro_batch, "micro_tokens": plan.micro_tokens},
        "pack": plan.pack,
        "packing_fault": prepared.packing_fault,
        "saving_seconds": session.saving_seconds,
        "log_bytes": session.folder.log_size(),
        "needs": needed_checkpoints(session),
    }
    write = write_model if prepared.settings.makes_model else write_adapter

    def fill(folder: Any) -> None:
        write(folder, session.model, prepared.encoder.tokenizer, session.card)

    write_checkpoint(session.folder.path, session.step, fill, tensors, values)
    session.saved.append(session.step)
    best = [step for step in session.saved if step == course.best_step]
    session.saved = sorted({*best, *session.saved[-prepared.settings.keep :]})
    prune_checkpoints(session.folder.path, session.saved)
    session.saved_at = time.monotonic()
    session.saving_seconds = session.saved_at - began


def asked_sizes(prepared: Prepared) -> list[int]:
    """The size of micro-batches as settings and rows ask for it, before memory ran out."""
    return [prepared.plan.micro_batch, prepared.plan.micro_tokens]


def needed_checkpoints(session: Session) -> list[int]:
    """Steps of other checkpoints that the run must have to end as it would have: the best one, with --early-stop."""
    best = session.course.best_step
    return [best] if session.prepared.settings.early_stop and best not in (None, session.step) else []


def stopped(session: Session, start: Checkpoint | None) -> UserError:
    """What a person reads, and a scheduler gets, when a run ends before its time."""
    if session.stop.reason == TIME_LIMIT and session.step == (start.step if start else 0):
        return session.stop.error()
    where = f"stopped by {session.stop.reason} after step {session.step:,} of {session.prepared.plan.steps:,}"
    saved = f"; saved in {session.folder.path}" if session.saved_step is not None else ""
    return UserError(f"{where}{saved}", session.stop.exit_code, hint="the same command goes on from there")


def told_of_checkpoint(session: Session, error: Exception) -> Exception:
    """The error of a run, with what is left of it. Where a pass lacked memory the weights are whole, and are saved."""
    if isinstance(error, UserError):
        what, code, hint = error.message, error.exit_code, error.hint
        if code == ExitCode.MEMORY:
            save(session)
    elif isinstance(error, OSError):
        what, code = f"{error.filename or session.folder.path}: {error.strerror or error}", ExitCode.IO
        hint = "make room or mend the disk, and the same command goes on"
    elif is_out_of_memory(error):  # in the optimizer's step: some weights may have moved
        what, code = f"step {session.step + 1:,}: out of memory in the optimizer's step", ExitCode.MEMORY
        hint = "--optimizer adamw-8bit, fewer --targets, or --qlora; ftkit estimate-memory says what fits"
    else:
        return error
    last = session.saved_step
    left = f"the last checkpoint is {checkpoint_path(session.folder.path, last)}" if last else "there is no checkpoint"
    return UserError(f"{what}; {left}", code, hint=hint)


def record_step(session: Session, result: StepResult) -> None:
    """A line of metrics.jsonl, and what the run has behind it now."""
    line = {**asdict(result), "tokens_per_second": round(result.tokens / result.seconds, 1)}
    log(session, {**line, "peak_memory_bytes": peak_memory(session.prepared.device)})
    course = session.course
    recent = course.losses[-SPIKE_WINDOW:]
    if len(recent) == SPIKE_WINDOW and result.loss > max(SPIKE_FLOOR, SPIKE * median(recent)):
        record_event(
            session, f"the loss is {result.loss:.3f}, the median of the {SPIKE_WINDOW} before {median(recent):.3f}"
        )
    course.losses.append(result.loss)
    course.tokens += result.tokens
    course.seconds += result.seconds
    course.skipped += not math.isfinite(result.grad_norm)


def log(session: Session, line: dict[str, Any]) -> None:
    """One line of metrics.jsonl, and its numbers to the trackers."""
    session.folder.log(line)
    session.trackers.log(line["step"], line)


def record_halving(session: Session) -> None:
    """Smaller micro-batches, because memory ran out: the same global batch, so the same numbers."""
    plan = session.training.plan
    at_once = f"packs of {plan.micro_tokens:,} tokens" if plan.pack else f"{plan.micro_batch} rows at once"
    record_event(session, f"out of memory: it goes on with {at_once}, still {plan.batch} rows a step")


def record_event(session: Session, what: str) -> None:
    """Something out of the ordinary, said and kept."""
    console.warn(f"step {session.step:,}: {what}")
    session.course.events.append({"step": session.step, "what": what})


def validate(session: Session, step: int) -> None:
    """The loss on the held-out rows after a step, logged; nothing where it is known or no rows are held out."""
    prepared, course = session.prepared, session.course
    if not prepared.valid_examples or course.validated(step) is not None or session.step != step:
        return

    def work(batches: list[Batch]) -> tuple[float, int, dict[str, float]]:
        polled_batches, classes = polled(batches, session.stop), prepared.encoder.classes
        if classes:
            return measure_classes(session.model, polled_batches, prepared.device, classes)
        return *mean_loss(session.model, polled_batches, prepared.device), {}

    (loss, counted, scores), used = within_memory(session.training.plan, prepared.valid_examples, work)
    if used != session.training.plan:
        record_event(session, "out of memory on the held-out rows: they went through in smaller micro-batches")
    if not math.isfinite(loss):
        hint = "look for NaN in the weights of the base, or make --lr smaller"
        raise UserError(f"step {step:,}: the held-out loss is {loss}", ExitCode.DIVERGED, hint=hint)
    samples = {"samples": sample(session)} if prepared.settings.early_stop else {}
    named = {f"valid_{name}": value for name, value in scores.items()}
    log(session, {"step": step, "valid_loss": loss, "valid_counted": counted, **named, **samples})
    course.validations.append((step, loss))
    course.scores += [(step, scores)] if scores else []


@torch.no_grad()
def sample(session: Session) -> list[str]:
    """What the model answers now to the first held-out prompts, greedily; nothing where they are plain text.

    One by one, so that no row is padded. A lack of memory costs the samples, not the run.
    """
    prepared, model = session.prepared, session.model
    rows = [row for row in prepared.valid_rows if kind_of(row) not in ("text", "classification")][:SAMPLES]
    was_training = model.training
    model.eval()
    try:
        with session.plain_attention():
            return [
                generate_batch(
                    model,
                    prepared.encoder.tokenizer,
                    [prepared.encoder.input_ids(row)],
                    stop_ids=prepared.encoder.stop_ids,
                    max_new=SAMPLE_TOKENS,
                    context=context_length(prepared.config),
                )[0].text
                for row in rows
            ]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        record_event(session, "out of memory: no answers are sampled here")
        return []
    finally:
        model.train(was_training)


def polled(batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
    """The same batches; a request to stop is met between them."""
    for batch in batches:
        faults.point("validation")
        stop.check()
        yield batch
