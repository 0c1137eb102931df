"""Write what a run trained, with tokenizer and card: adapter/ in PEFT's layout, or model/ as transformers reads it."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ftkit import __version__, console, faults
from ftkit.io.atomic import MANIFEST, atomic_folder
from ftkit.io.card import Card, write_card
from ftkit.io.trained import CHANGED, put_tensors, require_all_landed


def save_adapter(path: Path, model: Any, tokenizer: Any, card: Card) -> None:
    """The folder of an adapter or of changed tensors, whole or not at all; one of an interrupted run is replaced."""
    with atomic_folder(path, replace=True) as folder:
        write_adapter(folder, model, tokenizer, card)


def save_model(path: Path, model: Any, tokenizer: Any, card: Card) -> None:
    """The folder of a whole model, where weights of its own were trained."""
    with atomic_folder(path, replace=True) as folder:
        write_model(folder, model, tokenizer, card)


def write_adapter(folder: Path, model: Any, tokenizer: Any, card: Card) -> None:
    """A PEFT adapter; base_model_name_or_path is the base's id or absolute folder, so that PEFT finds it.

    Only adapter weights: left to itself, PEFT adds the base's embeddings where the output head has an adapter.
    """
    if not hasattr(model, "peft_config"):
        write_changed(folder, model, tokenizer, card)
        return
    with console.quiet_libraries():
        for config in model.peft_config.values():
            config.base_model_name_or_path = card.base_location
            config.revision = card.base_revision
            for names in ("target_modules", "feedforward_modules", "modules_to_save"):
                if getattr(config, names, None):  # PEFT holds a set, in another order each time
                    setattr(config, names, sorted(set(getattr(config, names))))
        faults.point("write")
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        if hasattr(model, "pissa_start"):
            rewrite_as_lora(folder, model)
        finish(folder, tokenizer, card, "adapter")


def write_changed(folder: Path, model: Any, tokenizer: Any, card: Card) -> None:
    """The trained tensors of a model by their own names, in files of an adapter's names that PEFT refuses to open."""
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    config = {"base_model_name_or_path": card.base_location, "peft_type": CHANGED, "revision": card.base_revision}
    with console.quiet_libraries():
        faults.point("write")
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        finish(folder, tokenizer, card, "changed tensors")


def rewrite_as_lora(folder: Path, model: Any) -> None:
    """PiSSA's factors as plain LoRA of twice the rank on the untouched base: s (B A - B0 A0) = s [B, -B0] [A; A0]."""
    file = folder / "adapter_model.safetensors"
    tensors, start = load_file(file), {key.replace(".default.", "."): value for key, value in model.pissa_start.items()}
    for key, value in ((key, value) for key, value in tensors.items() if ".lora_" in key):
        first = start[key].to(value)
        tensors[key] = torch.cat([value, first], 0) if ".lora_A." in key else torch.cat([value, -first], 1)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})
    (config,) = model.peft_config.values()
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    plain = replace(config, r=2 * config.r, lora_alpha=scale * 2 * config.r, use_rslora=False,
                    init_lora_weights=True, inference_mode=True)  # fmt: skip
    plain.save_pretrained(str(folder))


def write_model(folder: Path, model: Any, tokenizer: Any, card: Card) -> None:
    """A model as transformers reads it."""
    with console.quiet_libraries():
        faults.point("write")
        model.save_pretrained(str(folder), safe_serialization=True)
        finish(folder, tokenizer, card, "model")


def copy_trained(checkpoint: Path, path: Path) -> None:
    """What a checkpoint trained, without its training state, as the folder of the finished run."""
    with atomic_folder(path, replace=True) as folder:
        skipped = shutil.ignore_patterns("training", MANIFEST)
        shutil.copytree(checkpoint, folder, ignore=skipped, dirs_exist_ok=True)


def restore_adapter(model: Any, folder: Path) -> None:
    """The weights of an adapter folder into a model that trains such an adapter; exit 4 if they are not its own."""
    from peft import set_peft_model_state_dict

    tensors = load_file(folder / "adapter_model.safetensors")
    if not hasattr(model, "peft_config"):
        put_tensors(model, tensors, folder)
        return
    if hasattr(model, "pissa_start"):
        rank = next(iter(model.peft_config.values())).r
        halves = {".lora_A.": (slice(rank),), ".lora_B.": (slice(None), slice(rank))}
        tensors = {
            key: value[next((half for part, half in halves.items() if part in key), ())].contiguous()
            for key, value in tensors.items()
        }
    with console.quiet_libraries():
        set_peft_model_state_dict(model, tensors)
    require_all_landed(model, folder)


def finish(folder: Path, tokenizer: Any, card: Card, what: str) -> None:
    """Tokenizer, card and README beside the weights."""
    faults.point("write")
    tokenizer.save_pretrained(str(folder))
    write_card(folder, card)
    (folder / "README.md").write_text(model_card(card, what), encoding="utf-8")


def model_card(card: Card, what: str) -> str:
    """README.md of a trained folder, with the metadata that the Hugging Face hub reads."""
    lines = [
        "---",
        "library_name: " + ("peft" if what == "adapter" else "transformers" if what == "model" else "ftkit"),
    ]
    if not card.base.startswith("builtin:"):
        lines.append(f"base_model: {card.base}")
    lines += ["tags: [ftkit]", "---", "", f"# {what.capitalize()} trained with ftkit {__version__}", ""]
    lines += [f"- base: `{card.base}`", f"- method: {card.method}", f"- longest row: {card.max_length} tokens"]
    if card.template_fingerprint:
        lines.append(f"- template: `{card.template_fingerprint}` (its text is in ftkit.json)")
    if card.added_tokens:
        lines.append(
            f"- new tokens: {len(card.added_tokens)}; with PEFT: `base.resize_token_embeddings({card.vocabulary})`"
        )
    if card.labels:
        lines.append(f"- tells one of {len(card.labels)} classes: {', '.join(card.labels)}")
    if card.pattern:
        lines.append(f"- prompts look like: `{card.pattern}`")
    return "\n".join(lines) + "\n"
