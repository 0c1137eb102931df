"""Everything that `ftkit train` knows before it loads weights: what a dry run checks, and what a run is told apart by."""

import hashlib
import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftkit import console
from ftkit.commands.train_rows import (
    Data,
    classes_of,
    make_examples,
    read_data,
    rows_sha256,
    settle_objective,
    share_of,
)
from ftkit.core.adapters import make_trainable, trainable_parameters
from ftkit.core.batching import auto_micro_batch, auto_micro_tokens, steps_per_epoch
from ftkit.core.encoding import Encoder, Example
from ftkit.core.examples import Ledger
from ftkit.core.meta_model import build_meta_model
from ftkit.core.optimizer_memory import optimizer_memory
from ftkit.core.optimizers import check_optimizer
from ftkit.core.plan import Plan
from ftkit.core.settings import TrainSettings
from ftkit.core.targets import class_head
from ftkit.errors import ExitCode, UserError
from ftkit.io.atomic import is_staged
from ftkit.io.base_model import (
    Base,
    check_base,
    check_tensors,
    config_sha256,
    context_length,
    find_base,
    load_tokenizer,
    read_config,
    require_causal,
    say_default,
    transformers_config,
    weights_sha256,
)
from ftkit.io.class_head import pad_token_id, with_classes
from ftkit.io.devices import dtype_name, pick_device, pick_dtype
from ftkit.io.quantization import check_quantization
from ftkit.io.run_lock import NAME as LOCK
from ftkit.io.trackers import check_trackers

DEFAULT_LR = {"lora": 2e-4, "qlora": 2e-4, "int8": 2e-4, "full": 2e-5}
SCRATCH_LR = CLASSES_LR = 1e-3
"""From scratch, and for adapters beside a head for classes: the head is new, and the steps are few."""
NOT_IDENTITY = (
    "data", "run", "json", "dry_run", "device", "save_every", "keep", "resume", "allow_change", "time_limit", "tracker", "force",
)  # fmt: skip
"""Settings that do not change what a run makes; with --early-stop, when it saves does."""


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before weights are loaded."""

    settings: TrainSettings
    base: Base
    config: Any
    encoder: Encoder
    data: Data
    examples: list[Example]
    valid_rows: list[dict[str, Any]]
    valid_examples: list[Example]
    ledger: Ledger
    plan: Plan
    device: str
    dtype: torch.dtype
    identity: str
    rehearsed: nn.Module
    """The model on the meta device, with what the method trains set free."""
    packing_fault: str | None = None
    """Why rows are padded though packs were asked for."""

    @property
    def trains_model(self) -> bool:
        """True where every weight is trained, so that a model is written and no adapter."""
        return bool(self.settings.init) or self.settings.method == "full"


def prepare(settings: TrainSettings) -> Prepared:
    """Read and check the rows, find the base, turn rows into examples, decide the plan.

    What can be known without rows comes first: nobody should pipe an hour of rows into a command that cannot run.
    """
    refuse_many_processes(os.environ.get("WORLD_SIZE", ""))
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device, trains_weights=settings.method == "full" or bool(settings.init))
    check_optimizer(settings.optimizer, device)
    check_quantization(settings.method)
    refuse_no_run(settings.run)
    check_trackers(settings.tracker)
    share_of(settings.valid)
    data = read_data(settings)
    settings = replace(settings, objective=settle_objective(settings, data))
    say_default(settings.init or settings.model)
    base = find_base(settings.init or settings.model, settings.revision)
    classes = classes_of(settings, data)
    config = config_from_scratch(base) if settings.init else check_base(base, for_classes=bool(classes))
    tokenizer = load_tokenizer(base, config.get_text_config().vocab_size, answers=not classes)
    config = with_classes(config, classes, pad_token_id(tokenizer)) if classes else config
    encoder = Encoder(tokenizer, data.template, classes, settings.train_turns)
    rehearsed = rehearse(settings, base, config, dtype)
    settings = replace(settings, max_length=cap_length(settings.max_length, config, tokenizer if classes else None))
    examples, valid_rows, valid_examples, ledger = make_examples(settings, data, encoder)
    if settings.early_stop and not valid_examples:
        hint = "--valid 0.05, or a file; or leave out --early-stop"
        raise UserError("--early-stop compares held-out losses, and no row is held out", ExitCode.DATA, hint=hint)
    plan = make_plan(settings, len(examples), max(len(e.ids) for e in examples))
    settings = replace(settings, micro_batch=str(plan.micro_batch), micro_tokens=str(plan.micro_tokens), lr=plan.lr,
                       dtype=dtype_name(dtype))  # fmt: skip
    identity = identify(settings, data, valid_rows, base)
    return Prepared(
        settings,
        base,
        config,
        encoder,
        data,
        examples,
        valid_rows,
        valid_examples,
        ledger,
        plan,
        device,
        dtype,
        identity,
        rehearsed,
    )


def refuse_many_processes(world_size: str) -> None:
    """Launchers such as torchrun start several of us: each would train the same run."""
    if world_size.isdecimal() and int(world_size) > 1:
        raise UserError(
            f"WORLD_SIZE is {world_size}: training in several processes is not built yet",
            ExitCode.ENVIRONMENT,
            hint="start ftkit once, without a launcher",
        )


def refuse_no_run(asked: str | None) -> None:
    """--run makes a new folder, or names that of a run: one that holds anything else is exit 9.

    A run that ended before it wrote run.json has left an empty folder, or its lock.
    """
    if asked is None or not Path(asked).exists() or (Path(asked) / "run.json").is_file():
        return
    if not Path(asked).is_dir() or any(entry.name != LOCK and not is_staged(entry) for entry in Path(asked).iterdir()):
        raise UserError(f"{asked} exists and is no run", ExitCode.EXISTS, hint="give another --run")


def rehearse(settings: TrainSettings, base: Base, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model that will be trained, without weights: files, --targets or --r that do not fit it stop here."""
    try:
        with console.quiet_libraries():
            model = build_meta_model(config, dtype)
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{base.name}: no model can be built from its config.json: {reason}",
            ExitCode.MODEL,
            hint="give the model's own config.json",
        ) from None
    if not settings.init:
        new = class_head(model)
        old = {name: p for name, p in model.named_parameters() if new is None or not new.holds(name)}
        check_tensors(base, {name: tuple(parameter.shape) for name, parameter in old.items()})
    with console.quiet_libraries(), torch.device("meta"):
        return make_trainable(model, replace(settings, full=True) if settings.init else settings)


def config_from_scratch(base: Base) -> Any:
    """The config of a model that does not exist yet."""
    raw, config = read_config(base), transformers_config(base)
    require_causal(raw, config, base.name)
    return config


def cap_length(asked: int, config: Any, tokenizer: Any = None) -> int:
    """--max-length, no longer than the model's context; an encoder's may be longer than its tokenizer allows."""
    limits = [context_length(config), tokenizer and tokenizer.model_max_length]
    context: int | None = min(filter(None, limits), default=None)
    if context is not None and asked > context:
        console.info(f"--max-length {asked} is beyond the model's context: rows of up to {context} tokens are trained")
        return context
    return asked


def make_plan(settings: TrainSettings, rows: int, longest: int) -> Plan:
    """Steps, micro-batches and learning rate, as numbers."""
    per_epoch = steps_per_epoch(rows, settings.batch)
    steps = settings.steps or max(1, round(per_epoch * settings.epochs))
    micro = (
        auto_micro_batch(longest, settings.batch)
        if settings.micro_batch == "auto"
        else min(int(settings.micro_batch), settings.batch)
    )
    tokens = (
        auto_micro_tokens(longest, None if settings.micro_batch == "auto" else micro)
        if settings.micro_tokens == "auto"
        else int(settings.micro_tokens)
    )
    return Plan(
        batch=settings.batch,
        micro_batch=micro,
        steps=steps,
        lr=settings.lr or default_lr(settings),
        schedule=settings.schedule,
        warmup=settings.warmup,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        pack=settings.pack == "on" and settings.objective != "classify",  # its head takes one row for a sequence
        share_prefix=settings.share_prefix == "on" and not settings.neftune,  # each row has noise of its own
        micro_tokens=tokens,
    )


def default_lr(settings: TrainSettings) -> float:
    """The learning rate where none is asked for."""
    if settings.init:
        return SCRATCH_LR
    return CLASSES_LR if settings.objective == "classify" and settings.method != "full" else DEFAULT_LR[settings.method]


def identify(settings: TrainSettings, data: Data, valid_rows: list[dict[str, Any]], base: Base) -> str:
    """sha256 of all that decides the result: resolved settings, rows, held-out rows, base, template."""
    chosen = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in NOT_IDENTITY}
    template = data.template and data.template.fingerprint
    if settings.early_stop:
        chosen["save_every"] = settings.save_every
    facts = {
        "settings": chosen,
        "data": data.sha256,
        "valid": rows_sha256(valid_rows),
        "base": base_facts(base, settings),
        "template": template,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def base_facts(base: Base, settings: TrainSettings) -> dict[str, str | None]:
    """What tells one base from another, whatever its name: its config, and its weights or the commit they come from."""
    weights = None if settings.init else weights_sha256(base)
    return {"revision": base.revision, "config_sha256": config_sha256(base), "weights_sha256": weights}


def weights_bytes(prepared: Prepared) -> float:
    """What the loaded weights take at the very least."""
    quantised = {"qlora": 0.5, "int8": 1.0}.get(prepared.settings.method)
    return sum(p.numel() * (quantised or p.element_size()) for p in prepared.rehearsed.parameters())


def checkpoint_bytes(prepared: Prepared) -> int:
    """Size of one checkpoint on disk: trained weights and what the optimizer keeps of them."""
    trained = trainable_parameters(prepared.rehearsed)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return weights + optimizer_memory(prepared.settings.optimizer, trained).state_bytes
