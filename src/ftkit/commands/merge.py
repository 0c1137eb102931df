"""`ftkit merge`: adapter + base -> a model of its own, proven to be what was trained before it is published."""

import copy
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ftkit import console
from ftkit.commands.merge_adapters import combined_adapter
from ftkit.commands.merge_dequantise import plain_base
from ftkit.commands.merge_proof import Proof, prove, was_quantised
from ftkit.commands.merge_weights import SHORT_DTYPES, Ledger, require_only_planned_changes, write_weights
from ftkit.core.answer_settings import as_theirs
from ftkit.core.layer_merging import PeftLayers, layers_of_peft
from ftkit.core.merge_plan import (
    Step,
    changed_ties,
    coarsest_dtype,
    find_layer,
    is_transposed,
    main_dtype,
    plan_merge,
    tied_parameters,
    total_bytes,
    trained_vocabulary,
)
from ftkit.core.merge_settings import MergeSettings
from ftkit.core.meta_model import build_meta_model
from ftkit.core.ollama import modelfile
from ftkit.core.proof import CONTINUED
from ftkit.core.streaming import build_placeholder_model
from ftkit.errors import ExitCode, UserError
from ftkit.io.adapter_weights import Adapter, Rows, open_adapter_weights
from ftkit.io.atomic import atomic_folder
from ftkit.io.base_model import Base, check_base, config_sha256, load_tokenizer, local_files, transformers_config
from ftkit.io.card import Card, write_card
from ftkit.io.devices import DTYPES
from ftkit.io.free_space import require_disk
from ftkit.io.hub_upload import push_folder
from ftkit.io.merged_folder import REPORT, SCHEMA, is_done, merge_identity, read_report, refuse_harm, write_report
from ftkit.io.model_folder import copy_beside, write_config, write_generation_config
from ftkit.io.quantization import quantization_config, quantized_layers
from ftkit.io.run_folder import open_run, require_latest
from ftkit.io.shards import read_layout
from ftkit.io.tensors import FLOATS, same_values
from ftkit.io.trained import Trained, open_trained, open_trained_run, put_adapter

FILE_DTYPES = {"auto": None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True)
class Job:
    """Everything that is decided before weights are read.

    onto: trained or original, never auto. vocabulary: rows of the embeddings, where training resized them. quantised:
    layers that training saw so -> whether their weight is (in, out).
    """

    settings: MergeSettings
    trained: Trained
    adapter: Adapter
    base: Path
    config: Any
    onto: str
    steps: list[Step]
    untied: bool
    vocabulary: int | None
    quantised: dict[str, bool]
    out: Path

    @property
    def own_card(self) -> Card | None:
        """What ftkit knows from training itself; None for an adapter of another tool."""
        return None if self.settings.trained_on else self.trained.card

    @property
    def seen(self) -> dict[str, bool]:
        """Layers that are merged onto the values which training saw, as `quantised`."""
        return self.quantised if self.onto == "trained" else {}


def run(settings: MergeSettings) -> None:
    """Merge, prove, publish; or point to what is there already."""
    settings.check_ranges()
    if settings.adapter:
        with combined_adapter(settings) as trained:
            merge_one(settings, trained)
        return
    trained = find_trained(settings)
    if trained.adapter is None:
        point_to_whole_model(trained, settings)
        return
    if trained.classes:
        raise UserError(
            f"{trained.name}: merge writes models that write text, this one tells classes",
            ExitCode.MODEL,
            hint="eval and chat open the run as it is; ftkit train --full makes a whole model",
        )
    merge_one(settings, trained)


def merge_one(settings: MergeSettings, trained: Trained) -> None:
    """Merge one adapter, whether one was trained so or made of several."""
    assert trained.adapter is not None
    if settings.trained_on is not None:
        trained = with_assumed_quantisation(trained, settings.trained_on)
    with plain_base(trained, choose_output(settings, trained), asked=settings.dequantise) as plain:
        make_and_prove(prepare(settings, plain), trained.base)


def make_and_prove(job: Job, base: Base) -> None:
    """The merged folder, or the one that is there already. base: as the adapter names it."""
    settings = job.settings
    identity = merge_identity(job.adapter.folder, base, job.onto, settings.dtype, settings.trained_on)
    if is_done(job.out, identity, force=settings.force, unproven=settings.no_check):
        finish(job.out, settings)
        return
    require_disk(job.out, total_bytes(job.steps), "the merged model needs", hint="give -o on another disk")
    sums: dict[str, str] = {}
    with atomic_folder(job.out, replace=settings.force, sums=sums) as folder:
        ledger = write_weights(job.steps, job.adapter, job.trained.card, folder, settings.shard_bytes)
        sums.update(ledger.sha256)
        changed = require_only_planned_changes(job.steps, folder, ledger)
        write_beside(job, folder, base)
        proof = check(job, folder, changed)
        write_report(folder, identity | findings(job, changed, ledger, proof), base, job.own_card)
    show(job, changed, proof)
    finish(job.out, settings)


def finish(path: Path, settings: MergeSettings) -> None:
    """Push it to the hub where that was asked for, and print where it is."""
    if settings.push_to_hub is not None:
        console.info(f"pushed: {push_folder(path, settings.push_to_hub)}")
    say_path(path, settings)


def check(job: Job, folder: Path, changed: list[str]) -> Proof | None:
    """The proof of the files in `folder`; None where it was not wanted. changed: names of tensors."""
    if job.settings.no_check:
        console.warn("not proven (--no-check): the model card says so")
        return None
    return prove(
        job.trained,
        job.adapter,
        job.config,
        folder,
        changed,
        seen=job.seen,
        live=job.quantised,
        dtype=coarsest_dtype(job.steps),
        count=job.settings.check,
    )


def find_trained(settings: MergeSettings) -> Trained:
    """What to merge: the run that was named, the run that an adapter folder lies in, or the one that completed last."""
    if settings.run is None:
        return open_trained_run(require_latest())
    path = Path(settings.run).expanduser()
    if (path / REPORT).is_file():
        raise UserError(
            f"{settings.run}: merged already", ExitCode.MODEL, hint=f"ftkit chat {settings.run} talks to it"
        )
    if not path.is_dir():
        raise UserError(
            f"{settings.run}: no such run or adapter folder",
            ExitCode.MODEL,
            hint="ls runs/; without a name, merge takes the latest run",
        )
    if path.name == "adapter" and (path.parent / "run.json").is_file():
        return open_trained_run(open_run(str(path.parent)))
    return open_trained(settings.run)


def with_assumed_quantisation(trained: Trained, method: str) -> Trained:
    """An adapter of another tool as if ftkit had trained it on a base quantised so, in the format of the base's files.

    Nobody recorded checksums of the quantised weights, so none are compared.
    """
    if trained.card is not None:
        what = f"--trained-on: {trained.name} was trained by ftkit, which recorded how ({trained.card.method})"
        raise UserError(what, ExitCode.USAGE, hint="leave it out")
    files = read_layout(local_files(trained.base, weights=True)).values()
    dtype = SHORT_DTYPES[max(FLOATS, key=lambda name: sum(place.nbytes for place in files if place.dtype == name))]
    with console.quiet_libraries():
        asked = quantization_config(method, DTYPES[dtype])
        model = build_meta_model(transformers_config(trained.base), DTYPES[dtype], quantization=asked)
    layers = dict.fromkeys((layer for layer, _ in quantized_layers(model)), "")
    base = trained.base
    card = Card(base.name, base.location, base.revision, config_sha256(base), method, "sft", dtype, 0)
    return replace(trained, card=replace(card, quantized_sha256=layers))


def point_to_whole_model(trained: Trained, settings: MergeSettings) -> None:
    """A run that trained every weight is its own merged model."""
    if trained.run is None:
        raise UserError(f"{trained.name}: a model, not an adapter: there is nothing to merge", ExitCode.MODEL)
    if settings.output:
        raise UserError(
            f"{trained.name}: trained every weight, so there is nothing to merge into {settings.output}",
            ExitCode.USAGE,
            hint=f"cp -r {trained.run.model} {settings.output}",
        )
    console.info(f"{trained.name}: trained every weight, so there is nothing to merge; the model is")
    say_path(trained.run.model, settings)


def say_path(path: Path, settings: MergeSettings) -> None:
    """The one line on stdout: the path, or with --json the report and the path."""
    line = str(path)
    if settings.json:
        line = json.dumps({"schema": SCHEMA, **read_report(path), "path": line}, ensure_ascii=False)
    sys.stdout.write(line + "\n")


def prepare(settings: MergeSettings, trained: Trained) -> Job:
    """Check the adapter against the base, without weights; decide what becomes of every tensor and where it goes."""
    assert trained.adapter is not None
    base = local_files(trained.base, weights=True)
    out = choose_output(settings, trained)
    refuse_harm(out, trained.adapter, base)
    adapter = open_adapter_weights(trained.adapter)
    config = check_base(trained.base)
    onto, layers = "trained", {}
    quantised = {}
    model, config, vocabulary = with_trained_vocabulary(adapter, config)
    if trained.card is not None and was_quantised(trained):
        onto = "original" if settings.onto == "original" else "trained"
        layers = trained.card.quantized_sha256 if onto == "trained" else {}
        if onto == "trained" and not layers:
            what = f"{trained.name}: ftkit.json does not say which layers training saw quantised"
            raise UserError(what, ExitCode.MODEL, hint="--onto original")
        names = trained.card.quantized_sha256
        quantised = {layer: is_transposed(layer, find_layer(layer, model)) for layer in names}
    adapter, ties = joined_ties(adapter, tied_parameters(model))
    by_peft = layers_left_to_peft(adapter, config)
    is_untied = settings.untie and bool(changed_ties(adapter, by_peft, ties))
    steps = plan_merge(
        model,
        read_layout(base),
        adapter,
        by_peft=by_peft,
        quantised=layers,
        dtype=FILE_DTYPES[settings.dtype],
        ties=ties,
        untie=settings.untie,
    )
    if is_untied:
        console.info("untied: head and embeddings are two tensors in the merged model")
    return Job(settings, trained, adapter, base, config, onto, steps, is_untied, vocabulary, quantised, out)


def with_trained_vocabulary(adapter: Adapter, config: Any) -> tuple[Any, Any, int | None]:
    """(the base without its weights, its config, both with as many embeddings as the adapter's; that number if other)."""
    with console.quiet_libraries():
        model = build_placeholder_model(config, torch.float32)
        rows = trained_vocabulary(adapter, model)
        if rows is None:
            return model, config, None
        config = copy.deepcopy(config)
        console.info(f"vocabulary: {config.get_text_config().vocab_size} tokens in the base, {rows} in the adapter")
        config.get_text_config().vocab_size = rows
        return build_placeholder_model(config, torch.float32), config, rows


def layers_left_to_peft(adapter: Adapter, config: Any) -> PeftLayers:
    """PEFT's layers, where it has to merge them itself; none for LoRA on matrices, which ftkit does."""
    if not adapter.others:
        return {}
    with console.quiet_libraries():
        model = build_placeholder_model(config, torch.float32)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in adapter.saved:  # PEFT writes into it
            parameter.data = torch.empty(parameter.shape)
    return layers_of_peft(put_adapter(model, adapter.folder))


def joined_ties(adapter: Adapter, ties: dict[str, str]) -> tuple[Adapter, dict[str, str]]:
    """The adapter, and those ties (parameter -> the one it is tied to) that training left open.

    PEFT saves a tied parameter that was trained as one (`ensure_weight_tying`) under both names: equal ones count once.
    """
    saved, rows, open_ties = dict(adapter.saved), dict(adapter.rows), dict(ties)
    for name, source in ties.items():
        layers = name.removesuffix(".weight"), source.removesuffix(".weight")
        if all(layer in rows for layer in layers) and is_one_training(*(rows[layer] for layer in layers)):
            del rows[layers[0]]
        alone = all(parameter.removesuffix(".weight") not in adapter.pairs for parameter in (name, source))
        if alone and name in saved and source in saved and same_values(saved[name], saved[source]):
            del saved[name], open_ties[name]
    return replace(adapter, saved=saved, rows=rows), open_ties


def is_one_training(one: Rows, other: Rows) -> bool:
    """True if these are the same rows with the same values."""
    return one.numbers == other.numbers and same_values(one.place, other.place)


def choose_output(settings: MergeSettings, trained: Trained) -> Path:
    """-o; RUN/merged; for an adapter without a run, <its folder>-merged beside it."""
    assert trained.adapter is not None
    if settings.output is not None:
        return Path(settings.output).expanduser()
    return trained.run.merged if trained.run else trained.adapter.with_name(trained.adapter.name + "-merged")


def write_beside(job: Job, folder: Path, base: Base) -> None:
    """Everything of the model folder but weights and reports. base: as the adapter names it."""
    copy_beside(job.base, job.adapter.folder, folder)
    dtype = main_dtype(job.steps)
    converted = job.settings.dtype != "auto"
    write_config(job.base, folder, dtype, converted=converted, untied=job.untied, vocabulary=job.vocabulary)
    write_modelfile(job, folder)
    if job.own_card is not None:
        if recorded := as_theirs(job.own_card.generation):
            write_generation_config(folder, recorded)
        own = SHORT_DTYPES[dtype] if SHORT_DTYPES[dtype] in DTYPES else "fp32"
        place = base.public_name if base.folder else base.location
        named = replace(job.own_card, base=base.public_name, base_location=place)
        write_card(folder, replace(named, method="merged", dtype=own, quantized_sha256={}))


def write_modelfile(job: Job, folder: Path) -> None:
    """What Ollama needs beside the model."""
    tokenizer = load_tokenizer(folder if (folder / "tokenizer_config.json").is_file() else job.trained.base)
    card = job.own_card
    text = modelfile(
        tokenizer,
        card.template if card else None,
        card.stop_strings if card else [],
        system=card.system if card else None,
        generation=card.generation if card else {},
    )
    (folder / "Modelfile").write_text(text, encoding="utf-8")


def findings(job: Job, changed: list[str], ledger: Ledger, proof: Proof | None) -> dict[str, Any]:
    """What merge.json tells besides what was asked."""
    return {
        "adapters": [published_name(part) for part in job.settings.adapter] or None,
        "combine": job.settings.combine if job.settings.adapter else None,
        "method": job.trained.card.method if job.trained.card else None,
        "written_as": SHORT_DTYPES[main_dtype(job.steps)],
        "tensors": {
            "changed": changed,
            "unchanged": len(job.steps) - len(changed),
            "dequantised": [step.name for step in job.steps if step.quantised],
            "xxh128": dict(sorted(ledger.xxh128.items())),
        },
        "proof": described(proof),
        "live": asdict(proof.live) if proof and proof.live else None,
    }


def published_name(part: str) -> str:
    """`some/where/a=0.7` without where it lies."""
    path, equals, weight = part.rpartition("=")
    return Path(path).name + equals + weight if equals else Path(part).name


def described(proof: Proof | None) -> dict[str, Any]:
    """The proof in merge.json."""
    if proof is None:
        return {"proven": False}
    asked = {"probes": proof.probes, "same_greedy": proof.same_greedy, "greedy_tokens": CONTINUED}
    return {"proven": True, **asked, **asdict(proof.found), "limits": asdict(proof.limits)}


def show(job: Job, changed: list[str], proof: Proof | None) -> None:
    """What was made and proven, for the person at the terminal."""
    if proof is None:
        console.info(f"{len(changed)} of {len(job.steps)} tensors changed, as planned, no others")
        return
    found, limits, live = proof.found, proof.limits, proof.live
    logit_limit = limits.relative * found.largest_logit
    rows = [
        ("tensors that changed", f"{len(changed)} of {len(job.steps)}", "as planned, no others"),
        (f"positions compared, in {proof.probes} prompts", f"{found.positions}", ""),
        ("largest difference of a logit", f"{found.largest_difference:.2g}", f"{logit_limit:.2g}"),
        ("mean KL, nats", f"{found.mean_kl:.2g}", f"{limits.mean_kl:.2g}"),
        ("same likeliest token", f"{found.agreement:.1%}", f"{limits.agreement:.0%}"),
    ]
    greedy = f"{proof.same_greedy} of {proof.probes}"
    rows.append((f"same {CONTINUED} tokens, written greedily", greedy, ""))
    if live is not None:
        rows.append(("to the live quantised model: mean KL", f"{live.mean_kl:.2g}", "not a gate"))
        rows.append(("to the live quantised model: same token", f"{live.agreement:.1%}", "not a gate"))
    console.table("merged == base + adapter", ("", "found", "allowed"), rows)
    dtype = main_dtype(job.steps)
    if was_quantised(job.trained) and job.onto == "trained" and job.settings.dtype == "auto" and dtype != "F32":
        fp32 = "--dtype fp32 would keep the last bits of what training saw"
        console.info(f"saved in {SHORT_DTYPES[dtype]}, as the base is; {fp32}")
