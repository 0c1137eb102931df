"""Write what a run trained, with tokenizer and card: adapter/ in PEFT's layout, or model/ as transformers reads it."""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ftkit import __version__, console, faults
from ftkit.io.atomic import MANIFEST, atomic_folder
from ftkit.io.card import Card, write_card
from ftkit.io.trained import require_all_landed


def save_adapter(path: Path, model: Any, tokenizer: Any, card: Card) -> None:
    """The folder of an adapter, whole or not at all; one of an interrupted run is replaced."""
    with atomic_folder(path, replace=True) as folder:
        write_adapter(folder, model, tokenizer, card)


def save_model(path: Path, model: Any, tokenizer: Any, card: Card) -> None:
    """The folder of a whole model, where every weight was trained."""
    with atomic_folder(path, replace=True) as folder:
        write_model(folder, model, tokenizer, card)


def write_adapter(folder: Path, model: Any, tokenizer: Any, card: Card) -> None:
    """A PEFT adapter; base_model_name_or_path is the base's id or absolute folder, so that PEFT finds it.

    Only adapter weights: left to itself, PEFT adds the base's embeddings where the output head has an adapter.
    """
    with console.quiet_libraries():
        for config in model.peft_config.values():
            config.base_model_name_or_path = card.base_location
            config.revision = card.base_revision
            if config.modules_to_save:
                config.modules_to_save = sorted(set(config.modules_to_save))
            config.target_modules = sorted(config.target_modules)  # PEFT holds a set, in another order each time
        faults.point("write")
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        finish(folder, tokenizer, card, "adapter")


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

    with console.quiet_libraries():
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    require_all_landed(model, folder)


def finish(folder: Path, tokenizer: Any, card: Card, what: str) -> None:
    """Tokenizer, card and README beside the weights."""
    faults.point("write")
    tokenizer.save_pretrained(str(folder))
    write_card(folder, card)
    (folder / "README.md").write_text(model_card(card, what), encoding="utf-8")


def model_card(card: Card, what: str) -> str:
    """README.md of a trained folder, with the metadata that the Hugging Face hub reads."""
    lines = ["---", "library_name: " + ("peft" if what == "adapter" else "transformers")]
    if not card.base.startswith("builtin:"):
        lines.append(f"base_model: {card.base}")
    lines += ["tags: [ftkit]", "---", "", f"# {what.capitalize()} trained with ftkit {__version__}", ""]
    lines += [f"- base: `{card.base}`", f"- method: {card.method}", f"- longest row: {card.max_length} tokens"]
    if card.template_fingerprint:
        lines.append(f"- template: `{card.template_fingerprint}` (its text is in ftkit.json)")
    if card.labels:
        lines.append(f"- tells one of {len(card.labels)} classes: {', '.join(card.labels)}")
    if card.pattern:
        lines.append(f"- prompts look like: `{card.pattern}`")
    return "\n".join(lines) + "\n"
