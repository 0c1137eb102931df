"""Everything that `ftkit train` knows before it loads weights: what a dry run checks, and what a run is told apart by."""

import hashlib
import json
import os
from collections.abc import Sequence
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
    warn_of_losses,
)
from ftkit.commands.train_tokens import Encoded, encode_or_read
from ftkit.core.adapters import make_trainable, target_names, trainable_parameters
from ftkit.core.batching import auto_micro_batch, auto_micro_tokens, steps_per_epoch
from ftkit.core.encoding import Encoder, Example
from ftkit.core.examples import Ledger
from ftkit.core.liger_kernels import LigerUse
from ftkit.core.meta_model import build_meta_model
from ftkit.core.methods import METHODS
from ftkit.core.model_settings import held_as_stored
from ftkit.core.optimizer_memory import optimizer_memory
from ftkit.core.optimizers import check_optimizer, warmup_steps
from ftkit.core.plan import Plan
from ftkit.core.targets import check_kept, class_head
from ftkit.core.train_settings import TrainSettings
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
    widths_of,
)
from ftkit.io.class_head import pad_token_id, with_classes
from ftkit.io.devices import dtype_name, pick_device, pick_dtype
from ftkit.io.new_tokens import NewTokens, add_new_tokens, read_token_file
from ftkit.io.quantization import check_quantization
from ftkit.io.run_lock import NAME as LOCK
from ftkit.io.stored_quantization import kind_of_stored, stored_quantization
from ftkit.io.trackers import check_trackers

SCRATCH_LR = CLASSES_LR = 1e-3
"""From scratch, and the least for adapters beside a head for classes: the head is new, and the steps are few."""
NOT_IDENTITY = (
    "data", "add_tokens", "run", "json", "dry_run", "device", "save_every", "keep", "resume", "allow_change", "time_limit",
    "tracker", "force",
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
    examples: Sequence[Example]
    valid_rows: list[dict[str, Any]]
    valid_examples: list[Example]
    encoded: Encoded
    plan: Plan
    device: str
    dtype: torch.dtype
    identity: str
    rehearsed: nn.Module
    """The model on the meta device, with what the method trains set free."""
    new_tokens: NewTokens | None = None
    """Those of --add-tokens, which the encoder's tokenizer has already."""
    packing_fault: str | None = None
    """Why rows are padded though packs were asked for."""
    liger: LigerUse | None = None
    """What Liger's kernels do in the loaded model, where they are installed on a CUDA card."""

    @property
    def ledger(self) -> Ledger:
        """What became of the rows."""
        return self.encoded.ledger


def prepare(settings: TrainSettings) -> Prepared:
    """Read and check the rows, find the base, turn rows into examples, decide the plan.

    What can be known without rows comes first: nobody should pipe an hour of rows into a command that cannot run.
    """
    refuse_many_processes(os.environ.get("WORLD_SIZE", ""))
    device = pick_device(settings.device)
    check_optimizer(settings.optimizer, device)
    refuse_offload(settings, device)
    check_quantization(settings.quantization)
    refuse_no_run(settings.run)
    check_trackers(settings.tracker)
    share_of(settings.valid)
    tokens = read_token_file(settings.add_tokens) if settings.add_tokens else []
    data = read_data(settings)
    settings = replace(settings, objective=settle_objective(settings, data))
    say_default(settings.init or settings.model)
    base = find_base(settings.init or settings.model, settings.revision)
    classes = classes_of(settings, data)
    if classes and METHODS[settings.technique].virtual:
        what = f"a head for classes reads the last token by its place, which virtual tokens of {settings.technique} would move"
        raise UserError(
            what, ExitCode.USAGE, hint="any other method: --lora, --method ia3, --train-layers last:2, --full"
        )
    config = config_from_scratch(base) if settings.init else check_base(base, for_classes=bool(classes))
    settings = settle_quantization(settings, base, config)
    (width, layers), trains_weights = widths_of(config), settings.needs_fp32 or bool(settings.init)
    dtype = pick_dtype(settings.dtype, device, trains_weights=trains_weights, width=width)
    tokenizer = load_tokenizer(base, config.get_text_config().vocab_size, answers=not classes)
    new = add_new_tokens(tokenizer, tokens, settings.add_tokens) if tokens and settings.add_tokens else None
    config = with_classes(config, classes, pad_token_id(tokenizer)) if classes else config
    encoder = Encoder(tokenizer, data.template, classes, settings.train_turns)
    rehearsed = rehearse(settings, base, config, dtype, new)
    settings = replace(settings, max_length=cap_length(settings, config, tokenizer if classes else None))
    if targets := target_names(rehearsed):
        settings = replace(
            settings, targets=",".join(targets) if settings.technique != "lora" else lora_targets(settings)
        )
    encoded = encode_or_read(settings, data, encoder)
    warn_of_losses(data.source, encoded.ledger, settings)
    examples, valid_rows, valid_examples = make_examples(settings, data, encoder, encoded.examples, encoded.origin)
    if settings.early_stop and not valid_examples:
        hint = "--valid 0.05, or a file; or leave out --early-stop"
        raise UserError("--early-stop compares held-out losses, and no row is held out", ExitCode.DATA, hint=hint)
    if settings.pack == "on" and METHODS[settings.technique].virtual:
        console.info("rows are padded, not packed: virtual tokens stand in front of every row")
    plan = make_plan(settings, len(examples), max(len(example.ids) for example in examples), width * layers)
    settings = replace(settings, micro_batch=str(plan.micro_batch), micro_tokens=str(plan.micro_tokens), lr=plan.lr,
                       dtype=dtype_name(dtype))  # fmt: skip
    if new is not None:
        say_new_tokens(new, examples)
    identity = identify(settings, data, valid_rows, base, tokens)
    return Prepared(
        settings,
        base,
        config,
        encoder,
        data,
        examples,
        valid_rows,
        valid_examples,
        encoded,
        plan,
        device,
        dtype,
        identity,
        rehearsed,
        new,
    )


def say_new_tokens(new: NewTokens, examples: Sequence[Example]) -> None:
    """How many there are; tokens that no row holds learn nothing, which is a slip of somebody."""
    console.info(f"new tokens: {len(new.ids):,}, ids {new.ids[0]:,} to {new.ids[-1]:,}")
    used = new.count_used([example.ids for example in examples])
    if used < len(new.ids):
        console.warn(
            f"{len(new.ids) - used:,} of {len(new.ids):,} new tokens are in no row to train: they learn little"
        )


def refuse_many_processes(world_size: str) -> None:
    """Launchers such as torchrun start several of us: each would train the same run."""
    if world_size.isdecimal() and int(world_size) > 1:
        raise UserError(
            f"WORLD_SIZE is {world_size}: training in several processes is not built yet",
            ExitCode.ENVIRONMENT,
            hint="start ftkit once, without a launcher",
        )


def refuse_offload(settings: TrainSettings, device: str) -> None:
    """Exit 6 for activations that shall leave a GPU's memory where there is none."""
    if settings.offload_activations and device != "cuda":
        what = f"--offload-activations needs a CUDA GPU: on {device} they are in the computer's memory already"
        raise UserError(what, ExitCode.ENVIRONMENT, hint="leave it out")


def refuse_no_run(asked: str | None) -> None:
    """--run makes a new folder, or names that of a run: one that holds anything else is exit 9.

    A run that ended before it wrote run.json has left an empty folder, or its lock.
    """
    if asked is None or not Path(asked).exists() or (Path(asked) / "run.json").is_file():
        return
    if not Path(asked).is_dir() or any(entry.name != LOCK and not is_staged(entry) for entry in Path(asked).iterdir()):
        raise UserError(f"{asked} exists and is no run", ExitCode.EXISTS, hint="give another --run")


def rehearse(settings: TrainSettings, base: Base, config: Any, dtype: torch.dtype, new: NewTokens | None) -> nn.Module:
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
        head = class_head(model)
        old = {name: p for name, p in model.named_parameters() if head is None or not head.holds(name)}
        check_tensors(base, {name: tuple(parameter.shape) for name, parameter in old.items()})
    check_kept(model, settings.kept_names)
    with console.quiet_libraries(), torch.device("meta"):
        return make_trainable(model, replace(settings, full=True) if settings.init else settings, new)


def settle_quantization(settings: TrainSettings, base: Base, config: Any) -> TrainSettings:
    """A base whose files hold packed weights is held as they hold it; what cannot be trained on such a one is refused."""
    stored = stored_quantization(config)
    if stored is None:
        return settings
    settled = held_as_stored(settings, kind_of_stored(stored, base.name), base.name)
    console.info(f"{base.name}: quantised already, {settled.quantization}")
    check_quantization(settled.quantization)
    return settled


def config_from_scratch(base: Base) -> Any:
    """The config of a model that does not exist yet."""
    raw, config = read_config(base), transformers_config(base)
    require_causal(raw, config, base.name)
    return config


def lora_targets(settings: TrainSettings) -> str:
    """--targets by the name that other versions of a run had, too."""
    return "all-linear" if settings.targets == "auto" else settings.targets


def cap_length(settings: TrainSettings, config: Any, tokenizer: Any = None) -> int:
    """--max-length, no longer than the model's context; an encoder's may be longer than its tokenizer allows.

    Virtual tokens take some of it.
    """
    asked = settings.max_length
    limits = [context_length(config), tokenizer and tokenizer.model_max_length]
    context: int | None = min(filter(None, limits), default=None)
    if context is not None and METHODS[settings.technique].virtual:
        context -= settings.virtual_tokens
        if context < 2:
            what = f"--virtual-tokens {settings.virtual_tokens}: the model reads {context + settings.virtual_tokens} tokens"
            raise UserError(what, ExitCode.USAGE, hint="give fewer")
    if context is not None and asked > context:
        console.info(f"--max-length {asked} is beyond the model's context: rows of up to {context} tokens are trained")
        return context
    return asked


def make_plan(settings: TrainSettings, rows: int, longest: int, features: int) -> Plan:
    """Steps, micro-batches and learning rate, as numbers. features: of a token's hidden states, in all layers together."""
    per_epoch = steps_per_epoch(rows, settings.batch)
    steps = settings.steps or max(1, round(per_epoch * settings.epochs))
    micro = (
        auto_micro_batch(longest, settings.batch)
        if settings.micro_batch == "auto"
        else min(int(settings.micro_batch), settings.batch)
    )
    tokens = (
        auto_micro_tokens(longest, None if settings.micro_batch == "auto" else micro, features)
        if settings.micro_tokens == "auto"
        else int(settings.micro_tokens)
    )
    if warmup_steps(steps, settings.warmup) >= steps > 1:
        what = f"--warmup {settings.warmup:g} is all of the {steps} steps: the learning rate would never be reached"
        raise UserError(what, ExitCode.USAGE, hint=f"--warmup {max(1, steps // 10)}, or a share: --warmup 0.03")
    return Plan(
        batch=settings.batch,
        micro_batch=micro,
        steps=steps,
        lr=settings.lr or default_lr(settings),
        schedule=settings.schedule,
        warmup=settings.warmup,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        pack=settings.pack == "on"
        and settings.objective != "classify"  # its head takes one row for a sequence
        and not METHODS[settings.technique].virtual,
        share_prefix=settings.share_prefix == "on" and not settings.neftune,  # each row has noise of its own
        micro_tokens=tokens,
    )


def default_lr(settings: TrainSettings) -> float:
    """The learning rate where none is asked for."""
    if settings.init:
        return SCRATCH_LR
    method = METHODS[settings.technique]
    return max(CLASSES_LR, method.lr) if settings.objective == "classify" and method.is_adapter else method.lr


def identify(
    settings: TrainSettings, data: Data, valid_rows: list[dict[str, Any]], base: Base, tokens: list[str]
) -> str:
    """sha256 of all that decides the result: resolved settings, rows, held-out rows, base, template, new tokens."""
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
        "tokens": tokens,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def base_facts(base: Base, settings: TrainSettings) -> dict[str, str | None]:
    """What tells one base from another, whatever its name: its config, and its weights or the commit they come from."""
    weights = None if settings.init else weights_sha256(base)
    return {"revision": base.revision, "config_sha256": config_sha256(base), "weights_sha256": weights}


def weights_bytes(prepared: Prepared) -> float:
    """What the loaded weights take at the very least."""
    kind = prepared.settings.quantization
    quantised = None if kind is None else 1.0 if kind == "int8" else 0.5
    return sum(p.numel() * (quantised or p.element_size()) for p in prepared.rehearsed.parameters())


def checkpoint_bytes(prepared: Prepared) -> int:
    """Size of one checkpoint on disk: trained weights and what the optimizer keeps of them."""
    trained = trainable_parameters(prepared.rehearsed)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return weights + optimizer_memory(prepared.settings.optimizer, trained).state_bytes
