"""Write what a run trained, with tokenizer and card: adapter/ in PEFT's layout, or model/ as transformers reads it."""

from pathlib import Path
from typing import Any

from ftkit import __version__, console
from ftkit.io.atomic import atomic_folder
from ftkit.io.card import Card, write_card


def save_adapter(path: Path, model: Any, tokenizer: Any, card: Card) -> None:
    """A PEFT adapter; base_model_name_or_path is the base's id or absolute folder, so that PEFT finds it.

    Only adapter weights: left to itself, PEFT adds the base's embeddings where the output head has an adapter.
    """
    with atomic_folder(path) as folder, console.quiet_libraries():
        for config in model.peft_config.values():
            config.base_model_name_or_path = card.base_location
            config.revision = card.base_revision
            config.target_modules = sorted(config.target_modules)  # PEFT holds a set, in another order each time
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        finish(folder, tokenizer, card, "adapter")


def save_model(path: Path, model: Any, tokenizer: Any, card: Card) -> None:
    """A whole model, where every weight was trained."""
    with atomic_folder(path) as folder, console.quiet_libraries():
        model.save_pretrained(str(folder), safe_serialization=True)
        finish(folder, tokenizer, card, "model")


def finish(folder: Path, tokenizer: Any, card: Card, what: str) -> None:
    """Tokenizer, card and README beside the weights."""
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
    if card.pattern:
        lines.append(f"- prompts look like: `{card.pattern}`")
    return "\n".join(lines) + "\n"
