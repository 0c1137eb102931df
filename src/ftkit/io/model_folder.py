"""A model folder but for its weights: where the base's files are, and what a new folder copies and changes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
KEPT = ("generation_config.json", "LICENSE*", "NOTICE*")
CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def copy_beside(base: Path, adapter: Path, folder: Path) -> None:
    """Generation settings and licence of the base; tokenizer and chat template of the adapter, else of the base."""
    owner = adapter if (adapter / "tokenizer_config.json").is_file() else base
    for source, patterns in ((base, KEPT), (owner, TOKENIZER_FILES)):
        for file in (found for pattern in patterns for found in sorted(source.glob(pattern)) if found.is_file()):
            shutil.copyfile(file, folder / file.name)


def write_generation_config(folder: Path, changes: dict[str, Any]) -> None:
    """Recorded settings of answers in generation_config.json, in transformers' names; what else it says stays."""
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(config | changes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_config(
    base: Path, folder: Path, dtype: str, *, converted: bool, untied: bool = False, vocabulary: int | None = None
) -> None:
    """The base's config.json with the number format that the weights have now (`dtype` as safetensors names it).

    converted: parts of the model that name a format of their own (text_config) get the new one too. untied: head and
    embeddings are two tensors now. vocabulary: another number of rows in them than before.
    """
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the older name
    config["dtype"] = CONFIG_DTYPES[dtype]
    for part in config.values():
        if converted and isinstance(part, dict):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = CONFIG_DTYPES[dtype]
    for part in [config, *(part for part in config.values() if isinstance(part, dict))]:
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if vocabulary is not None and "vocab_size" in part:
            part["vocab_size"] = vocabulary
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
