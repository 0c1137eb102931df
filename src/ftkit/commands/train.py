"""`ftkit train`: rows in, a run folder with an adapter (or a model) out."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ftkit import console, faults
from ftkit.commands.train_choice import choose_folder, find_done, refuse_other_run
from ftkit.commands.train_loop import Course, train
from ftkit.commands.train_memory import compare, foretell
from ftkit.commands.train_plan import Prepared, checkpoint_bytes, prepare, weights_bytes
from ftkit.commands.train_record import first_facts, recorded
from ftkit.commands.train_report import write_report
from ftkit.commands.train_rows import Data
from ftkit.commands.train_tokens import keep
from ftkit.core.adapters import count_parameters, make_trainable, start_from_rounding, target_names
from ftkit.core.answer_settings import RANGES, as_theirs
from ftkit.core.encoding import Encoder, Example
from ftkit.core.liger_kernels import is_installed, use_liger
from ftkit.core.memory_estimate import MemoryEstimate
from ftkit.core.packing_check import packing_fault
from ftkit.core.train_settings import TrainSettings
from ftkit.core.varlen_attention import is_used_on
from ftkit.errors import ExitCode, UserError
from ftkit.io.adapter_folder import copy_trained, restore_adapter, save_adapter, save_model
from ftkit.io.base_model import Base, config_sha256, load_weights, new_weights, weights_reader, weights_sha256
from ftkit.io.card import Card
from ftkit.io.checkpoint import Checkpoint, checkpoint_path, checkpoint_steps, newest_checkpoint, read_checkpoint
from ftkit.io.devices import dtype_name
from ftkit.io.free_space import require_disk, require_memory
from ftkit.io.quantization import keep_plain_layout, quantization_config, quantized_fingerprints, rounding_errors
from ftkit.io.run_folder import SCHEMA, RunFolder
from ftkit.io.run_lock import locked
from ftkit.io.template import Template
from ftkit.io.template_files import load_template
from ftkit.stopping import StopRequest


def run(settings: TrainSettings, stop: StopRequest, chat: Mapping[str, Any]) -> None:
    """Train, or make every check and stop (`--dry-run`), or point to the complete run that did just this.

    chat: what the files of settings say for chat, recorded for wherever the trained folder goes.
    """
    prepared = prepare(settings)
    refuse_other_run(prepared)
    if settings.dry_run:
        show_plan(prepared, prepared.rehearsed)
        report_plan(*foretell(prepared))
        return
    if (done := find_done(prepared)) is not None:
        console.info(f"already trained with the same rows and settings: {done.path}")
        report(done, done.read_info(), settings.json)
        return
    prepared, estimate = foretell(prepared)
    folder = choose_folder(prepared)
    with locked(folder.path):
        start = newest_checkpoint(folder.path)
        check_space(prepared, folder)
        with recorded(folder, prepared, start.step if start else None) as (info, trackers):
            info |= foretold(estimate)
            keep(prepared.encoded, folder)
            stop.check()
            model = load(prepared, start)
            prepared = take_liger(prepared, model)
            prepared = settle_packing(prepared, model, start)
            info["plan"] = asdict(prepared.plan)
            info |= {"liger": asdict(prepared.liger)} if prepared.liger else {}
            show_plan(prepared, model)
            card = make_card(prepared, model, chat)
            say_system(card, chat)
            take_along(model, card)
            stop.check()
            stop.hold()
            course = train(prepared, model, folder, card, stop, start, trackers)
            tell_course(prepared, course, info)
            save(prepared, model, folder, card, course, info)
            write_report(folder, info)
    compare(prepared, estimate, info)
    report(folder, info, settings.json)


def say_path(run_folder: RunFolder) -> None:
    """The run's path on stdout: this command's data."""
    sys.stdout.write(f"{run_folder.path}\n")


def load(prepared: Prepared, start: Checkpoint | None = None) -> nn.Module:
    """The base (or new weights) with what the method trains set free, seeded; or as a checkpoint has it."""
    settings, base = prepared.settings, prepared.base
    faults.point("load")
    torch.manual_seed(settings.seed)
    if settings.init:
        settings = replace(settings, full=True)
    if settings.makes_model and start is not None:
        base = Base(str(start.path), str(start.path.resolve()))
    elif settings.init:
        return make_trainable(new_weights(prepared.config, dtype=prepared.dtype, device=prepared.device), settings)
    quantization = quantization_config(settings.recipe, prepared.dtype, settings.kept_names)
    classes = prepared.encoder.classes
    model = load_weights(
        base,
        dtype=prepared.dtype,
        device=prepared.device,
        quantization=quantization,
        config=prepared.config if classes else None,
        new_head=bool(classes) and base is prepared.base,
    )
    torch.manual_seed(settings.seed)
    is_grown = settings.makes_model and start is not None  # its tokens have their rows, trained
    model = make_trainable(model, settings, None if is_grown else prepared.new_tokens)
    if start is not None and not settings.makes_model:
        restore_adapter(model, start.path)
    elif settings.lora_init == "loftq":
        start_from_rounding(model, rounding_errors(model, weights_reader(base)))
    keep_plain_layout(model)
    return model


def check_space(prepared: Prepared, folder: RunFolder) -> None:
    """Before anything is loaded: memory for the weights on a CPU, disk for --keep checkpoints and the one being made."""
    if prepared.device == "cpu" and not prepared.settings.init:
        require_memory(weights_bytes(prepared), f"loading {prepared.base.name}")
    checkpoints = max(1, prepared.settings.keep + 1 - len(checkpoint_steps(folder.path)))
    room = checkpoints * checkpoint_bytes(prepared)
    hint = "make room, give --run on another disk, or a smaller --keep"
    require_disk(folder.path, room, f"{checkpoints} checkpoints take", hint=hint)


def take_liger(prepared: Prepared, model: nn.Module) -> Prepared:
    """Liger's kernels on a CUDA card where they are installed; where they give other numbers, said, none."""
    if prepared.device != "cuda" or not is_installed():
        return prepared
    found = use_liger(model, prepared.examples, prepared.device)
    if found.fault is not None:
        console.info(f"Liger kernels are installed and not used: {found.fault}")
    return replace(prepared, liger=found)


def settle_packing(prepared: Prepared, model: nn.Module, start: Checkpoint | None) -> Prepared:
    """Padded batches, said, where the model does not honour packs. A run that is gone on with keeps what it found."""
    if not prepared.plan.pack:
        return prepared
    if start is not None and start.values["pack"]:
        if is_used_on(prepared.device):  # how the card attends to packs: the run may have begun on another
            refuse_other_packs(packing_fault(model, prepared.examples, prepared.device, console.info))
        return prepared
    known = start.values["packing_fault"] if start is not None else None
    fault = known or packing_fault(model, prepared.examples, prepared.device, console.info)
    if fault is None:
        return prepared
    console.info(f"rows are padded, not packed: {type(prepared.config).__name__.removesuffix('Config')}: {fault}")
    return replace(prepared, plan=replace(prepared.plan, pack=False), packing_fault=fault)


def refuse_other_packs(fault: str | None) -> None:
    """A run whose rows were packed is not gone on with where packs give other numbers; exit 6."""
    if fault is not None:
        raise UserError(
            f"this run packed its rows, and on this card {fault}",
            ExitCode.ENVIRONMENT,
            hint="go on where it began, or begin again with --resume never",
        )


def show_plan(prepared: Prepared, model: nn.Module) -> None:
    """Before the first step: rows, tokens, steps, what is trained, and one example as the model sees it."""
    plan, ledger, settings = prepared.plan, prepared.ledger, prepared.settings
    console.info(
        f"rows: {len(prepared.examples):,} to train, {len(prepared.valid_examples):,} held out;"
        f" {ledger.tokens:,} tokens, {ledger.counted:,} of them trained"
    )
    passes = plan.steps * plan.batch / len(prepared.examples)
    at_once = f"packs of {plan.micro_tokens:,} tokens" if plan.pack else f"{plan.micro_batch} at once"
    if prepared.encoder.classes:
        console.info(
            f"{len(prepared.encoder.classes):,} labels; rows are padded, not packed: the head reads one at a time"
        )
    console.info(
        f"plan: {plan.steps:,} steps of {plan.batch} rows ({at_once}), {passes:.1f} passes,"
        f" lr {plan.lr:g} {plan.schedule}"
    )
    trainable, total = count_parameters(model)
    what = "from scratch" if settings.init else settings.recipe
    console.info(
        f"method: {what}, {dtype_name(prepared.dtype)} on {prepared.device};"
        f" trains {trainable:,} of {total:,} parameters ({trainable / total:.2%})"
        + (f"; {prepared.liger}" if prepared.liger else "")
    )
    if targets := target_names(model):
        console.info(f"targets: {', '.join(targets)}")
    console.info("first example, trained tokens marked:")
    console.marked(show_example(prepared.examples[0], prepared.encoder))


def show_example(example: Example, encoder: Encoder) -> list[tuple[str, bool]]:
    """An example as text, cut where trained tokens begin and end; of a row of classes the text and its label."""
    tokenizer = encoder.tokenizer
    if encoder.classes:
        return [(tokenizer.decode(example.ids[:-1]), False), (encoder.classes[example.ids[-1]], True)]
    pieces: list[tuple[list[int], bool]] = []
    for token, is_trained in zip(example.ids, example.counted, strict=True):
        if not pieces or pieces[-1][1] != is_trained:
            pieces.append(([], is_trained))
        pieces[-1][0].append(token)
    return [(tokenizer.decode(ids, clean_up_tokenization_spaces=False), is_trained) for ids, is_trained in pieces]


def tell_course(prepared: Prepared, course: Course, info: dict[str, Any]) -> None:
    """The numbers of the finished run, for run.json and for the person who waited."""
    losses, steps = course.losses, len(course.losses)
    kept = kept_step(prepared, course)
    before, after = course.validated(0), course.validated(kept)
    info |= {"steps": steps, "first_loss": losses[0], "last_loss": losses[-1], "events": course.events}
    info |= {"valid_loss_before": before, "valid_loss": after, "skipped_steps": course.skipped}
    info |= {"train_seconds": round(course.seconds, 2), "tokens_per_second": round(course.tokens / course.seconds, 1)}
    if course.skipped:
        console.warn(
            f"{course.skipped:,} of {steps:,} steps changed nothing: gradients beyond float16's range, whose scale is halved"
            " until they fit (the first steps of a run); with few steps take --dtype bf16 or fp32"
        )
    console.info(f"loss {console.sparkline(losses)} {losses[0]:.3f} -> {losses[-1]:.3f}")
    if prepared.settings.early_stop:
        info |= {"best_step": kept}
        console.info(f"the held-out loss was lowest after step {kept:,} of {steps:,}: that one is kept")
    scores = course.scored(kept)
    info |= {f"valid_{name}": value for name, value in scores.items()}
    for name, value in scores.items():
        console.info(f"held-out {name.replace('_f1', '-F1')} {course.scored(0)[name]:.3f} -> {value:.3f}")
    if before is not None and after is not None:
        speed = f"{course.tokens / course.seconds:,.0f} tokens/s"
        console.info(f"held-out loss {before:.3f} -> {after:.3f} nats per {'row' if scores else 'token'}; {speed}")


def save(prepared: Prepared, model: Any, folder: RunFolder, card: Card, course: Course, info: dict[str, Any]) -> None:
    """The adapter, or the whole model where every weight was trained: of the last step, or of the best checkpoint."""
    trainable, total = count_parameters(model)
    info |= {"trainable": trainable, "parameters": total}
    path = folder.model if prepared.settings.makes_model else folder.adapter
    kept = kept_step(prepared, course)
    if kept != len(course.losses):
        copy_trained(read_checkpoint(checkpoint_path(folder.path, kept)).path, path)
    elif prepared.settings.makes_model:
        save_model(path, model, prepared.encoder.tokenizer, card)
    else:
        save_adapter(path, model, prepared.encoder.tokenizer, card)


def kept_step(prepared: Prepared, course: Course) -> int:
    """The step whose weights the run gives: its last, or with --early-stop the one of the lowest held-out loss."""
    last = len(course.losses)
    return (course.best_step or last) if prepared.settings.early_stop else last


def make_card(prepared: Prepared, model: nn.Module, chat: Mapping[str, Any]) -> Card:
    """What the trained folder says about itself; for chat what the files of settings say, else what the rows do."""
    data, encoder, settings, base = prepared.data, prepared.encoder, prepared.settings, prepared.base
    template = template_at_inference(data)
    return Card(
        base=base.name,
        base_location=base.location,
        base_revision=base.revision,
        base_config_sha256=config_sha256(base),
        base_weights_sha256=None if settings.init else weights_sha256(base),
        method="full" if settings.init else settings.recipe,
        objective=settings.objective,
        dtype=dtype_name(prepared.dtype),
        max_length=settings.max_length,
        template_text=template.text if template else None,
        template_fingerprint=template.fingerprint if template else None,
        pattern=data.rows[0].get("pattern"),
        example=example_instruction(data),
        stop_tokens=[] if encoder.classes else encoder.stop_ids,
        stop_strings=list(template.stop) if template else [],
        quantized_sha256=quantized_fingerprints(model),
        labels=list(encoder.classes),
        kept_16bit=settings.kept_names,
        added_tokens=list(prepared.new_tokens.texts) if prepared.new_tokens else [],
        vocabulary=model.get_input_embeddings().weight.shape[0] if prepared.new_tokens else None,  # type: ignore[operator]
        system=chat.get("system", shared_system(data.rows)) or None,
        generation={name: chat[name] for name in RANGES if name in chat},
    )


def shared_system(rows: Sequence[dict[str, Any]]) -> str | None:
    """The system message that every conversation begins with; None where one has none or another."""
    first = rows[0].get("messages", [{}])[0]
    if first.get("role") != "system":
        return None
    return first["content"] if all(row["messages"][0] == first for row in rows) else None


def take_along(model: Any, card: Card) -> None:
    """How answers should be made, for the generation_config.json of a whole model; an adapter has none of its own."""
    if card.generation and getattr(model, "generation_config", None) is not None:
        model.generation_config.update(**as_theirs(card.generation))


def say_system(card: Card, chat: Mapping[str, Any]) -> None:
    """Which system message chat will begin with."""
    if card.system is not None and card.labels == []:
        whose = "of [chat]" if "system" in chat else "of all rows"
        console.info(f"system message {whose}, recorded for chat: {console.shortened(card.system)}")


def template_at_inference(data: Data) -> Template | None:
    """The rows' template; for prompts without one `completion`, so that chat feeds them as they are, as training did."""
    if data.template is None and data.kind == "prompt_completion":
        return load_template("completion")
    return data.template


def example_instruction(data: Data) -> str | None:
    """The first instruction that has the pattern's form."""
    if data.template is None or data.kind != "prompt_completion":
        return None
    return data.template.typed_text(data.rows[0]["prompt"])


def foretold(estimate: MemoryEstimate | None) -> dict[str, int]:
    """The foretold peak as run.json has it, if there is one."""
    return {} if estimate is None else {"predicted_peak_bytes": estimate.allocated_bytes}


def report_plan(prepared: Prepared, estimate: MemoryEstimate | None) -> None:
    """With --json, what run.json would say, on stdout."""
    if prepared.settings.json:
        facts = {**first_facts(prepared), **foretold(estimate), "status": "planned"}
        sys.stdout.write(json.dumps({"schema": SCHEMA, **facts}) + "\n")


def report(folder: RunFolder, info: dict[str, Any], as_json: bool) -> None:
    """The run's path, or all that run.json says, on stdout; what to type next on stderr."""
    if as_json:
        sys.stdout.write(json.dumps({"schema": SCHEMA, "path": str(folder.path), **info}) + "\n")
        return
    say_path(folder)
    tells = info["settings"]["objective"] == "classify"
    console.info("next: ftkit eval; ftkit chat" if tells else "next: ftkit eval --baseline; ftkit merge; ftkit chat")
