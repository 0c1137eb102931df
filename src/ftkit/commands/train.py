"""`ftkit train`: rows in, a run folder with an adapter (or a model) out."""

import hashlib
import json
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import nn

from ftkit import __version__, console
from ftkit.core.adapters import count_parameters, make_trainable
from ftkit.core.batching import auto_micro_batch, micro_batches, steps_per_epoch
from ftkit.core.configuration import toml_value
from ftkit.core.encoding import Encoder, Example
from ftkit.core.examples import Ledger, encode_rows
from ftkit.core.holdout import content_hash, hold_out
from ftkit.core.loss import mean_loss, summed_loss
from ftkit.core.meta_model import build_meta_model
from ftkit.core.optimizers import check_optimizer, make_optimizer
from ftkit.core.settings import TrainSettings
from ftkit.core.training import Plan, StepResult, train_steps
from ftkit.errors import ExitCode, UserError
from ftkit.io.adapter_folder import save_adapter, save_model
from ftkit.io.base_model import (
    Base,
    check_base,
    check_tensors,
    config_sha256,
    context_length,
    find_base,
    load_tokenizer,
    load_weights,
    new_weights,
    read_config,
    require_causal,
    say_default,
    transformers_config,
    weights_sha256,
)  # fmt: skip
from ftkit.io.card import Card
from ftkit.io.devices import dtype_name, pick_device, pick_dtype
from ftkit.io.jsonl import STDIN, read_rows, source_name
from ftkit.io.quantization import check_quantization, keep_plain_layout, quantization_config, quantized_fingerprints
from ftkit.io.records import check_row
from ftkit.io.run_folder import COMPLETE, SCHEMA, RunFolder, find_complete, mark_latest, new_run
from ftkit.io.template import Template
from ftkit.io.template_files import load_template, template_of_rows

DEFAULT_LR = {"lora": 2e-4, "qlora": 2e-4, "int8": 2e-4, "full": 2e-5}
SCRATCH_LR = 1e-3
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
NOT_IDENTITY = ("data", "run", "json", "dry_run", "device")


@dataclass(frozen=True)
class Data:
    """The rows of a run, checked: each with its place (file:line), all of one kind and one template."""

    source: str
    rows: list[dict[str, Any]]
    places: list[str]
    kind: str
    template: Template | None
    sha256: str


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
        show_plan(prepared, model)
        train(prepared, model, folder, info)
        save(prepared, model, folder, info)
    mark_latest(folder)
    report(folder, info, settings.json)


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
    share_of(settings.valid)
    data = read_data(settings)
    settings = replace(settings, objective=settle_objective(settings, data))
    say_default(settings.init or settings.model)
    base = find_base(settings.init or settings.model, settings.revision)
    config = config_from_scratch(base) if settings.init else check_base(base)
    encoder = Encoder(load_tokenizer(base, config.get_text_config().vocab_size), data.template)
    rehearsed = rehearse(settings, base, config, dtype)
    settings = replace(settings, max_length=cap_length(settings.max_length, config))
    examples, valid_rows, valid_examples, ledger = make_examples(settings, data, encoder)
    plan = make_plan(settings, len(examples), max(len(e.ids) for e in examples))
    settings = replace(settings, micro_batch=str(plan.micro_batch), lr=plan.lr, dtype=dtype_name(dtype))
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
        check_tensors(base, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    with console.quiet_libraries(), torch.device("meta"):
        return make_trainable(model, replace(settings, full=True) if settings.init else settings)


def read_data(settings: TrainSettings) -> Data:
    """All rows of DATA or stdin; the first bad one stops with its place."""
    source = settings.data or STDIN
    if source == STDIN and console.is_terminal(sys.stdin):
        raise UserError(
            "no rows: stdin is a terminal",
            ExitCode.USAGE,
            hint="ftkit train train.jsonl, or: ftkit prep FILE --template alpaca | ftkit train",
        )
    rows, places = read_checked(source)
    if source == STDIN:
        console.info(f"{len(rows):,} rows from stdin")
    kinds = {check_row(row, place): place for row, place in zip(reversed(rows), reversed(places), strict=True)}
    if len(kinds) > 1:
        first = "; ".join(f"{kind} at {place}" for kind, place in kinds.items())
        raise UserError(
            f"rows of {len(kinds)} kinds in one file: {first}", ExitCode.DATA, hint="train one kind at a time"
        )
    if len(rows) > 1 and all(row == rows[0] for row in rows):
        console.warn(f"all {len(rows):,} rows are the same")
    return Data(
        source_name(source), rows, places, next(iter(kinds)), find_template(settings, rows, places), rows_sha256(rows)
    )


def rows_sha256(rows: list[dict[str, Any]]) -> str:
    """Of the rows in their order, in hex; the order of a row's keys does not count."""
    return hashlib.sha256(b"\n".join(orjson.dumps(row, option=orjson.OPT_SORT_KEYS) for row in rows)).hexdigest()


def read_checked(source: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, their places); a file without rows is an error."""
    rows, places = [], []
    for number, row in read_rows(source):
        place = f"{source_name(source)}:{number}"
        check_row(row, place)
        rows.append(row)
        places.append(place)
    if not rows:
        raise UserError(
            f"{source_name(source)}: 0 rows",
            ExitCode.DATA,
            hint="make some: ftkit prep FILE --template alpaca > train.jsonl",
        )
    return rows, places


def find_template(settings: TrainSettings, rows: list[dict[str, Any]], places: list[str]) -> Template | None:
    """The template that the rows name, all the same one; without a name, the one that --template gives."""
    given = load_template(settings.template) if settings.template else None
    named = rows[0].get("template")
    for row, place in zip(rows, places, strict=True):
        if row.get("template") != named:
            raise UserError(
                f"{place}: template {row.get('template')}, the rows before it have {named}",
                ExitCode.DATA,
                hint="train one template at a time",
            )
    if named is None:
        return given
    if not isinstance(named, str):
        raise UserError(f"{places[0]}: 'template' should be text like alpaca@0123456789ab", ExitCode.DATA)
    return template_of_rows(named, given)


def settle_objective(settings: TrainSettings, data: Data) -> Any:
    """sft or text, by the rows; asking for the one that they are not is a data error."""
    found = "text" if data.kind == "text" else "sft"
    if settings.objective not in ("auto", found):
        raise UserError(
            f"--objective {settings.objective}: the rows of {data.source} are for {found}",
            ExitCode.DATA,
            hint="--objective text takes rows with a text, sft takes prompt and completion, or messages",
        )
    return found


def config_from_scratch(base: Base) -> Any:
    """The config of a model that does not exist yet."""
    raw, config = read_config(base), transformers_config(base)
    require_causal(raw, config, base.name)
    return config


def cap_length(asked: int, config: Any) -> int:
    """--max-length, no longer than the model's context."""
    context = context_length(config)
    if context is not None and asked > context:
        console.info(f"--max-length {asked} is beyond the model's context: rows of up to {context} tokens are trained")
        return context
    return asked


def make_examples(
    settings: TrainSettings, data: Data, encoder: Encoder
) -> tuple[list[Example], list[dict[str, Any]], list[Example], Ledger]:
    """(examples to train, rows held out, their examples, ledger of all rows)."""
    examples, origin, ledger = encode(settings, encoder, data.rows, data.places)
    warn_of_losses(data.source, ledger, settings.max_length)
    if not examples:
        raise UserError(
            f"{data.source}: no row fits into {settings.max_length} tokens with something to learn",
            ExitCode.DATA,
            hint="a longer --max-length, or shorter prompts",
        )
    share = share_of(settings.valid)
    if share is None:
        return examples, *read_held_out(settings, data, encoder), ledger
    kept = sorted(set(origin))  # a long text is one row of many examples, all on one side
    held = {kept[place] for place in hold_out([data.rows[i] for i in kept], share)[1]}
    train, valid = (
        [example for example, i in zip(examples, origin, strict=True) if (i in held) is side] for side in (False, True)
    )
    return train, [data.rows[i] for i in sorted(held)], valid, ledger


def read_held_out(settings: TrainSettings, data: Data, encoder: Encoder) -> tuple[list[dict[str, Any]], list[Example]]:
    """(rows, their examples) of the file that --valid names."""
    rows, places = read_checked(settings.valid)
    find_same_template(data, rows, places)
    trained = {content_hash(row) for row in data.rows}
    if known := sum(content_hash(row) in trained for row in rows):
        console.warn(
            f"{settings.valid}: {known:,} of {len(rows):,} rows are in the training data too: their loss says little"
        )
    examples, origin, ledger = encode(settings, encoder, rows, places)
    warn_of_losses(settings.valid, ledger, settings.max_length)
    return [rows[i] for i in sorted(set(origin))], examples


def warn_of_losses(source: str, ledger: Ledger, max_length: int) -> None:
    """Rows that are not used as they stand are said and counted, never silent."""
    fates = [f"{ledger.dropped:,} dropped"] if ledger.dropped else []
    fates += [f"{ledger.truncated:,} cut, so without a trained stop"] if ledger.truncated else []
    if fates:
        console.warn(
            f"{source}: of {ledger.rows:,} rows, beyond {max_length} tokens: {', '.join(fates)}"
            f" ({ledger.lost_tokens:,} answer tokens lost)"
        )
    if ledger.untrained_turns:
        why = "they begin the conversation, or the chat template changes them once others follow"
        console.warn(f"{source}: {ledger.untrained_turns:,} assistant turns are context only: {why}")


def encode(
    settings: TrainSettings, encoder: Encoder, rows: list[dict[str, Any]], places: list[str]
) -> tuple[list[Example], list[int], Ledger]:
    """Rows as examples of at most --max-length tokens."""
    return encode_rows(
        zip(places, rows, strict=True), encoder, max_length=settings.max_length, overlength=settings.overlength
    )


def share_of(valid: str) -> float | None:
    """--valid as a share of the rows; None if it names a file."""
    try:
        share = float(valid)
    except ValueError:
        return None
    if not 0 <= share < 1:
        raise UserError(f"--valid {valid} is out of range", ExitCode.USAGE, hint="a share from 0 to below 1, or a file")
    return share


def find_same_template(data: Data, rows: list[dict[str, Any]], places: list[str]) -> None:
    """Held-out rows must be made with the template of the training rows."""
    ours = data.rows[0].get("template")
    for row, place in zip(rows, places, strict=True):
        if row.get("template") != ours:
            raise UserError(
                f"{place}: template {row.get('template')}, the training rows have {ours}",
                ExitCode.DATA,
                hint="prepare both files alike",
            )


def make_plan(settings: TrainSettings, rows: int, longest: int) -> Plan:
    """Steps, micro-batch and learning rate, as numbers."""
    per_epoch = steps_per_epoch(rows, settings.batch)
    steps = settings.steps or max(1, round(per_epoch * settings.epochs))
    micro = (
        auto_micro_batch(longest, settings.batch)
        if settings.micro_batch == "auto"
        else min(int(settings.micro_batch), settings.batch)
    )
    lr = settings.lr or (SCRATCH_LR if settings.init else DEFAULT_LR[settings.method])
    return Plan(
        settings.batch, micro, steps, lr, settings.schedule, settings.warmup, settings.max_grad_norm, settings.seed
    )


def identify(settings: TrainSettings, data: Data, valid_rows: list[dict[str, Any]], base: Base) -> str:
    """sha256 of all that decides the result: resolved settings, rows, held-out rows, base, template."""
    chosen = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in NOT_IDENTITY}
    template = data.template and data.template.fingerprint
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


def find_done(prepared: Prepared) -> RunFolder | None:
    """The complete run that did just this already: in --run, or anywhere in runs/, where it becomes the latest."""
    asked = prepared.settings.run
    if asked is None:
        done = find_complete(prepared.identity)
        if done is not None:
            mark_latest(done)
        return done
    run_folder = RunFolder(Path(asked))
    if not (run_folder.path / "run.json").is_file():
        return None
    info = run_folder.read_info()
    is_same = info.get("status") == COMPLETE and info.get("identity") == prepared.identity
    return run_folder if is_same else None


def refuse_no_run(asked: str | None) -> None:
    """--run makes a new folder, or names that of a run: another one is exit 9."""
    if asked is not None and Path(asked).exists() and not (Path(asked) / "run.json").is_file():
        raise UserError(f"{asked} exists and is no run", ExitCode.EXISTS, hint="give another --run")


def refuse_other_run(prepared: Prepared) -> None:
    """A run that --run names and that is not complete is exit 9; one of other settings or rows exit 4, with which."""
    asked = prepared.settings.run
    if asked is None or not Path(asked).exists():
        return
    info = RunFolder(Path(asked)).read_info()
    if info.get("status") != COMPLETE:
        hint = "remove it, or give another --run"
        raise UserError(
            f"{asked} exists and its run is not complete (status: {info.get('status')})", ExitCode.EXISTS, hint=hint
        )
    if info.get("identity") != prepared.identity:
        changed = ", ".join(differences(info, prepared)) or "the held-out rows or the template"
        raise UserError(f"{asked} holds another run; different: {changed}", ExitCode.MODEL, hint="give another --run")


def make_folder(prepared: Prepared) -> RunFolder:
    """The new folder of the run."""
    if prepared.settings.run is None:
        return new_run(prepared.base.short_name, prepared.identity)
    folder = RunFolder(Path(prepared.settings.run))
    folder.path.mkdir(parents=True)
    return folder


def differences(info: dict[str, Any], prepared: Prepared) -> list[str]:
    """What differs between a run on disk and the one asked for, in words."""
    old, new = info.get("settings", {}), settings_facts(prepared.settings)
    changed = [
        f"{key} {old.get(key)} -> {new[key]}" for key in new if key not in NOT_IDENTITY and old.get(key) != new[key]
    ]
    changed += ["rows"] if info.get("data", {}).get("sha256") != prepared.data.sha256 else []
    facts, known = base_facts(prepared.base, prepared.settings), info.get("model", {})
    return changed + (["base"] if any(known.get(key) != value for key, value in facts.items()) else [])


def say_path(run_folder: RunFolder) -> None:
    """The run's path on stdout: this command's data."""
    sys.stdout.write(f"{run_folder.path}\n")


def settings_facts(settings: TrainSettings) -> dict[str, Any]:
    """The resolved settings as JSON holds them."""
    return json.loads(json.dumps(asdict(settings)))  # type: ignore[no-any-return]


@contextmanager
def recorded(folder: RunFolder, prepared: Prepared) -> Iterator[dict[str, Any]]:
    """run.json from the start: status running, then complete, or what ended the run."""
    info = first_facts(prepared)
    folder.write_info(info)
    folder.write_text("config.toml", config_text(prepared.settings))
    folder.write_rows("valid.jsonl", prepared.valid_rows)
    started = time.perf_counter()
    try:
        yield info
    except BaseException as error:
        info["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        info["error"] = str(error)
        folder.write_info(info)
        raise
    info |= {
        "status": COMPLETE,
        "seconds": round(time.perf_counter() - started, 2),
        "measured_peak_bytes": measured_peak(prepared.device),
    }
    folder.write_info(info)


def first_facts(prepared: Prepared) -> dict[str, Any]:
    """What run.json says before the first step."""
    data, base = prepared.data, prepared.base
    return {
        "status": "running",
        "identity": prepared.identity,
        "argv": shlex.join(["ftkit", *sys.argv[1:]]),
        "versions": {"ftkit": __version__, "python": platform.python_version(), **library_versions()},
        "settings": settings_facts(prepared.settings),
        "data": data_facts(prepared),
        "model": {"id": base.name, "location": base.location, **base_facts(base, prepared.settings)},
        "template": data.template.fingerprint if data.template else None,
        "device": prepared.device,
        "dtype": dtype_name(prepared.dtype),
        "plan": asdict(prepared.plan),
    }  # fmt: skip


def data_facts(prepared: Prepared) -> dict[str, Any]:
    """The rows of a run, and what became of them."""
    data, ledger = prepared.data, prepared.ledger
    counts = {key: value for key, value in asdict(ledger).items() if key not in ("rows", "kept")}
    known = {"path": data.source, "sha256": data.sha256, "rows": len(data.rows)}
    return {**known, **counts, "held_out": len(prepared.valid_rows)}


def library_versions() -> dict[str, str | None]:
    """What numbers depend on."""
    return {name: installed_version(name) for name in LIBRARIES}


def installed_version(name: str) -> str | None:
    """Of a library, without importing it; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def config_text(settings: TrainSettings) -> str:
    """The resolved settings as config.toml, which `ftkit train --config` repeats."""
    known = {
        key: value
        for key, value in asdict(settings).items()
        if value is not None and key not in ("dry_run", "json", "run")
    }
    return "[train]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in known.items())


def measured_peak(device: str) -> int:
    """Peak memory in bytes: of the GPU's allocator, or of this process."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


def show_plan(prepared: Prepared, model: nn.Module) -> None:
    """Before the first step: rows, tokens, steps, what is trained, and one example as the model sees it."""
    plan, ledger, settings = prepared.plan, prepared.ledger, prepared.settings
    console.info(
        f"rows: {len(prepared.examples):,} to train, {len(prepared.valid_examples):,} held out;"
        f" {ledger.tokens:,} tokens, {ledger.counted:,} of them trained"
    )
    passes = plan.steps * plan.batch / len(prepared.examples)
    console.info(
        f"plan: {plan.steps:,} steps of {plan.batch} rows ({plan.micro_batch} at once), {passes:.1f} passes,"
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
    """All steps, each logged; the loss on the held-out rows before and after."""
    settings, plan = prepared.settings, prepared.plan
    optimizer = make_optimizer(model, settings.optimizer, plan.lr, settings.weight_decay)
    held = micro_batches(prepared.valid_examples, plan.micro_batch)
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
        template_text=data.template.text if data.template else None,
        template_fingerprint=data.template.fingerprint if data.template else None,
        pattern=data.rows[0].get("pattern"),
        example=example_instruction(data),
        stop_tokens=encoder.stop_ids,
        stop_strings=list(data.template.stop) if data.template else [],
        quantized_sha256=quantized_fingerprints(model),
    )


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
