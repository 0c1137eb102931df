"""Rows of which many share a prompt, for models of which only the sizes are at hand: the built-in tokenizer stands in."""

import json
import shutil
from pathlib import Path

import ftkit

NAME = "shared_rows.jsonl"
TINY = Path(ftkit.__file__).parent / "models" / "tiny"
PROMPTS, ANSWERS = 4, 16
WORDS = (
    "the harbour",
    "a quiet street",
    "seven boats",
    "an old map",
    "the first train",
    "a letter from home",
    "winter",
)


def write_shared_rows(folder: Path) -> Path:
    """PROMPTS prompts of some 300 tokens with ANSWERS answers each, and a tokenizer, into a folder with a config.json."""
    for file in TINY.glob("tokenizer*.json"):
        shutil.copyfile(file, folder / file.name)
    rows = [
        {"prompt": text(prompt, 100), "completion": text(prompt + 3 * answer + 1, 20)}
        for prompt in range(PROMPTS)
        for answer in range(ANSWERS)
    ]
    path = folder / NAME
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text(start: int, count: int) -> str:
    """So many of WORDS, others for each start."""
    return " ".join(WORDS[(start + place * (start + 1)) % len(WORDS)] for place in range(count))
