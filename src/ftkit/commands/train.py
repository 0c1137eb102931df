"""`ftkit train`: rows in, a run folder with an adapter (or a model) out."""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ftkit import console
from ftkit.commands.train_plan import Prepared, prepare
from ftkit.commands.train_record import find_done, first_facts, make_folder, recorded, refuse_other_run
from ftkit.commands.train_rows import Data
from ftkit.core.adapters import count_parameters, make_trainable
from ftkit.core.encoding import Example
from ftkit.core.loss import mean_loss, summed_loss
from ftkit.core.optimizers import make_optimizer
from ftkit.core.packed_attention import packed_attention
from ftkit.core.packing_check import packing_fault
from ftkit.core.settings import TrainSettings
from ftkit.core.training import StepResult, train_steps
from ftkit.io.adapter_folder import save_adapter, save_model
from ftkit.io.base_model import config_sha256, load_weights, new_weights, weights_sha256
from ftkit.io.card import Card
from ftkit.io.devices import dtype_name
from ftkit.io.quantization import keep_plain_layout, quantization_config, quantized_fingerprints
from ftkit.io.run_folder import SCHEMA, RunFolder, mark_latest
from ftkit.io.template import Template
from ftkit.io.template_files import load_template


def run(settings: TrainSettings) -> None:
    """Train, or make every check and stop (`--dry-run`), or point to the complete run that did just this."""
    prepared = prepare(settings)
    refuse_other_run(prepared)
    if settings.dry_run:
        show_plan(prepared, prepared.rehearsed)
        report_plan(prepared)
        return
    if (done := find_done(prepared)) is not None:
        console.info(f"already trained with the same rows and settings: {done.path}")
        report(done, done.read_info(), settings.json)
        return
    folder = make_folder(prepared)
    with recorded(folder, prepared) as info:
        model = load(prepared)
        prepared = settle_packing(prepared, model)
        info["plan"] = asdict(prepared.plan)
        show_plan(prepared, model)
        train(prepared, model, folder, info)
        save(prepared, model, folder, info)
    mark_latest(folder)
    report(folder, info, settings.json)


def say_path(run_folder: RunFolder) -> None:
    """The run's path on stdout: this command's data."""
    sys.stdout.write(f"{run_folder.path}\n")


def load(prepared: Prepared) -> nn.Module:
    """The base (or new weights) with what the method trains set free, seeded."""
    settings = prepared.settings
    torch.manual_seed(settings.seed)
    if settings.init:
        model = new_weights(prepared.config, dtype=prepared.dtype, device=prepared.device)
        return make_trainable(model, replace(settings, full=True))
    quantization = quantization_config(settings.method, prepared.dtype)
    model = load_weights(prepared.base, dtype=prepared.dtype, device=prepared.device, quantization=quantization)
    torch.manual_seed(settings.seed)
    model = make_trainable(model, settings)
    keep_plain_layout(model)
    return model


def settle_packing(prepared: Prepared, model: nn.Module) -> Prepared:
    """Padded batches, said, where the model does not honour packs."""
    if not prepared.plan.pack:
        return prepared
    fault = packing_fault(model, prepared.examples, prepared.device)
    if fault is None:
        return prepared
    console.info(f"rows are padded, not packed: {type(prepared.config).__name__.removesuffix('Config')}: {fault}")
    return replace(prepared, plan=replace(prepared.plan, pack=False))


def show_plan(prepared: Prepared, model: nn.Module) -> None:
    """Before the first step: rows, tokens, steps, what is trained, and one example as the model sees it."""
    plan, ledger, settings = prepared.plan, prepared.ledger, prepared.settings
    console.info(
        f"rows: {len(prepared.examples):,} to train, {len(prepared.valid_examples):,} held out;"
        f" {ledger.tokens:,} tokens, {ledger.counted:,} of them trained"
    )
    passes = plan.steps * plan.batch / len(prepared.examples)
    at_once = f"packs of {plan.micro_tokens:,} tokens" if plan.pack else f"{plan.micro_batch} at once"
    console.info(
        f"plan: {plan.steps:,} steps of {plan.batch} rows ({at_once}), {passes:.1f} passes,"
        f" lr {plan.lr:g} {plan.schedule}"
    )
    trainable, total = count_parameters(model)
    what = "from scratch" if settings.init else settings.method
    console.info(
        f"method: {what}, {dtype_name(prepared.dtype)} on {prepared.device};"
        f" trains {trainable:,} of {total:,} parameters ({trainable / total:.2%})"
    )
    console.info("first example, trained tokens marked:")
    console.marked(show_example(prepared.examples[0], prepared.encoder.tokenizer))


def show_example(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """An example as text, cut where trained tokens begin and end."""
    pieces: list[tuple[list[int], bool]] = []
    for token, is_trained in zip(example.ids, example.counted, strict=True):
        if not pieces or pieces[-1][1] != is_trained:
            pieces.append(([], is_trained))
        pieces[-1][0].append(token)
    return [(tokenizer.decode(ids, clean_up_tokenization_spaces=False), is_trained) for ids, is_trained in pieces]


def train(prepared: Prepared, model: nn.Module, folder: RunFolder, info: dict[str, Any]) -> None:
    """All steps, in packs where the plan says so."""
    with packed_attention(model) if prepared.plan.pack else nullcontext():
        run_steps(prepared, model, folder, info)


def run_steps(prepared: Prepared, model: nn.Module, folder: RunFolder, info: dict[str, Any]) -> None:
    """All steps, each logged; the loss on the held-out rows before and after."""
    settings, plan = prepared.settings, prepared.plan
    optimizer = make_optimizer(model, settings.optimizer, plan.lr, settings.weight_decay)
    held = plan.cut(prepared.valid_examples)
    before = validate(model, held, prepared.device, folder, step=0)
    losses: list[float] = []
    tokens, started = 0, time.perf_counter()
    with console.Progress("train", plan.steps) as progress:
        for result in train_steps(model, optimizer, prepared.examples, summed_loss, plan, prepared.device):
            folder.log(step_line(result))
            losses.append(result.loss)
            tokens += result.tokens
            progress.advance(note=f"loss {result.loss:.3f}  {result.tokens / result.seconds:,.0f} tokens/s")
    seconds = time.perf_counter() - started
    after = validate(model, held, prepared.device, folder, step=plan.steps)
    info |= {"steps": plan.steps, "first_loss": losses[0], "last_loss": losses[-1]}
    info |= {"valid_loss_before": before, "valid_loss": after}
    info |= {"train_seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)}
    console.info(f"loss {console.sparkline(losses)} {losses[0]:.3f} -> {losses[-1]:.3f}")
    if after is not None:
        console.info(f"held-out loss {before:.3f} -> {after:.3f} nats per token; {tokens / seconds:,.0f} tokens/s")


def step_line(result: StepResult) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {**asdict(result), "tokens_per_second": round(result.tokens / result.seconds, 1)}


def validate(model: nn.Module, held: list[Any], device: str, folder: RunFolder, *, step: int) -> float | None:
    """Loss on the held-out rows, logged; None if none are held out."""
    if not held:
        return None
    loss, counted = mean_loss(model, held, device)
    folder.log({"step": step, "valid_loss": loss, "valid_counted": counted})
    return loss


def save(prepared: Prepared, model: Any, folder: RunFolder, info: dict[str, Any]) -> None:
    """The adapter, or the whole model where every weight was trained."""
    trainable, total = count_parameters(model)
    info |= {"trainable": trainable, "parameters": total}
    card = make_card(prepared, model)
    if prepared.settings.init or prepared.settings.method == "full":
        save_model(folder.model, model, prepared.encoder.tokenizer, card)
    else:
        save_adapter(folder.adapter, model, prepared.encoder.tokenizer, card)


def make_card(prepared: Prepared, model: nn.Module) -> Card:
    """What the trained folder says about itself."""
    data, encoder, settings, base = prepared.data, prepared.encoder, prepared.settings, prepared.base
    template = template_at_inference(data)
    return Card(
        base=base.name,
        base_location=base.location,
        base_revision=base.revision,
        base_config_sha256=config_sha256(base),
        base_weights_sha256=None if settings.init else weights_sha256(base),
        method="full" if settings.init else settings.method,
        objective=settings.objective,
        dtype=dtype_name(prepared.dtype),
        max_length=settings.max_length,
        template_text=template.text if template else None,
        template_fingerprint=template.fingerprint if template else None,
        pattern=data.rows[0].get("pattern"),
        example=example_instruction(data),
        stop_tokens=encoder.stop_ids,
        stop_strings=list(template.stop) if template else [],
        quantized_sha256=quantized_fingerprints(model),
    )


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


def report_plan(prepared: Prepared) -> None:
    """With --json, what run.json would say, on stdout."""
    if prepared.settings.json:
        sys.stdout.write(json.dumps({"schema": SCHEMA, **first_facts(prepared), "status": "planned"}) + "\n")


def report(folder: RunFolder, info: dict[str, Any], as_json: bool) -> None:
    """The run's path, or all that run.json says, on stdout; what to type next on stderr."""
    if as_json:
        sys.stdout.write(json.dumps({"schema": SCHEMA, "path": str(folder.path), **info}) + "\n")
        return
    say_path(folder)
    console.info("next: ftkit eval --baseline; ftkit merge; ftkit chat")
